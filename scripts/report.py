#!/usr/bin/env python3
"""Summarise fine-tuning runs, whether finished, running or crashed: one table and one picture.

    python scripts/report.py out

Runs are found at any depth below the folders. The table needs nothing but Python; the picture needs
matplotlib.
"""
import argparse
import contextlib
import csv
import errno
import json
import math
import os
import statistics
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import errors  # noqa: E402

COLUMNS = ("run", "data set", "epochs", "best %", "last %", "95 % interval", "per class %",
           "published %", "vs. published", "training time")
NOTE = ("best: of all evaluations, so it was chosen on the images that it is measured on. last and "
        "per class (the mean of the classes' accuracies): the last evaluation. 95 % interval: of "
        "last, by Wilson, for that number of images. published: by MoCo v3's authors, not run "
        "here; compared with last in finished runs of the recipe. training time: with evaluation.")
PANELS = {"test_loss": "Test loss", "train_loss": "Train loss", "train_lr": "Learning rate"}
MOST_CURVES = 10
STYLE = {"figure.figsize": (13, 8), "figure.constrained_layout.use": True, "savefig.dpi": 120,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "axes.titleweight": "bold", "axes.titlelocation": "left",
         "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.12}


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
        accuracies = self.curve("test_acc1")[1]
        self.best, self.last = (max(accuracies), accuracies[-1]) if accuracies else (None, None)
        self.finished = self.done == self.planned and self.last is not None

    def curve(self, key: str) -> Tuple[List[int], List[float]]:
        """Epochs, counted from 1, that logged ``key``, and its values."""
        rows = [row for row in self.rows if type(row.get(key)) in (int, float)]
        return [row["epoch"] + 1 for row in rows], [row[key] for row in rows]

    def cells(self) -> List[str]:
        """The run's row of the table: a text for each of COLUMNS."""
        seconds = sum(self.curve("train_seconds")[1]) + sum(self.curve("test_seconds")[1])
        per_class = self.curve("test_acc_per_class")[1] or [None]
        compared = self.is_of_recipe and self.finished
        return [self.name, self.data_set + (", held-out" if self.held_out else ""),
                f"{self.done} of {self.planned}", number(self.best), number(self.last),
                self.interval(), number(per_class[-1]), number(self.published, ".1f"),
                number(self.last - self.published if compared else None, "+.2f"),
                str(timedelta(seconds=round(seconds))) if 0 < seconds < 1e9 else "-"]

    def interval(self) -> str:
        """Wilson's 95 % interval of the last accuracy, by the number of images; "-" without it."""
        images, z = self.settings.get("test images"), 1.959964  # the normal 97.5 % quantile
        if self.last is None or type(images) is not int or images < 1:
            return "-"
        share = self.last / 100
        centre = (share + z * z / (2 * images)) / (1 + z * z / images)
        half = z / (1 + z * z / images) * math.sqrt(
            share * (1 - share) / images + z * z / (4 * images * images))
        return f"{100 * max(0, centre - half):.2f}-{100 * (centre + half):.2f}"

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


def number(value: Optional[float], form: str = ".2f") -> str:
    """The number as text, "-" for None."""
    return "-" if value is None else format(value, form)


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


def varying_settings(runs: List[LoggedRun]) -> List[str]:
    """Names of settings that differ between runs on the same data set."""
    def differ(one: LoggedRun, other: LoggedRun, name: str) -> bool:
        values = one.setting(name), other.setting(name)
        return one.data_set == other.data_set and None not in values and values[0] != values[1]

    names = dict.fromkeys(["--resume"] + [name for run in runs for name in run.settings])
    return [name for name in names if name not in ("data_set", "epochs")
            and any(differ(one, other, name) for one in runs for other in runs)]


def rows_of(runs: List[LoggedRun]) -> List[List[str]]:
    """The table: a header, and the cells of each run with the settings that vary."""
    varying = varying_settings(runs)
    header = [*COLUMNS, *(name.replace("_", " ") for name in varying)]
    return [header, *([*run.cells(), *(run.setting(name) or "-" for name in varying)]
                      for run in runs)]


def table(rows: List[List[str]]) -> str:
    """The rows as lines; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = "<<" + ">" * len(rows[0])
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width
                               in zip(row, sides, widths)).rstrip() for row in rows)


def seed_groups(runs: List[LoggedRun]) -> List[str]:
    """For runs that are equal except for --seed: mean and standard deviation, in words."""
    groups = {}
    for run in runs:
        if run.has_facts and not run.continues_another:  # its first epochs may have another seed
            settings = {name: value for name, value in run.settings.items() if name != "seed"}
            key = json.dumps([settings, run.weights.get("crc32")], sort_keys=True)
            groups.setdefault(key, []).append(run)
    lines = []
    for group in groups.values():
        seeds = {run.setting("seed"): run for run in group[::-1] if run.finished}
        left_out = [run.name for run in group if run not in seeds.values()]
        if len(seeds) > 1:
            chosen = [run for run in group if run in seeds.values()]
            last, best = (
                f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"
                for values in ([run.last for run in chosen], [run.best for run in chosen]))
            lines.append(f"{len(seeds)} seeds ({', '.join(run.name for run in chosen)}): "
                         f"last {last}, best {best}"
                         + (f"; left out, not finished or with the same seed: "
                            f"{', '.join(left_out)}" if left_out else ""))
    return [*lines, "± is the standard deviation over seeds (n - 1)."] if lines else []


def notes_on(runs: List[LoggedRun]) -> List[str]:
    """What keeps runs from being compared: with published figures, or among seeds."""
    notes = {}
    for run in runs:
        if run.not_comparable and (run.published or run.has_facts and not run.held_out
                                   and run.data_set != "folder"):
            notes.setdefault(f"not compared, since {run.not_comparable}", []).append(run.name)
        if run.continues_another:
            notes.setdefault("not counted among seeds, since it continues another run", []
                             ).append(run.name)
        if run.repeated:
            notes.setdefault("log.txt repeats epochs; what came last counts", []).append(run.name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def draw(runs: List[LoggedRun], path: Path) -> None:
    """Write a picture with the runs' curves, complete or not at all.

    Raises ImportError, OSError, ValueError.
    """
    os.environ.pop("MPLBACKEND", None)  # nothing is shown on a screen
    warnings.simplefilter("ignore")  # characters without a glyph
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    data_sets = list(dict.fromkeys(run.data_set for run in runs))
    rows = range(len(data_sets) * len(PANELS))
    left = [data_sets[row // len(PANELS)] for row in rows]
    right = [list(PANELS)[row // len(data_sets)] for row in rows]
    with style.context(STYLE, after_reset=True):
        figure = Figure()
        panels = figure.subplot_mosaic(
            [[f"accuracy {one}", other] for one, other in zip(left, right)],
            gridspec_kw={"width_ratios": (1.8, 1)})
        for key, panel in panels.items():
            data_set = key[len("accuracy "):] if key not in PANELS else None
            for position, run in enumerate(runs):
                epochs, values = run.curve(key if data_set is None else "test_acc1")
                if data_set in (None, run.data_set):
                    panel.plot(epochs, values, color=f"C{position}", label=label_of(run),
                               marker="." if len(epochs) <= 25 else "")
            kinds = sorted({run.held_out for run in runs if data_set in (None, run.data_set)})
            kind = " and ".join(("Test", "Held-out")[held_out] for held_out in kinds)
            panel.set(title=PANELS.get(key, escape(f"{kind} accuracy on {data_set}, %")),
                      xlabel="epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        comparable = {run.data_set: run.published for run in runs if run.is_of_recipe}
        for data_set, accuracy in comparable.items():
            panels[f"accuracy {data_set}"].axhline(accuracy, color="#555555", linestyle="--")
        figure.legend(*panels[right[0]].get_legend_handles_labels(), loc="outside lower center",
                      ncols=2, title="dashed: published by MoCo v3's authors" * bool(comparable))
        # As convert_to_deit.atomic_write, which needs torch. A link's target is replaced.
        path = path.resolve()
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(str(aside), format=path.suffix[1:])
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):  # it is gone once renamed
                aside.unlink()


def label_of(run: LoggedRun) -> str:
    """The run in the legend."""
    held_out = ", held-out" * run.held_out
    return escape(f"{run.name[-60:]}{held_out}: best {number(run.best)} %")


def escape(text: str) -> str:
    """Keep matplotlib from reading a formula between dollar signs."""
    return text.replace("$", r"\$")


def default_path(runs: List[LoggedRun]) -> Path:
    """A file beside the runs."""
    parents = [os.path.dirname(os.path.abspath(run.name)) for run in runs]
    return Path(os.path.relpath(os.path.commonpath(parents)), "report.png")


def write_csv(rows: List[List[str]], path: Path) -> None:
    """Write the table; exit with a line if that fails."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a folder, a pipe or a device; pass a file")
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(aside, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        aside.replace(path)
    except OSError as error:
        sys.exit(f"error: --csv {path}: {error.strerror}")
    print(f"table: {path}")


def main() -> None:
    """Print the table and its notes, then draw."""
    parser = argparse.ArgumentParser(
        description="Summarise fine-tuning runs: a table and a picture.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="--output_dir of a run, or a folder with runs below it")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="the picture, whose ending tells its format (default: report.png "
                             "beside the runs)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    args = parser.parse_args()
    runs, notes = find_runs(args.folders)
    if not runs:
        sys.exit(f"error: no run found; name the --output_dir of a run; {'; '.join(notes)}")
    drawn, path = runs[:MOST_CURVES], args.output or default_path(runs)
    if path.is_dir():
        path = path / "report.png"
    elif not path.suffix:
        path = path.with_suffix(".png")
    if path.exists() and not path.is_file():
        sys.exit(f"error: cannot write {path}: it is a pipe or a device; pass the path of a file")
    if len(runs) > len(drawn):
        notes.append(f"the picture shows the first {len(drawn)} of {len(runs)} runs")
    rows = rows_of(runs)
    print(table(rows), NOTE, *seed_groups(runs), *notes_on(runs), *notes, sep="\n", flush=True)
    if args.csv:
        write_csv(rows, args.csv)
    try:
        draw(drawn, path)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot write {path}: {getattr(error, 'strerror', None) or error}")
    except ImportError as error:
        print(f"no picture, matplotlib is missing ({error}): pip install matplotlib")
    else:
        print(f"picture: {path}")


if __name__ == "__main__":
    errors.guard(main)
