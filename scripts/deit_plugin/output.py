"""--output_dir: what a run continues from, its log, its checkpoints, written whole or not at all.

``checkpoint.pth`` is the run's word: what it does not contain has not happened, so ``log.txt`` is
cut back to it. It is written after the epoch's line in ``log.txt``, so none can be missing.
"""
import contextlib
import fcntl
import json
import os
import warnings
from collections import namedtuple
from pathlib import Path

import convert_to_deit

from . import options, weights
from .errors import UserError

# Settings that a checkpoint brings along: in its tensors, and with its optimizer and average.
OF_WEIGHTS = ("model", "input_size")
OF_STATE = (*OF_WEIGHTS, "opt", "opt_betas", "opt_eps", "momentum", "weight_decay", "model_ema")
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json")
# Where a run begins: a checkpoint and its path, and the first epoch, 0 unless a run goes on.
Start = namedtuple("Start", "state path epoch")


class RunFolder:
    """``--output_dir`` of one run. Only rank 0 may claim it, begin and save."""

    def __init__(self, args):
        self.path = Path(args.output_dir or os.devnull)  # which contains no run

    def claim(self):
        """Make the folder and lock it until this process ends."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until the end)
            # This lock dies with the process, and data workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path} is being written by another run: wait for "
                            "it, stop it, or pass another folder") from None
        except OSError as error:
            warnings.warn(f"--output_dir {self.path} cannot be locked ({error.strerror}): see to "
                          "it that no other run writes there", stacklevel=1)

    def check(self):
        """Say that it can be written; make nothing."""
        nearest = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir {self.path} cannot be written: see {nearest}, or pass "
                            "another folder")
        return str(self.path)

    def contains(self, path):
        """Whether ``path`` is a file of the run in this folder."""
        path = Path(path).resolve()
        return path.parent == self.path.resolve() and path.name in RUN_FILES

    def find_start(self, args):
        """Continue what is here, with all its settings, or else start from ``--resume``."""
        if args.overwrite and self.contains(args.pretrained):
            raise UserError(f"--overwrite would delete {args.pretrained}, which this run starts "
                            "from: move it, or pass another --output_dir")
        own = self.path / "checkpoint.pth"
        continues = own.exists() and not (args.eval or args.overwrite)
        path = str(own) if continues else args.pretrained
        if not path:
            raise UserError("--resume is missing: pass what convert_to_deit.py wrote, or under "
                            "--eval a checkpoint of a run")
        try:
            state = weights.read(path)
        except UserError as error:
            anew = "; or pass --overwrite to start anew" if continues else ""
            raise UserError(f"{error}{anew}") from None
        if (args.eval or "optimizer" in state) and weights.HEAD[0] not in state["model"]:
            raise UserError(f"{path} has no classifier head, so there is nothing to evaluate or "
                            "continue: pass a checkpoint of a fine-tuning run")
        before, advice = state.get("settings", {}), "pass its own"  # plain DeiT notes none
        names = OF_WEIGHTS if args.eval else OF_STATE
        if continues:
            names, advice = set(before), "pass another --output_dir, or --overwrite to start anew"
            if not args.pretrained or self.contains(args.pretrained):  # as DeiT itself continues
                args.settings["pretrained_file"] = before.get("pretrained_file")
        before = {name: value for name, value in before.items() if name in names}
        differing = options.differing(args.settings, before, "there")
        if differing:
            raise UserError(f"{path} is of a run with other settings: {', '.join(differing)}; "
                            f"{advice}")
        if args.eval or "optimizer" not in state or "epoch" not in state:
            return Start(state, path, 0)
        epoch = state["epoch"] + 1
        if epoch >= args.epochs and not continues:
            raise UserError(f"--resume {path} has all {args.epochs} epochs: pass more --epochs to "
                            "go on from it")
        return Start(state, path, epoch)

    def begin(self, epochs, overwrite, facts):
        """Clear what a crash left, keep the first ``epochs`` of ``log.txt`` and return them.

        With ``overwrite`` no file of an earlier run stays. A log that has lost its checkpoint may
        be all that is left of a run: it is kept as log.txt.old. ``facts`` go into run.json: what
        report.py is to know and log.txt does not tell.
        """
        names = RUN_FILES if overwrite else ()
        for left_over in [*self.path.glob(".*.tmp"), *(self.path / name for name in names)]:
            left_over.unlink(missing_ok=True)
        log, rows = self.path / "log.txt", []
        for line in log.read_text().splitlines() if log.exists() else ():
            with contextlib.suppress(ValueError):  # half a line, left by a crash
                rows.append(json.loads(line))
        if rows and epochs == 0:
            log.rename(self.path / "log.txt.old")
        kept = [row for row in rows if row["epoch"] < epochs]
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        for name, text in (("log.txt", lines), ("run.json", json.dumps(facts, indent=1))):
            with convert_to_deit.whole_file(str(self.path / name)) as file:
                file.write(text.encode())
        return kept

    def save(self, name, state):
        """Write a checkpoint, once the lines of its epochs in log.txt are on the disk."""
        with open(self.path / "log.txt", "rb") as log:
            os.fsync(log.fileno())
        convert_to_deit.save(state, str(self.path / name))
