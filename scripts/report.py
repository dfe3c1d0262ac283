#!/usr/bin/env python3
"""What fine-tuning runs came to, finished, running or crashed: one table and one picture.

    python scripts/report.py out/*

The table needs nothing but Python, the picture matplotlib: it shows the curves of all runs and is
report.png in the folder of the first.
"""
import argparse
import contextlib
import json
import signal
import sys
from datetime import timedelta
from pathlib import Path

# Accuracy in %, by the table in MoCo v3's transfer/README.md.
PUBLISHED = {"cifar10": 98.9, "cifar100": 90.5, "flowers": 97.7, "pets": 93.2}
COLUMNS = ("run", "data set", "epochs", "best %", "last %", "published %", "vs. published",
           "training time")
LEGEND = "\npublished: by MoCo v3's authors, not run here; compared with whole runs of the recipe\n"
PANELS = {"test_acc1": "Test accuracy, %", "test_loss": "Test loss", "train_loss": "Train loss",
          "train_lr": "Learning rate"}
STYLE = {"figure.figsize": (13, 7.3), "figure.constrained_layout.use": True, "savefig.dpi": 150,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "axes.titleweight": "bold", "axes.titlelocation": "left",
         "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.12}


class Run:
    """What log.txt and run.json in ``folder`` say. Raises OSError where that is no run.

    rows: a dict for each epoch; differs: what differs from the published recipe.
    """

    def __init__(self, folder):
        self.name, self.rows = str(folder), []
        for line in (folder / "log.txt").read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # half a line, left by a crash
                self.rows.append(json.loads(line))
        try:
            about = json.loads((folder / "run.json").read_bytes())
        except (OSError, ValueError):  # of plain DeiT's, or damaged
            about = {"settings": {"data_set": "-", "epochs": "-"}, "differs": ["no run.json"]}
        self.data_set, self.planned = about["settings"]["data_set"], about["settings"]["epochs"]
        self.differs, self.published = about["differs"], PUBLISHED.get(self.data_set)
        self.comparable = self.published and not self.differs

    def curve(self, key):
        """Epochs, counted from 1, that logged ``key``, and its values."""
        rows = [row for row in self.rows if key in row]
        return [row["epoch"] + 1 for row in rows], [row[key] for row in rows]

    def cells(self):
        """The run's row of the table: a text for each of COLUMNS."""
        accuracies = self.curve("test_acc1")[1] or [None]
        best, done = max(accuracies), self.rows[-1]["epoch"] + 1 if self.rows else 0
        compared = self.comparable and done == self.planned and best is not None
        seconds = sum(self.curve("train_seconds")[1])
        return [self.name, self.data_set, f"{done} of {self.planned}",
                number(best), number(accuracies[-1]), number(self.published, ".1f"),
                number(best - self.published if compared else None, "+.2f"),
                str(timedelta(seconds=round(seconds))) if seconds else "-"]


def number(value, form=".2f"):
    """The number as text, "-" for None."""
    return "-" if value is None else format(value, form)


def table(runs):
    """A line for each run under COLUMNS; numbers stand to the right."""
    rows = [COLUMNS, *(run.cells() for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = "<<" + ">" * len(COLUMNS[2:])
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width
                               in zip(row, sides, widths)) for row in rows)


def draw(runs, path):
    """Write a PNG with the curves of one or several runs. Raises ImportError, OSError."""
    from matplotlib import style
    from matplotlib.figure import Figure

    first, *others = PANELS
    with style.context(["tableau-colorblind10", STYLE], after_reset=True):
        figure = Figure()
        panels = figure.subplot_mosaic([[first, other] for other in others],
                                       gridspec_kw={"width_ratios": (1.8, 1)})
        for key, panel in panels.items():
            for run in runs:
                epochs, values = run.curve(key)
                label = "{1}, best {3} %: ".format(*run.cells()) + run.name[-40:]
                panel.plot(epochs, values, label=label, marker="." if len(epochs) <= 25 else "")
            panel.set(title=PANELS[key], xlabel="epoch")
            panel.locator_params(axis="x", integer=True)
        for data_set, accuracy in sorted({(run.data_set, run.published) for run in runs
                                          if run.comparable}):
            panels[first].axhline(accuracy, color="#555555", linestyle="--",
                                  label=f"published for {data_set}: {accuracy} %")
        panels[first].legend()
        figure.savefig(str(path))


def main():
    """Print the table and its notes, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="--output_dir of a run; what is no run is named and skipped")
    args = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):  # not on Windows; else `| head` ends in a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    runs, notes = [], []
    for folder in args.folders:
        try:
            runs.append(Run(folder))
        except OSError as error:
            notes.append(f"{folder}: not a run, skipped (log.txt: {error.strerror})")
    if not runs:
        sys.exit(f"error: no run found; name the --output_dir of a run; {'; '.join(notes)}")
    notes += [f"{run.name}: settings differ from the published recipe: {', '.join(run.differs)}"
              for run in runs if run.differs]
    print(table(runs), LEGEND, *notes, sep="\n", flush=True)
    path = Path(runs[0].name, "report.png")
    try:
        draw(runs, path)
    except OSError as error:
        sys.exit(f"error: cannot write {path}: {error.strerror or error}")
    except ImportError as error:
        print(f"no picture, matplotlib is missing ({error}): pip install matplotlib")
    else:
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
