"""--output_dir: what a run starts from, and what it leaves there, each file complete or absent.

``checkpoint.pth`` holds all that a run needs to go on: log.txt and run.json are views of it, for
people and for report.py, and are written again when a run goes on.
"""
import contextlib
import fcntl
import json
import os
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Tuple

import convert_to_deit

from . import flags, provenance, weights
from .data import TEST_DATA, TEST_IMAGES
from .errors import UserError
from .job import Job, Start, differing, unequal

PREDICTIONS = "predictions.csv"  # of the last evaluation
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json", PREDICTIONS,
             "predictions.png", "report.png")  # the pictures are report.py's


# What a run starts from


def choose_checkpoint(args: Namespace) -> Tuple[str, bool]:
    """The checkpoint to start from, and whether it is --output_dir's own. Raises UserError."""
    if args.overwrite and _is_of_run(args.resume, args.output_dir):
        raise UserError(f"--overwrite would delete {args.resume}, which this run starts from: "
                        "move it, or pass another --output_dir")
    own = Path(args.output_dir, "checkpoint.pth")
    if args.output_dir and own.exists() and not (args.eval or args.overwrite):
        return str(own), True
    if _is_of_run(args.resume, args.output_dir) and not args.eval:
        raise UserError(f"--resume {args.resume} is a file of --output_dir, where this run would "
                        "write its own: pass another --output_dir")
    if not args.resume:
        raise UserError("--resume is missing: pass what convert_to_deit.py wrote, or under --eval "
                        "the checkpoint of a run")
    return args.resume, False


def read_checkpoint(path: str, continues: bool, args: Namespace) -> Dict[str, Any]:
    """What ``weights.read`` returns. Raises UserError."""
    try:
        return weights.read(path, args.trust)
    except UserError as error:
        if continues:
            raise UserError(f"{error}; or pass --overwrite to start from scratch, or another "
                            "--output_dir") from None
        raise


def start_from(path: str, continues: bool, state: Dict[str, Any], args: Namespace) -> Start:
    """Which epoch comes next, and where the run came from. Raises UserError.

    state: the content of the checkpoint ``path``.
    """
    is_of_run = "optimizer" in state and isinstance(state.get("epoch"), int)
    has_head = weights.has_head(state["model"])
    if state.get("kept_head") and not args.eval:
        raise UserError(f"{path} has the classifier that --keep-head kept, so it can only be "
                        "evaluated: pass --eval, or convert it without --keep-head")
    if continues and not is_of_run:
        raise UserError(f"{path} is not the checkpoint of a run, but would be replaced by one: "
                        "move it, or pass another --output_dir")
    if (args.eval or is_of_run) and not has_head:
        raise UserError(f"{path} has no classifier head, so it cannot be evaluated or continued: "
                        "pass the checkpoint of a fine-tuning run")
    epoch = state["epoch"] + 1 if is_of_run and not args.eval else 0
    if 0 < args.epochs <= epoch and not continues:
        raise UserError(f"--resume {path} has all {args.epochs} epochs: pass more --epochs to "
                        "continue from it")
    parent = provenance.of_weights(path) if epoch and not continues else state.get("parent")
    origin = state.get("origin") if is_of_run else None
    if origin is None:
        origin = {**provenance.of_weights(path), "is_moco_v3": convert_to_deit.is_sine_cosine(
            state["model"].get("pos_embed"))}
    rows, best = _history(Path(path), state) if epoch else ([], None)
    return Start(path, weights.mark_of(path), continues, epoch, has_head, parent, origin, rows,
                 best, state.get("launches", []) if continues else [])


