"""A run as the files of its folder tell it, be it running, finished or crashed."""
import json
import math
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """A result of MoCo v3's authors: accuracy in per cent, and the images it was measured with."""

    accuracy: float
    training: int
    test: int


# The table in transfer/README.md of MoCo v3.
PUBLISHED = {"cifar10": Published(98.9, 50000, 10000), "cifar100": Published(90.5, 50000, 10000),
             "flowers": Published(97.7, 2040, 6149), "pets": Published(93.2, 3680, 3669)}
PUBLISHED_RECIPE = {"model": "deit_base_patch16_224", "input_size": 224, "epochs": 100}
CURVES = ("train_lr", "train_loss", "test_loss", "test_acc1")


class LoggedRun:
    """What ``log.txt`` and ``run.json`` say. Raises OSError for a folder that holds no run.

    ``rows`` are the epochs, each a line of log.txt; ``recipe`` is {} and ``images`` (training,
    test) holds None where unknown; ``seconds`` is how long each of the first epochs took.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.damage = []
        self.rows = self._read_log()
        about = self._read_about()
        self.recipe = about.get("recipe", {})
        self.images = about.get("training images"), about.get("test images")
        self.seconds = about.get("seconds", [])[:len(self.rows)]
        self.published = PUBLISHED.get(self.recipe.get("data_set"))

    def curve(self, key):
        """The epochs, counted from 1, that logged a finite ``key``, and its values."""
        points = [(row["epoch"] + 1, row[key]) for row in self.rows
                  if math.isfinite(row.get(key, math.nan))]
        return [epoch for epoch, _ in points], [value for _, value in points]

    @property
    def is_whole(self):
        """Whether it used all images of its data set, so that the published figure compares."""
        return self.published is not None and self.images == self.published[1:]

    def notes(self):
        """What one must know to compare the run with others, in sentences."""
        notes = list(self.damage)
        if self.published and not self.is_whole:
            parts = [f"{has or 'unknown'} of {all_images} {kind} images" for has, all_images, kind
                     in zip(self.images, self.published[1:], ("training", "test"))]
            notes.append(f"not the whole data set, so no distance: {', '.join(parts)}")
        others = [f"{name} {self.recipe[name]} (published: {value})"
                  for name, value in PUBLISHED_RECIPE.items()
                  if self.published and self.recipe.get(name, value) != value]
        if others:
            notes.append(f"not the published recipe: {', '.join(others)}")
        return notes

    def _read_about(self):
        """``run.json``, which this bundle writes; a run of another origin lacks it."""
        reason = "run.json is damaged"
        try:
            about = json.loads((self.path / "run.json").read_bytes())
            if _is_about(about):
                return about
        except FileNotFoundError:
            reason = "there is no run.json"
        except (OSError, ValueError):
            pass
        self.damage.append(f"{reason}, so its data set, recipe and time are unknown")
        return {}

    def _read_log(self):
        """The epochs of ``log.txt``; one that comes again was trained again, from there on."""
        rows, damaged = [], 0
        for line in self._log_lines():
            row = _epoch(line)
            if row is None:
                damaged += 1
                continue
            while rows and rows[-1]["epoch"] >= row["epoch"]:
                rows.pop()
            rows.append(row)
        if damaged:
            self.damage.append(f"lines of log.txt that are not whole and do not count: {damaged}")
        if not rows:
            self.damage.append("no epoch is complete yet, so there is no picture")
        return rows

    def _log_lines(self):
        try:
            return (self.path / "log.txt").read_bytes().splitlines()
        except FileNotFoundError:
            if (self.path / "run.json").exists():  # its first epoch is in training
                return []
            raise


def _is_about(about):
    if not isinstance(about, dict) or not isinstance(about.get("recipe"), dict):
        return False
    texts = [about["recipe"].get(key, "") for key in ("data_set", "model")]
    seconds = about.get("seconds", [])
    return (all(isinstance(text, str) for text in texts) and isinstance(seconds, list)
            and all(isinstance(second, (int, float)) for second in seconds))


def _epoch(line):
    """The epoch that a line of ``log.txt`` tells of; None for half a line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = (isinstance(row, dict) and isinstance(row.get("epoch"), int)
              and all(isinstance(row.get(key, 0), (int, float)) for key in CURVES))
    return row if is_row else None
