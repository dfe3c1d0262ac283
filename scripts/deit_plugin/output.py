"""--output_dir: what a run starts from, its log, and its checkpoints, each complete or absent.

``checkpoint.pth`` is the source of truth: a resumed run cuts log.txt back to its epoch. It is
written after the line of its epoch, so no line can be missing.
"""
import contextlib
import fcntl
import json
import os
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import convert_to_deit

from . import weights
from .errors import UserError
from .options import Plan
from .words import differing

# Settings that must match the weights, and the optimizer and EMA state, of a checkpoint.
OF_WEIGHTS = ("model", "input_size")
OF_STATE = (*OF_WEIGHTS, "opt", "opt_betas", "opt_eps", "momentum", "weight_decay", "model_ema")
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json")


class Start(NamedTuple):
    """What a run starts from."""

    path: str  # of a checkpoint
    continues: bool  # whether that is --output_dir's own, so that all settings must be the same
    epoch: int  # the first epoch to train, from 0; more than 0 if a run is resumed
    pretrained: str  # the name of the file that training began with
    state: Dict[str, Any]  # the checkpoint, at least `model`


def find_start(args: Namespace, plan: Plan) -> Start:
    """Continue what is in --output_dir, or else start from --resume. Raises UserError."""
    path, continues = choose_checkpoint(args, plan)
    start = read_start(path, continues, args, plan)
    check_settings(start, args, plan)
    return start


def choose_checkpoint(args: Namespace, plan: Plan) -> Tuple[str, bool]:
    """The checkpoint to start from, and whether it is --output_dir's own."""
    if plan.overwrite and is_of_run(plan.pretrained, args.output_dir):
        raise UserError(f"--overwrite would delete {plan.pretrained}, which this run starts from: "
                        "move it, or pass another --output_dir")
    own = Path(args.output_dir, "checkpoint.pth")
    if args.output_dir and own.exists() and not (args.eval or plan.overwrite):
        return str(own), True
    if not plan.pretrained:
        raise UserError("--resume is missing: pass what convert_to_deit.py wrote, or under --eval "
                        "the checkpoint of a run")
    return plan.pretrained, False


def read_start(path: str, continues: bool, args: Namespace, plan: Plan) -> Start:
    """Read the checkpoint, and find the epoch that comes next."""
    try:
        state = weights.read(path)
    except UserError as error:
        hint = "; or pass --overwrite to start from scratch" if continues else ""
        raise UserError(f"{error}{hint}") from None
    resumes = not args.eval and "optimizer" in state and "epoch" in state
    if (args.eval or resumes) and weights.HEAD[0] not in state["model"]:
        raise UserError(f"{path} has no classifier head, so it cannot be evaluated or continued: "
                        "pass the checkpoint of a fine-tuning run")
    epoch = state["epoch"] + 1 if resumes else 0
    if epoch >= args.epochs and not continues:
        raise UserError(f"--resume {path} has all {args.epochs} epochs: pass more --epochs to "
                        "continue from it")
    pretrained = os.path.basename(plan.pretrained)
    if continues and (not pretrained or is_of_run(plan.pretrained, args.output_dir)):
        pretrained = state.get("pretrained", pretrained)  # as DeiT itself is continued
    return Start(path, continues, epoch, pretrained, state)


def check_settings(start: Start, args: Namespace, plan: Plan) -> None:
    """Raise UserError if the checkpoint belongs to a run with other settings."""
    before = start.state.get("settings", {})  # plain DeiT's has none
    names = set(before) if start.continues else OF_WEIGHTS if args.eval else OF_STATE
    different = differing(plan.settings, {name: value for name, value in before.items()
                                          if name in names}, "there")
    advice = "pass the same"
    if start.continues:
        different += differing({"--resume": start.pretrained},
                               {"--resume": start.state.get("pretrained")}, "there")
        advice = "pass another --output_dir, or --overwrite to start from scratch"
    if different:
        raise UserError(f"{start.path} comes from a run with other settings: "
                        f"{', '.join(different)}; {advice}")


def is_of_run(path: str, folder: str) -> bool:
    """Whether ``path`` is a file of the run in ``folder``."""
    return (Path(path).resolve().parent == Path(folder).resolve()
            and Path(path).name in RUN_FILES)


class RunFolder:
    """``--output_dir`` of one run. Only rank 0 writes there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def claim(self) -> None:
        """Create the folder and lock it until this process ends."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until the end)
            # This lock ends with the process, and data workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path} is being written by another run: wait for "
                            "it, stop it, or pass another folder") from None
        except OSError as error:
            warnings.warn(f"--output_dir {self.path} cannot be locked ({error.strerror}): make "
                          "sure that no other run writes there", stacklevel=1)

    def check(self) -> str:
        """Return the folder's path, or raise UserError if it cannot be written. Creates nothing."""
        nearest = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir {self.path} cannot be written: see {nearest}, or pass "
                            "another folder")
        return str(self.path)

    def begin(self, epochs: int, overwrite: bool, facts: Dict[str, Any]) -> List[Dict[str, Any]]:
        """Remove what a crash left, keep the first ``epochs`` rows of log.txt and return them.

        With ``overwrite`` no file of an earlier run stays. A log without its checkpoint may be all
        that is left of a run: it is kept as log.txt.old. ``facts``, which report.py reads and
        log.txt does not contain, become run.json.
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
            with convert_to_deit.atomic_write(str(self.path / name)) as file:
                file.write(text.encode())
        return kept

    def log(self, row: Dict[str, Any]) -> None:
        """Append an epoch's row to log.txt, flushed to disk."""
        with open(self.path / "log.txt", "a") as log:
            log.write(json.dumps(row) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def save(self, name: str, state: Dict[str, Any]) -> None:
        """Write a checkpoint, complete or not at all."""
        convert_to_deit.save(state, str(self.path / name))