def _history(path: Path, state: Dict[str, Any]
             ) -> Tuple[List[Dict[str, Any]], Optional[Dict[str, Any]]]:
    """The rows of the epochs before, and the best of them: epoch, acc1, path of its checkpoint.

    Best is None if the checkpoint of that epoch is not there any more.
    """
    rows, best = state.get("rows"), state.get("best")
    if rows is None:  # plain DeiT, and earlier versions of this bundle
        rows = [row for row in _read_log(path.with_name("log.txt"))
                if row["epoch"] <= state["epoch"]]
        evaluated = [row for row in rows if "test_acc1" in row]
        row = max(evaluated, key=lambda row: row["test_acc1"], default=None)
        best = row and {"epoch": row["epoch"], "acc1": row["test_acc1"]}
    if best and best["epoch"] == state["epoch"]:  # a kill may have prevented its second name
        return rows, {**best, "path": str(path)}
    other = path.with_name("best_checkpoint.pth")
    with contextlib.suppress(convert_to_deit.CheckpointError):
        if best and convert_to_deit.load(str(other), verify=False).get("epoch") == best["epoch"]:
            return rows, {**best, "path": str(other)}
    return rows, None


def _read_log(path: Path) -> List[Dict[str, Any]]:
    """The rows of a log.txt, skipping truncated lines and lines in another format."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("epoch"), int)]


def _settings_before(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of the run that wrote a checkpoint; plain DeiT has its arguments there."""
    args = state.get("args", {})
    return state.get("settings") or (vars(args) if isinstance(args, Namespace) else args)


def changed_since(start: Start, state: Dict[str, Any], settings: Dict[str, Any]
                  ) -> Optional[List[str]]:
    """What differs from another run that goes on here, in words; None if no other one does."""
    if start.continues or not start.epoch or "settings" not in state:
        return None
    return differing(settings, state["settings"], "there")


def require_agreement(job: Job, state: Dict[str, Any]) -> None:
    """Raise UserError if the checkpoint is of a run with other settings, origin or classes.

    state: the content of the checkpoint ``job.start.path``.
    """
    start, args, before = job.start, job.args, _settings_before(state)
    its_classes, advice = state.get("classes", job.classes), "pass the same flags and the same data"
    if its_classes != job.classes:
        raise UserError(f"{start.path} comes from a run on other classes "
                        f"({unequal(job.classes, its_classes, 'here', 'there')}): pass the "
                        f"--data-path of that run, not {args.data_path}")
    must_agree = [flags.WEIGHTS, flags.STATE, flags.ACCURACY]
    if args.eval:
        must_agree = [flags.WEIGHTS, flags.ACCURACY] if args.hold_out else [flags.WEIGHTS]
    names = {name for name, flag in flags.FLAGS.items() if flag.agrees in must_agree}
    if flags.ACCURACY in must_agree:
        names |= {TEST_IMAGES, TEST_DATA}
    if start.continues:
        names, advice = before, "pass another --output_dir, or --overwrite to start from scratch"
    different = differing(job.settings, {name: before[name] for name in before if name in names},
                          "there")
    if start.continues and not _is_of_run(args.resume, args.output_dir) and os.path.isfile(
            args.resume):
        given, first = provenance.of_weights(args.resume), start.parent or start.origin
        # A parent may have been trained on since. Then its checksum differs, and its path tells.
        if given["crc32"] not in (start.origin["crc32"], first["crc32"]) and (
                start.parent is None or given["path"] != first["path"]):
            different.append(f"--resume {args.resume} with checksum {given['crc32']} (there: "
                             f"{first['path']}, {first['crc32']})")
    if start.continues and len(different) == 1 and args.epochs > before.get("epochs", args.epochs):
        advice = f"to train on, pass --resume {start.path} and another --output_dir"
    if different:
        raise UserError(f"{start.path} comes from a run with other settings: "
                        f"{', '.join(different)}; {advice}")


def _is_of_run(path: str, folder: str) -> bool:
    """Whether ``path`` is a file of the run in ``folder``."""
    return bool(folder) and (Path(path).resolve().parent == Path(folder).resolve()
                             and Path(path).name in RUN_FILES)


# What a run leaves


