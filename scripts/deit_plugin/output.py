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
from .words import HELD_OUT, TEST_IMAGES, differing

# Settings that must match the weights of a checkpoint, and its optimizer and EMA.
OF_WEIGHTS = ("model", "input_size")
OF_STATE = (*OF_WEIGHTS, "opt", "opt_betas", "opt_eps", "momentum", "weight_decay", "model_ema")
# Settings that must match for accuracies to be comparable with those in its log.txt.
OF_ACCURACY = ("data_set", "hold_out", TEST_IMAGES, HELD_OUT)
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json", "report.png")


class Start(NamedTuple):
    """What a run starts from."""

    path: str  # of a checkpoint
    continues: bool  # True if that is --output_dir's own checkpoint; then all settings must match
    epoch: int  # the first epoch to train, from 0; more than 0 if a run is resumed
    parent: Optional[Dict[str, str]]  # the checkpoint of another run that this run was resumed from
    origin: Dict[str, Any]  # the pretrained file that training began with
    rows: List[Dict[str, Any]]  # the log.txt rows of earlier epochs
    state: Dict[str, Any]  # the checkpoint, at least `model`


def find_start(args: Namespace, plan: Plan) -> Start:
    """Continue what is in --output_dir, or else start from --resume. Raises UserError."""
    return read_start(*choose_checkpoint(args, plan), args, plan)


def choose_checkpoint(args: Namespace, plan: Plan) -> Tuple[str, bool]:
    """The checkpoint to start from, and whether it is --output_dir's own."""
    if plan.overwrite and _is_of_run(plan.resume, args.output_dir):
        raise UserError(f"--overwrite would delete {plan.resume}, which this run starts from: "
                        "move it, or pass another --output_dir")
    own = Path(args.output_dir, "checkpoint.pth")
    if args.output_dir and own.exists() and not (args.eval or plan.overwrite):
        return str(own), True
    if not plan.resume:
        raise UserError("--resume is missing: pass what convert_to_deit.py wrote, or under --eval "
                        "the checkpoint of a run")
    return plan.resume, False


def read_start(path: str, continues: bool, args: Namespace, plan: Plan) -> Start:
    """Read the checkpoint, and find out which epoch comes next and where the run came from."""
    try:
        state = weights.read(path, plan.trust)
    except UserError as error:
        if continues:
            raise UserError(f"{error}; or pass --overwrite to start from scratch, or another "
                            "--output_dir") from None
        raise
    is_of_run = "optimizer" in state and "epoch" in state
    if continues and not is_of_run:
        raise UserError(f"{path} is not the checkpoint of a run, but would be replaced by one: "
                        "move it, or pass another --output_dir")
    if (args.eval or is_of_run) and weights.HEAD[0] not in state["model"]:
        raise UserError(f"{path} has no classifier head, so it cannot be evaluated or continued: "
                        "pass the checkpoint of a fine-tuning run")
    epoch = state["epoch"] + 1 if is_of_run and not args.eval else 0
    if epoch >= args.epochs and not continues:
        raise UserError(f"--resume {path} has all {args.epochs} epochs: pass more --epochs to "
                        "continue from it")
    parent = provenance.of_weights(path) if epoch and not continues else state.get("parent")
    origin = state.get("origin") if is_of_run else None
    if origin is None:
        origin = {**provenance.of_weights(path), "is_moco_v3": convert_to_deit.is_sine_cosine(
            state["model"].get("pos_embed"))}
    rows = [row for row in read_log(Path(path).with_name("log.txt")) if row["epoch"] < epoch]
    return Start(path, continues, epoch, parent, origin, rows, state)


def check_start(start: Start, settings: Dict[str, Any], args: Namespace, plan: Plan) -> None:
    """Raise UserError if the checkpoint belongs to a run with other settings or other weights."""
    before, advice = settings_before(start.state), "pass the same flags and the same data"
    names = OF_WEIGHTS + (OF_ACCURACY if args.hold_out else ()) if args.eval else (
        OF_STATE + OF_ACCURACY)
    if start.continues:
        names, advice = before, "pass another --output_dir, or --overwrite to start from scratch"
    different = differing(settings, {name: before[name] for name in before if name in names},
                          "there")
    if start.continues and not _is_of_run(plan.resume, args.output_dir) and os.path.isfile(
            plan.resume):
        given, first = provenance.of_weights(plan.resume), start.parent or start.origin
        # A parent may have been trained on since, so its path is enough.
        if given["crc32"] not in (start.origin["crc32"], first["crc32"]) and (
                start.parent is None or given["path"] != first["path"]):
            different.append(f"--resume {plan.resume} with checksum {given['crc32']} (there: "
                             f"{first['path']}, {first['crc32']})")
    if different:
        raise UserError(f"{start.path} comes from a run with other settings: "
                        f"{', '.join(different)}; {advice}")


