"""The files of a run in ``--output_dir``: written whole or not at all, and read to continue.

``checkpoint.pth`` is the run's word: whatever it does not hold has not happened, so ``log.txt`` is
cut back to it. It is written after the epoch's line in ``log.txt``, so none can be missing.
"""
import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path

import torch

import weights
from failures import Refusal

BUSY = ("--output_dir {} is being written by another run: wait for it, stop it, or choose another "
        "folder")
RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "run.json")


def write_whole(path, write):
    """Call ``write(file)`` on a file beside ``path``, flush it to disk, then take its name.

    Raises Refusal if that fails; what was at ``path`` is still there then.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise Refusal(f"cannot write {path} ({reason}); the last whole one is kept") from error
    finally:
        if aside.exists():
            aside.unlink()


class RunFolder:
    """``--output_dir`` of one run. Only the first process writes."""

    def __init__(self, folder, writes):
        self.path = Path(folder) if folder else None
        self.writes = writes and self.path is not None
        self._lock = None

    def claim(self):
        """Make the folder and lock it until this process ends.

        Raises Refusal if it cannot be written or another process holds it.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A lock of fcntl dies with this process and is not inherited by its data workers.
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until the end)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(BUSY.format(self.path)) from None
        except OSError as error:
            raise Refusal(f"--output_dir {self.path} cannot be written: {error.strerror}") from None

    def check_writable(self):
        """Whether ``claim`` would succeed, in words, without making or changing anything.

        Raises Refusal as it does.
        """
        existing = self._nearest_existing()
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise Refusal(f"--output_dir {self.path} cannot be written: see {existing}")
        if (self.path / ".lock").exists():
            with open(self.path / ".lock") as lock:
                _refuse_if_locked(lock, self.path)
        holds_run = (self.path / "checkpoint.pth").exists()
        return f"{self.path}, {'which holds a run' if holds_run else 'a new run'}"

    def _nearest_existing(self):
        return next(path for path in (self.path, *self.path.resolve().parents) if path.exists())

    def begin(self, epochs, overwrite):
        """Clear what a crash left behind, and leave the files of the first ``epochs`` epochs.

        With ``overwrite`` no file of an earlier run stays.
        """
        if not self.writes:
            return
        for left_over in self.path.glob(".*.tmp"):
            left_over.unlink()
        if overwrite:
            for name in RUN_FILES:
                if (self.path / name).exists():
                    (self.path / name).unlink()
        self._cut_log(epochs)

    def check_space(self, parameters):
        """The room that checkpoints take, in words. Raises Refusal if the disk has less.

        A checkpoint holds the weights, their average and Adam's two moments in float32. There are
        the last, the best, and the one being written.
        """
        needed = 3 * 4 * 4 * parameters
        kept = sum((self.path / name).stat().st_size for name in RUN_FILES
                   if (self.path / name).exists())
        free = shutil.disk_usage(self._nearest_existing()).free + kept
        if free < needed:
            raise Refusal(f"--output_dir {self.path} needs {needed / 1e9:.1f} GB for checkpoints, "
                          f"its disk has {free / 1e9:.1f} GB: make room or choose another folder")
        return f"{needed / 1e9:.1f} GB needed for checkpoints, {free / 1e9:.1f} GB there"

    def previous(self):
        """The checkpoint to continue from, or None. Raises Refusal if it is damaged."""
        return self._read("checkpoint.pth") if self.path else None

    def _read(self, name):
        path = self.path / name
        if not path.exists():
            return None
        try:
            return weights.read(str(path))
        except Refusal as refusal:
            raise Refusal(f"{refusal}; or pass --overwrite to start anew, or another --output_dir"
                          ) from None

    def holds(self, path):
        """Whether ``path`` is a file of the run in this folder."""
        files = [self.path / name for name in RUN_FILES] if self.path else []
        return any(os.path.samefile(path, file) for file in files
                   if os.path.exists(path) and file.exists())

    def best_accuracy(self, state):
        """The accuracy of ``best_checkpoint.pth``; else the one that ``state`` remembers.

        They differ if a crash came between writing the one and the other.
        """
        best = self._read("best_checkpoint.pth") if self.writes else None
        return (best or state).get("max_accuracy", 0.0)

    def save(self, name, state):
        """Write a checkpoint whole, once the lines of its epochs in ``log.txt`` are on the disk."""
        if self.writes:
            self._flush_log()
            write_whole(self.path / name, lambda file: torch.save(state, file))

    def describe(self, facts):
        """Write ``run.json``: what is trained on what, and how long each epoch took."""
        if self.writes:
            write_whole(self.path / "run.json",
                        lambda file: file.write(json.dumps(facts, indent=1).encode()))

    def _flush_log(self):
        log = self.path / "log.txt"
        if log.exists():
            with open(log, "rb") as file:
                os.fsync(file.fileno())

    def _cut_log(self, epochs):
        """Leave in ``log.txt`` the whole lines of the first ``epochs`` epochs.

        With no epoch to keep, the file is set aside as ``log.txt.1`` (or 2, 3 ...): without its
        checkpoint it may be all that is left of a finished run.
        """
        log = self.path / "log.txt"
        if not log.exists():
            return
        if epochs == 0:
            numbered = (self.path / f"log.txt.{number}" for number in itertools.count(1))
            os.replace(log, next(path for path in numbered if not path.exists()))
            return
        kept = [line for line in log.read_bytes().splitlines(keepends=True)
                if _epoch_of(line) in range(epochs)]
        write_whole(log, lambda file: file.writelines(kept))


def _refuse_if_locked(lock, folder):
    try:
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(BUSY.format(folder)) from None
    except OSError as error:
        raise Refusal(f"--output_dir {folder} cannot be locked: {error.strerror}") from None


def _epoch_of(line):
    """The epoch of a line of ``log.txt``; None for half a line."""
    try:
        return json.loads(line)["epoch"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
