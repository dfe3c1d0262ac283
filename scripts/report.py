#!/usr/bin/env python3
"""What fine-tuning runs came to: one table, and their curves as pictures.

The table needs nothing but Python. The pictures need matplotlib (requirements-report.txt).
"""
import argparse
import sys
from pathlib import Path

from failures import Refusal, guard
from logged_run import LoggedRun

COLUMNS = ("run", "data set", "epochs", "best %", "last %", "published %", "distance", "h:mm:ss")
NUMBERS = COLUMNS[3:]
LEGEND = """\
published: by MoCo v3's authors, with ViT-Base, 300 epochs of pre-training, 100 of fine-tuning
distance: best accuracy less the published one, in points
h:mm:ss: training time, with evaluation and saving"""
UNKNOWN = "-"
LONGEST_NAME = 40


def find(folders):
    """The runs among ``folders``, and a line on each folder that is none.

    Raises Refusal if there is no run at all.
    """
    runs, others = [], []
    for folder in folders:
        try:
            runs.append(LoggedRun(folder))
        except OSError as error:
            others.append(f"{folder}: not a run (log.txt: {error.strerror})")
    if not runs:
        raise Refusal(f"no run found: name the --output_dir of one or more, as in out/*; "
                      f"{'; '.join(others)}")
    return runs, others


def row_of(run):
    """The run's row of the table: a text for each of COLUMNS."""
    _, accuracies = run.curve("test_acc1")
    best, last = max(accuracies, default=None), (accuracies or [None])[-1]
    published = run.published.accuracy if run.published else None
    distance = best - published if accuracies and run.is_whole else None
    texts = (_name(run.path), run.recipe.get("data_set", UNKNOWN), _progress(run),
             _number(best, ".2f"), _number(last, ".2f"), _number(published, ".1f"),
             _number(distance, "+.2f"), _time(run))
    return dict(zip(COLUMNS, texts))


def _name(path):
    name = str(path if path.name else path.resolve())
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half - 2]}...{name[1 - half:]}"


def _progress(run):
    done = run.rows[-1]["epoch"] + 1 if run.rows else 0
    return f"{done} of {run.recipe['epochs']}" if "epochs" in run.recipe else str(done)


def _number(number, form):
    return UNKNOWN if number is None else format(number, form)


def _time(run):
    """The training time; with a > where not every epoch's is known."""
    if not run.seconds:
        return UNKNOWN
    minutes, seconds = divmod(round(sum(run.seconds)), 60)
    more = ">" if len(run.seconds) < len(run.rows) else ""
    return f"{more}{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def table(rows):
    """The rows, each a dict of COLUMNS, as aligned text under their headings."""
    rows = [dict(zip(COLUMNS, COLUMNS)), *rows]
    widths = {column: max(len(row[column]) for row in rows) for column in COLUMNS}
    sides = {column: ">" if column in NUMBERS else "<" for column in COLUMNS}
    return "\n".join("  ".join(f"{row[column]:{sides[column]}{widths[column]}}"
                               for column in COLUMNS) for row in rows)


def draw(runs, output):
    """One picture in each run's folder, and one that compares several in ``output``; says where.

    Without matplotlib it says what is missing instead.
    """
    try:
        import curves
    except ImportError as error:
        sys.stderr.write(f"no pictures: they need matplotlib ({error}): "
                         "pip install -r requirements-report.txt\n")
        return
    pictures = [([run], run.path / "report.png") for run in runs]
    if len(runs) > 1:
        pictures.append((runs, output / "comparison.png"))
    for shown, path in pictures:
        try:
            curves.draw(shown, [row_of(run) for run in shown], path)
        except OSError as error:
            raise Refusal(f"cannot write {path} ({error.strerror}); --no-pictures prints the "
                          "table alone") from error
        print(f"picture: {path}")


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=(
        "Exit status: 0, also if only the table could be made because matplotlib is missing; "
        "2 if no run is found or a picture cannot be written."))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="--output_dir of a run, running, finished or crashed, as in out/*; "
                        "what is no run is named and skipped")
    parser.add_argument("--output", default=".", type=Path, metavar="FOLDER",
                        help="where the comparison.png of several runs goes (default: here); "
                        "each run's report.png goes into its own folder")
    parser.add_argument("--no-pictures", action="store_true", help="print the table alone")
    return parser.parse_args()


def main():
    """Print the table, what one must know to read it, and where the pictures are."""
    args = parse()
    runs, others = find(args.folders)
    notes = [f"{run.path}: {note}" for run in runs for note in run.notes()]
    print(table(map(row_of, runs)), "", LEGEND, *notes, *others, sep="\n", flush=True)
    if not args.no_pictures:
        draw([run for run in runs if run.rows], args.output)


if __name__ == "__main__":
    guard(main)
