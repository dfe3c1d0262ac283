"""What runs left in log.txt and run.json, and which of them are repetitions with other seeds."""
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple


class LoggedRun:
    """What log.txt and run.json in ``folder`` say. Raises OSError if there is no log.txt."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        lines = map(parse, (folder / "log.txt").read_bytes().splitlines())
        self.rows, self.repeated = [], False
        for row in (row for row in lines if type(row.get("epoch")) is int):
            # Plain DeiT appends: a run that goes on repeats epochs, and another run begins at 0.
            kept = [earlier for earlier in self.rows if earlier["epoch"] < row["epoch"]]
            self.repeated |= len(kept) < len(self.rows)
            self.rows = [*kept, row]
        facts = folder / "run.json"
        about = parse(facts.read_bytes()) if facts.is_file() else {}
        self.has_facts = isinstance(about.get("settings"), dict)  # plain DeiT writes no run.json
        self.settings = about["settings"] if self.has_facts else {}
        weights = about.get("origin")
        self.weights = weights if isinstance(weights, dict) else {}
        self.continues_another = bool(about.get("parent"))
        # What the run itself has found out about MoCo v3's figure; in run.json since 2026-12.
        published = about.get("published_accuracy")
        self.published = published if type(published) in (int, float) else None
        self.not_comparable = about.get("not_comparable", "its run.json does not say")

        self.data_set = str(self.settings.get("data_set", "-"))
        self.held_out = bool(self.settings.get("hold_out"))
        self.is_of_recipe = self.published is not None and self.not_comparable is None
        self.planned = self.settings.get("epochs", "-")
        self.done = self.rows[-1]["epoch"] + 1 if self.rows else 0
        accuracies = list(self.curve("test_acc1").values())
        self.best, self.last = (max(accuracies), accuracies[-1]) if accuracies else (None, None)
        per_class = list(self.curve("test_acc_per_class").values())
        self.per_class = per_class[-1] if per_class else None
        self.seconds = sum(value for key in ("train_seconds", "test_seconds")
                           for value in self.curve(key).values())
        self.finished = self.done == self.planned and self.last is not None

    def curve(self, key: str) -> Dict[int, float]:
        """The finite values of ``key`` in log.txt, by epoch, counted from 1."""
        return {row["epoch"] + 1: row[key] for row in self.rows
                if type(row.get(key)) in (int, float) and math.isfinite(row[key])}

    def setting(self, name: str) -> Optional[str]:
        """A setting as text, or None if the run's DeiT does not have it."""
        if name == "--resume" and self.weights:
            path, checksum = (str(self.weights.get(name)) for name in ("path", "crc32"))
            return f"{os.path.basename(path)} ({checksum})"
        return str(self.settings[name]) if name in self.settings else None