def settings_before(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of the run that wrote a checkpoint; plain DeiT has its arguments there."""
    args = state.get("args", {})
    return state.get("settings") or (vars(args) if isinstance(args, Namespace) else args)


def _is_of_run(path: str, folder: str) -> bool:
    """Whether ``path`` is a file of the run in ``folder``."""
    return bool(folder) and (Path(path).resolve().parent == Path(folder).resolve()
                             and Path(path).name in RUN_FILES)


def _best_is_from_before(log: Path, epoch: int) -> bool:
    """Whether the best epoch in a log.txt is before ``epoch``.

    A parent may have trained further, so its best_checkpoint.pth can be newer than the checkpoint
    that is resumed.
    """
    best = max(read_log(log), key=lambda row: row.get("test_acc1", -1), default=None)
    return best is not None and best["epoch"] < epoch


def read_log(path: Path) -> List[Dict[str, Any]]:
    """The rows of a log.txt, skipping truncated lines and lines in another format."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("epoch"), int)]


class RunFolder:
    """``--output_dir`` of one run. Only rank 0 writes there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self) -> str:
        """Return the folder's path, and create nothing.

        Raises UserError if it cannot be written or if another run is writing to it.
        """
        try:
            convert_to_deit.check_folder(str(self.path))
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from error
        if (self.path / ".lock").exists():
            lock = self._lock("r", fcntl.LOCK_SH)  # shared, since all ranks of this launch do this
            if lock:
                lock.close()
        return str(self.path)

    def claim(self) -> None:
        """Create the folder and lock it until this process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = self._lock("a+", fcntl.LOCK_EX)

    def _lock(self, mode: str, kind: int) -> Optional[IO]:
        """Take a lock that ends when its file is closed; None where there are no locks.

        Forked data workers would inherit a flock. Raises UserError if another run has the lock.
        """
        try:
            file = open(self.path / ".lock", mode)  # noqa: SIM115 (may be held until the end)
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path} is being written by another run: wait for "
                            "it, stop it, or pass another folder") from None
        except OSError as error:
            warnings.warn(f"--output_dir {self.path} cannot be locked ({error.strerror}): make "
                          "sure that no other run writes there", stacklevel=1)
            return None

    def begin(self, start: Start, overwrite: bool, facts: Dict[str, Any],
              launch: Dict[str, Any]) -> None:
        """Claim the folder, cut log.txt back to the start, and write run.json.

        With ``overwrite`` the files of an earlier run are deleted. Without it, files that have our
        names and are not continued are renamed to NAME.old: a log without its checkpoint may be
        all that is left of a run. run.json gets ``facts`` and a record of this launch.
        """
        self.claim()
        deletes = overwrite and "settings" in self._read_run_json()
        for name in RUN_FILES:
            path = self.path / name
            for left_by_a_crash in self.path.glob(f".{name}.*.tmp"):
                left_by_a_crash.unlink()
            if deletes:
                path.unlink(missing_ok=True)
            elif path.exists() and not start.continues:
                path.rename(self._unused_name(name))
        launches = self._read_run_json().get("launches", [])
        lines = "".join(json.dumps(row) + "\n" for row in start.rows)
        with convert_to_deit.atomic_write(str(self.path / "log.txt")) as file:
            file.write(lines.encode())
        best = Path(start.path).with_name("best_checkpoint.pth")
        if start.parent and not start.continues and best.exists() and _best_is_from_before(
                best.with_name("log.txt"), start.epoch):
            with convert_to_deit.atomic_write(str(self.path / best.name)) as file, \
                    best.open("rb") as parents:
                shutil.copyfileobj(parents, file)
        self._write_run_json({**facts, "parent": start.parent, "origin": start.origin,
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
            convert_to_deit.flush_to_disk(log)

    def save(self, name: str, state: Dict[str, Any]) -> None:
        """Write a checkpoint, complete or not at all."""
        convert_to_deit.save(state, str(self.path / name))
