"""--output_dir: what a run starts from, its log, and its checkpoints, each complete or absent.

``checkpoint.pth`` is the source of truth: a resumed run cuts log.txt back to its epoch. It is
written after the line of its epoch, so no line can be missing.
"""
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import IO, Any, Dict, List, NamedTuple, Optional, Tuple

import convert_to_deit

from . import provenance, weights
from .errors import UserError
from .options import Plan
from .words import differing

# Settings that must match the weights, and the optimizer and EMA state, of a checkpoint.
OF_WEIGHTS = ("model", "input_size")
OF_STATE = (*OF_WEIGHTS, "opt", "opt_betas", "opt_eps", "momentum", "weight_decay", "model_ema")
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json", "report.png")


class Start(NamedTuple):
    """What a run starts from."""

    path: str  # of a checkpoint
    continues: bool  # whether that is --output_dir's own, so that all settings must be the same
    epoch: int  # the first epoch to train, from 0; more than 0 if a run is resumed
    parent: Optional[str]  # the checkpoint of another run that this run went on from
    pretrained: Dict[str, str]  # what training began with, see provenance.of_weights
    rows: List[Dict[str, Any]]  # of log.txt, for the epochs before
    state: Dict[str, Any]  # the checkpoint, at least `model`


def find_start(args: Namespace, plan: Plan) -> Start:
    """Continue what is in --output_dir, or else start from --resume. Raises UserError."""
    return read_start(*choose_checkpoint(args, plan), args, plan)


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
        state = weights.read(path, plan.trust)
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
    pretrained, parent = state.get("pretrained"), state.get("parent")
    named = os.path.abspath(plan.pretrained)
    if epoch and not continues:
        parent = named
    is_this_run = named == parent or is_of_run(named, args.output_dir)
    if pretrained is None or os.path.exists(plan.pretrained) and not is_this_run:
        pretrained = provenance.of_weights(plan.pretrained or path)
    rows = [row for row in read_log(Path(path).with_name("log.txt")) if row["epoch"] < epoch]
    return Start(path, continues, epoch, parent, pretrained, rows, state)


def check_settings(start: Start, settings: Dict[str, Any], is_evaluation: bool) -> None:
    """Raise UserError if the checkpoint belongs to a run with other settings."""
    before = start.state.get("settings", {})  # plain DeiT's has none
    names = set(before) if start.continues else OF_WEIGHTS if is_evaluation else OF_STATE
    different = differing(settings, {name: before[name] for name in before if name in names},
                          "there")
    own, its = start.pretrained, start.state.get("pretrained", start.pretrained)
    if start.continues and own.get("crc32") != its.get("crc32"):
        different.append("--resume {file}, checksum {crc32}".format(**own)
                         + " (there: {file}, checksum {crc32})".format(**its))
    if different:
        advice = ("pass another --output_dir, or --overwrite to start from scratch"
                  if start.continues else "pass the same")
        raise UserError(f"{start.path} comes from a run with other settings: "
                        f"{', '.join(different)}; {advice}")


def is_of_run(path: str, folder: str) -> bool:
    """Whether ``path`` is a file of the run in ``folder``."""
    return bool(folder) and (Path(path).resolve().parent == Path(folder).resolve()
                             and Path(path).name in RUN_FILES)


def read_log(path: Path) -> List[Dict[str, Any]]:
    """The rows of a log.txt, without half a line that a crash left and without lines of others."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("epoch"), int)]


def require_writable(folder: Path, flag: str) -> None:
    """Raise UserError if files cannot be written to ``folder``, which may not exist yet."""
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder} cannot be written: see {nearest}, or pass another one")


def require_writable_file(path: str, flag: str) -> None:
    """Raise UserError if ``path`` cannot become a file."""
    if Path(path).is_dir() or not os.path.basename(path):
        raise UserError(f"{flag} {path} is a folder: pass the path of a file")
    require_writable(Path(path).parent, flag)


class RunFolder:
    """``--output_dir`` of one run. Only rank 0 writes there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self) -> str:
        """Return the folder's path. Raises UserError if it cannot be written or another run does.

        Creates nothing.
        """
        require_writable(self.path, "--output_dir")
        if (self.path / ".lock").exists():
            with open(self.path / ".lock") as lock:
                self._lock(lock, fcntl.LOCK_SH)  # other processes of this launch look, too
        return str(self.path)

    def claim(self) -> None:
        """Create the folder and lock it until this process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until the end)
        self._lock(self._claim, fcntl.LOCK_EX)

    def _lock(self, file: IO, kind: int) -> None:
        """Take a lock that ends with the process, and that data workers do not inherit."""
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path} is being written by another run: wait for "
                            "it, stop it, or pass another folder") from None
        except OSError as error:
            warnings.warn(f"--output_dir {self.path} cannot be locked ({error.strerror}): make "
                          "sure that no other run writes there", stacklevel=1)

    def begin(self, start: Start, overwrite: bool, facts: Dict[str, Any],
              launch: Dict[str, Any]) -> None:
        """Claim the folder, remove what a crash left, cut log.txt back, and write run.json.

        With ``overwrite`` the files of an earlier run are deleted. Otherwise a log without its
        checkpoint, which may be all that is left of a run, and files of others that have our names
        are kept under another name. What report.py reads besides log.txt, and a record of each
        launch, become run.json.
        """
        self.claim()
        for left_over in self.path.glob(".*.tmp"):
            left_over.unlink()
        deletes = overwrite and "settings" in self._read_run_json()
        for name in () if start.continues else RUN_FILES:
            if deletes:
                (self.path / name).unlink(missing_ok=True)
            elif (self.path / name).exists():
                (self.path / name).rename(self._unused_name(name))
        launches = self._read_run_json().get("launches", [])
        lines = "".join(json.dumps(row) + "\n" for row in start.rows)
        with convert_to_deit.atomic_write(str(self.path / "log.txt")) as file:
            file.write(lines.encode())
        best = Path(start.path).with_name("best_checkpoint.pth")
        if start.parent and not start.continues and best.exists():
            with convert_to_deit.atomic_write(str(self.path / best.name)) as file, \
                    best.open("rb") as parents:
                shutil.copyfileobj(parents, file)
        self._write_run_json({**facts, "parent": start.parent, "pretrained": start.pretrained,
                              "launches": [*launches, launch]})

    def end(self) -> None:
        """Note in run.json when this launch ended."""
        facts = self._read_run_json()
        facts["launches"][-1]["ended"] = provenance.now()
        self._write_run_json(facts)

    def _unused_name(self, name: str) -> Path:
        """A path such as log.txt.old that does not exist."""
        endings = itertools.chain([".old"], (f".old{number}" for number in itertools.count(2)))
        return next(path for path in (self.path / (name + ending) for ending in endings)
                    if not path.exists())

    def _read_run_json(self) -> Dict[str, Any]:
        """Our run.json; {} if it is missing, damaged or not ours."""
        try:
            facts = json.loads((self.path / "run.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) and isinstance(facts.get("launches"), list) else {}

    def _write_run_json(self, facts: Dict[str, Any]) -> None:
        with convert_to_deit.atomic_write(str(self.path / "run.json")) as file:
            file.write(json.dumps(facts, indent=1).encode())

    def log(self, row: Dict[str, Any]) -> None:
        """Append an epoch's row to log.txt, flushed to disk."""
        with open(self.path / "log.txt", "a") as log:
            log.write(json.dumps(row) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def save(self, name: str, state: Dict[str, Any]) -> None:
        """Write a checkpoint, complete or not at all."""
        convert_to_deit.save(state, str(self.path / name))