class RunFolder:
    """``--output_dir`` of one run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self) -> None:
        """Raise UserError if it cannot be written, or if another run writes to it."""
        try:
            convert_to_deit.check_folder(str(self.path))
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from error
        if (self.path / ".lock").exists():
            lock = self._lock()
            if lock:
                lock.close()

    def _lock(self) -> Optional[IO]:
        """Take a lock that ends when its file is closed; None where there are no locks.

        Forked processes would inherit a flock. Raises UserError if another run has the lock.
        """
        try:
            file = open(self.path / ".lock", "a+")  # noqa: SIM115 (may be held until the end)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path} is being written by another run: wait for "
                            "it, stop it, or pass another folder") from None
        except OSError as error:
            warnings.warn(f"--output_dir {self.path} cannot be locked ({error.strerror}): make "
                          "sure that no other run writes there", stacklevel=1)
            return None

    def begin(self, job: Job, machines: List[str]) -> None:
        """Make the folder that of this run: log.txt up to the start, run.json, the best checkpoint.

        It is locked until this process ends. With --overwrite the files of an earlier run are
        deleted. Other files that have our names and are not continued are renamed to NAME.old: a
        log without its checkpoint may be all that is left of a run.

        machines: names of hosts and devices. Raises UserError if another run has the folder.
        """
        start = job.start
        deletes = job.args.overwrite and (self.path / ".lock").exists()  # a run of ours was there
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = self._lock()
        is_ours = {name: start.continues for name in RUN_FILES}
        is_ours["run.json"] = bool(start.launches)  # what an earlier version wrote is kept
        for name in RUN_FILES:
            path = self.path / name
            for left_by_a_crash in self.path.glob(f".{name}.*.tmp"):
                left_by_a_crash.unlink()
            if deletes:
                path.unlink(missing_ok=True)
            elif path.exists() and not is_ours[name]:
                path.replace(self.path / (name + ".old"))
        with convert_to_deit.atomic_write(str(self.path / "log.txt")) as file:
            file.write("".join(json.dumps(row) + "\n" for row in start.rows).encode())
        if start.best:
            self.name_best(start.best["path"])
        self.launches = [*start.launches, {**job.launch, "processes": job.args.world_size,
                                           "machines": machines}]
        self._facts = {
            "settings": job.settings, "differs": job.differs,
            "published_accuracy": job.published_accuracy, "not_comparable": job.not_comparable,
            "classes": job.classes, "parent": start.parent, "origin": start.origin,
            "launches": self.launches}
        self._write_facts()

    def name_best(self, path: Optional[str] = None) -> None:
        """Give a checkpoint, checkpoint.pth by default, also the name best_checkpoint.pth."""
        source, best = Path(path or self.path / "checkpoint.pth"), self.path / "best_checkpoint.pth"
        if best.exists() and os.path.samefile(source, best):
            return
        aside = self.path / f".{best.name}.{os.getpid()}.tmp"
        try:
            os.link(source, aside)
            os.replace(aside, best)
        except OSError:  # a file system without links, or another one
            with convert_to_deit.atomic_write(str(best)) as file, open(source, "rb") as content:
                shutil.copyfileobj(content, file)

    def end(self) -> None:
        """Note in run.json when this launch ended."""
        self.launches[-1]["ended"] = provenance.now()
        self._write_facts()

    def _write_facts(self) -> None:
        with convert_to_deit.atomic_write(str(self.path / "run.json")) as file:
            file.write(json.dumps(self._facts, indent=1).encode())

    def log(self, row: Dict[str, Any]) -> None:
        """Append an epoch's row to log.txt, flushed to disk."""
        with open(self.path / "log.txt", "a") as log:
            log.write(json.dumps(row) + "\n")
            convert_to_deit.flush_to_disk(log)

    def save(self, state: Dict[str, Any]) -> None:
        """Write checkpoint.pth, complete or not at all."""
        convert_to_deit.save(state, str(self.path / "checkpoint.pth"))