def parse(text: bytes) -> Dict[str, Any]:
    """The JSON object in ``text``, or {} for anything else, such as half a line."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def find_runs(folders: Iterable[Path]) -> Tuple[List[LoggedRun], List[str]]:
    """The runs in and below the folders; the folders without one, in words."""
    runs, notes = {}, []
    for folder in folders:
        logs = sorted(Path(where, "log.txt") for where, _, files in os.walk(folder)
                      if "log.txt" in files)
        for log in logs:
            try:
                runs.setdefault(log.resolve(), LoggedRun(log.parent))
            except OSError as error:
                notes.append(f"{log}: skipped ({error.strerror})")
        if not logs:
            notes.append(f"{folder}: not a run, and none below it; skipped")
    return list(runs.values()), notes


class Group:
    """Finished runs that differ in nothing but --seed; or one run of any kind."""

    def __init__(self, runs: List[LoggedRun]) -> None:
        self.runs, self.first = runs, runs[0]

    @property
    def subject(self) -> str:
        """What the accuracies are of: a data set, and which of its images."""
        return self.first.data_set + ", held-out" * self.first.held_out

    def values(self, of_run: Callable[[LoggedRun], Optional[float]]) -> List[float]:
        """A number of every run that has it."""
        return [value for value in map(of_run, self.runs) if value is not None]

    def mean(self, of_run: Callable[[LoggedRun], Optional[float]]) -> Optional[float]:
        """The mean of a number over the runs; None if no run has it."""
        values = self.values(of_run)
        return statistics.mean(values) if values else None

    def deviation(self, of_run: Callable[[LoggedRun], Optional[float]]) -> Optional[float]:
        """The standard deviation over the seeds (n - 1); None for a single run."""
        values = self.values(of_run)
        return statistics.stdev(values) if len(values) > 1 else None

    def curve(self, key: str) -> Tuple[List[int], List[float], List[float]]:
        """Epochs that all runs have logged, and the mean and standard deviation of ``key``."""
        curves = [run.curve(key) for run in self.runs]
        epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        return (epochs, [statistics.mean(of_epoch) for of_epoch in values],
                [statistics.stdev(of_epoch) if len(of_epoch) > 1 else 0 for of_epoch in values])

    def interval(self) -> Optional[Tuple[float, float]]:
        """Wilson's 95 % interval of the last accuracy in percent, by the number of images.

        Seeds are evaluated on the same images, so for a group it is that of their mean.
        """
        images, last = self.first.settings.get("test images"), self.mean(lambda run: run.last)
        if last is None or type(images) is not int or images < 1:
            return None
        return wilson(last / 100, images)

    def setting(self, name: str) -> str:
        """The setting of the runs, as text."""
        return self.first.setting(name) or "-"

    def seeds(self) -> str:
        """The seeds, as text."""
        return ", ".join(run.setting("seed") or "-" for run in self.runs)

    def above_published(self) -> Optional[float]:
        """The last accuracy less the published one; None unless they may be compared."""
        if not all(run.is_of_recipe and run.finished for run in self.runs):
            return None
        return self.mean(lambda run: run.last) - self.first.published


def wilson(share: float, images: int) -> Tuple[float, float]:
    """Wilson's 95 % interval, in percent, of a share that was found on a number of images.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959964  # the normal distribution's 97.5 % quantile
    centre = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(
        share * (1 - share) / images + z * z / (4 * images * images))
    return 100 * max(0, centre - half), 100 * min(1, centre + half)


def groups_of(runs: List[LoggedRun]) -> List[Group]:
    """The runs in groups: by data set and kind of images, then the highest last accuracy first.

    Of equal accuracies, the lower loss comes first; what was never evaluated, at the end.
    """
    by_settings, groups = {}, []
    for run in runs:
        # A run that continues another one may have begun with another seed.
        if run.has_facts and run.finished and not run.continues_another:
            settings = {name: value for name, value in run.settings.items() if name != "seed"}
            key = json.dumps([settings, run.weights.get("crc32")], sort_keys=True)
            seeds = by_settings.setdefault(key, {})
            if seeds.setdefault(run.setting("seed"), run) is run:
                continue
        groups.append(Group([run]))
    groups += [Group(list(seeds.values())) for seeds in by_settings.values()]
    subjects = [Group([run]).subject for run in runs]

    def place(group: Group) -> tuple:
        last, (_, losses, _) = group.mean(lambda run: run.last), group.curve("test_loss")
        return last is None, subjects.index(group.subject), -(last or 0), losses[-1:]

    return sorted(groups, key=place)


def varying_settings(groups: List[Group]) -> List[str]:
    """Names of settings, but --seed, that differ between groups on the same images."""
    def differ(one: LoggedRun, other: LoggedRun, name: str) -> bool:
        values = one.setting(name), other.setting(name)
        return None not in values and values[0] != values[1]

    names = dict.fromkeys(["--resume"])
    names.update(dict.fromkeys(name for group in groups for name in group.first.settings))
    return [name for name in names if name not in ("data_set", "hold_out", "epochs", "seed")
            and any(differ(one.first, other.first, name) for one in groups for other in groups
                    if one.subject == other.subject)]
