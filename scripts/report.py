#!/usr/bin/env python3
"""Summarise fine-tuning runs, whether finished, running or crashed: a table and a picture.

    python scripts/report.py out
    python scripts/report.py out/pets --classes

Runs are found at any depth below the folders. Tables need nothing but Python; pictures need
matplotlib.
"""
import argparse
import csv
import errno
import os
import sys
from pathlib import Path
from typing import Any, Callable, List

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import errors  # noqa: E402
from reports import classes, pictures, runs, table  # noqa: E402


def report_runs(args: argparse.Namespace) -> None:
    """Print the table of all runs and its notes, and draw their curves."""
    found, notes = runs.find_runs(args.paths)
    if not found:
        sys.exit(f"error: no run found; name the --output_dir of a run; {'; '.join(notes)}")
    folders = [os.path.abspath(run.name) for run in found]
    beside = Path(os.path.relpath(os.path.commonpath(folders)), "report.png")
    picture = picture_path(args.output, beside)
    groups = runs.groups_of(found)
    rows = table.rows_of(groups)
    shown = table.without_empty(rows)
    left = shown[0].index(table.COLUMNS[0]) + 1
    print(table.as_text(shown, left), table.meaning_of(shown[0]), *table.notes_on(found), *notes,
          sep="\n", flush=True)
    finish(args, rows, pictures.draw_curves, groups, picture)


def report_classes(args: argparse.Namespace) -> None:
    """Print a row for each class of one evaluation, and draw the confusion matrix."""
    if len(args.paths) > 1:
        sys.exit("error: --classes: pass one run, or one table of predictions")
    path, = args.paths
    path = path / "predictions.csv" if path.is_dir() else path
    try:
        found = classes.read(path)
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(f"error: {path}: {getattr(error, 'strerror', None) or error}; pass the "
                 "--output_dir of a run that was evaluated, or what --eval --predictions wrote")
    picture = picture_path(args.output, path.with_suffix(".png"))
    rows = classes.rows_of(found)
    print(table.as_text(rows, 1), f"accuracy: {found.accuracy:.2f} % of "
          f"{sum(map(sum, found.counts))} images in {path}", *not_the_last(path, found), sep="\n",
          flush=True)
    finish(args, rows, pictures.draw_matrix, found, picture)


def not_the_last(path: Path, found: classes.Predictions) -> List[str]:
    """A warning if the predictions are not of the last evaluation in the log.txt beside them.

    A run that was killed, and goes on from an earlier epoch, has such a file for a while.
    """
    if path.name != "predictions.csv" or not path.with_name("log.txt").is_file():
        return []
    last = runs.LoggedRun(path.parent).last
    if last is None or abs(last - found.accuracy) < 0.005:
        return []
    return [f"warning: the last evaluation in {path.with_name('log.txt')} has {last:.2f} %: was "
            "the run stopped after the predictions were written?"]


def picture_path(given: Path, default: Path) -> Path:
    """The picture's path; exit with a line if there is another kind of file."""
    path = given or default
    if path.is_dir():
        path = path / default.name
    elif not path.suffix:
        path = path.with_suffix(".png")
    if path.exists() and not path.is_file():
        sys.exit(f"error: cannot write {path}: it is a pipe or a device; pass the path of a file")
    return path


def finish(args: argparse.Namespace, rows: List[List[str]], draw: Callable[[Any, Path], None],
           what: Any, picture: Path) -> None:
    """Write --csv, and draw; exit with a line if that fails."""
    if args.csv:
        write_csv(rows, args.csv)
    try:
        draw(what, picture)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot write {picture}: {getattr(error, 'strerror', None) or error}")
    except ImportError as error:
        print(f"no picture, matplotlib is missing ({error}): pip install matplotlib")
    else:
        print(f"picture: {picture}")


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
    """Report on runs, or on the classes of one."""
    parser = argparse.ArgumentParser(
        description="Summarise fine-tuning runs: a table and a picture. Runs that differ only in "
                    "--seed are one row.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH",
                        help="--output_dir of a run, or a folder with runs below it")
    parser.add_argument("--classes", action="store_true",
                        help="instead, every class of one run's last evaluation and what it is "
                             "taken for, and the confusion matrix; PATH is the run, or a table "
                             "that --eval --predictions wrote")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="the picture, whose ending tells its format (default: report.png "
                             "in the run's folder, or in the one that has all runs; "
                             "predictions.png beside predictions.csv)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    args = parser.parse_args()
    (report_classes if args.classes else report_runs)(args)


if __name__ == "__main__":
    errors.guard(main)
