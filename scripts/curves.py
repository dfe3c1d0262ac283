"""The pictures of report.py: accuracy, losses and learning rate over the epochs of runs."""
import math
import os

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GREY, PALE = "#222222", "#6b6b6b", "#e6e6e6"
# Those of Okabe and Ito, which the colour-blind tell apart too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
DASHES = ("-", ":", "-.")  # the next one when the colours are used up
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK,
    "axes.edgecolor": "#b0b0b0", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": PALE, "grid.linewidth": 0.8,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 9, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.8,
    "lines.markersize": 6, "lines.markeredgecolor": "white", "lines.markeredgewidth": 1.2,
    "lines.solid_capstyle": "round", "legend.frameon": False,
}
WIDTH, PANELS, DPI = 12.8, 6.2, 150  # inches, the height of the panels too; dots an inch
LEFT, RIGHT = 0.045, 0.985  # edges of the panels, in parts of the width
MOST_MARKERS = 25  # on one curve
SIDE_PANELS = (("test_loss", "Test loss"), ("train_loss", "Training loss"),
               ("train_lr", "Learning rate"))


def draw(runs, rows, path):
    """Write one PNG of all ``runs``, each a LoggedRun with its row of the table, to ``path``."""
    lines = [{"color": COLOURS[index % len(COLOURS)],
              "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
             for index in range(len(runs))]
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        header = _header(figure, runs, rows, lines)
        _panels(figure, runs, lines, header)
        _write_whole(figure, path)


def _write_whole(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(aside, format="png", dpi=DPI)
        os.replace(aside, path)
    finally:
        if aside.exists():
            aside.unlink()


# Above the panels


def _header(figure, runs, rows, lines):
    """Title, facts and the legend of several runs; returns their height in inches."""
    single = len(runs) == 1
    title = rows[0]["run"] if single else f"{len(runs)} runs"
    facts = _facts(runs[0], rows[0]) if single else ["each with its best test accuracy"]
    if any(run.is_whole for run in runs):
        facts.append("dashed: published by MoCo v3's authors for ViT-Base")
    # A space first, since matplotlib hides what begins with an underscore.
    entries = [] if single else [f" {row['run']}   {row['best %']} %" for row in rows]
    columns = max(1, int(WIDTH / (0.7 + 0.085 * max(map(len, entries), default=1))))
    height = 1.4 + 0.23 * math.ceil(len(entries) / columns)
    figure.set_size_inches(WIDTH, PANELS + height)
    inch = 1 / (PANELS + height)
    figure.text(LEFT, 1 - 0.55 * inch, _plain(title), fontsize=19, fontweight="bold")
    figure.text(LEFT, 1 - 0.85 * inch, _plain("   |   ".join(facts)), color=GREY)
    if entries:
        figure.legend([Line2D([], [], **line) for line in lines], map(_plain, entries),
                      ncol=columns, loc="upper left", bbox_to_anchor=(LEFT, 1 - 1.02 * inch),
                      borderpad=0, borderaxespad=0, columnspacing=2.5)
    return height


def _facts(run, row):
    facts = [run.recipe.get("data_set"), run.recipe.get("model"), f"{row['epochs']} epochs"]
    if run.seconds:
        facts.append(f"training time {row['h:mm:ss']}")
    if run.published and not run.is_whole:
        facts.append("not the whole data set")
    return [fact for fact in facts if fact]


def _plain(text):
    return text.replace("$", r"\$")  # matplotlib would read a formula


# The panels


def _panels(figure, runs, lines, header):
    inch = 1 / (PANELS + header)
    grid = figure.add_gridspec(3, 2, width_ratios=(1.8, 1), left=LEFT, right=RIGHT, wspace=0.32,
                               top=1 - header * inch, bottom=0.55 * inch, hspace=0.25)
    accuracy = figure.add_subplot(grid[:, 0])
    _panel(accuracy, runs, lines, "test_acc1", "Test accuracy, %", ticks=9)
    _finish_accuracy(accuracy, runs)
    for place, (key, title) in enumerate(SIDE_PANELS):
        side = figure.add_subplot(grid[place, 1])
        _panel(side, runs, lines, key, title, ticks=4)
        side.tick_params(labelbottom=place == 2)
    for lowest in (accuracy, side):
        lowest.set_xlabel("epoch")


def _panel(axes, runs, lines, key, title, ticks):
    axes.set_title(title)
    for run, line in zip(runs, lines):
        epochs, values = run.curve(key)
        marker = "o" if len(epochs) <= MOST_MARKERS else ""
        axes.plot(epochs, values, marker=marker, clip_on=False, **line)
    axes.set_xlim(0, 1.01 * max(run.rows[-1]["epoch"] + 1 for run in runs))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not any(run.curve(key)[0] for run in runs):
        axes.text(0.5, 0.4, "no value yet", transform=axes.transAxes, color=GREY, ha="center")
        axes.set_yticks([])


def _finish_accuracy(axes, runs):
    """The published figures, the best point of a single run, and limits that suit per cents."""
    published = {run.recipe["data_set"]: run.published.accuracy for run in runs if run.is_whole}
    for accuracy in published.values():
        axes.axhline(accuracy, color=GREY, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    spare = max(0, 5 - (high - low)) / 2  # a tenth of a point should not look like a leap
    low = max(0, low - spare)
    axes.set_ylim(low, min(high + spare, 100 + 0.08 * (100 - low)))
    _label_published(axes, published)
    if len(runs) == 1:
        _label_best(axes, *runs[0].curve("test_acc1"))


def _label_published(axes, published):
    """Labels beside the lines, moved down where they would cover each other."""
    low, high = axes.get_ylim()
    place, apart = float("inf"), (high - low) / 28
    beside = axes.get_yaxis_transform()
    stroke = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    for data_set, accuracy in sorted(published.items(), key=lambda item: -item[1]):
        place = min(accuracy, place - apart)
        name = data_set if len(published) > 1 else "published"
        axes.annotate(f"{name} {accuracy} %", (1, accuracy), (1.025, place), xycoords=beside,
                      textcoords=beside, va="center", color=GREY, fontsize=9, arrowprops=stroke)


def _label_best(axes, epochs, values):
    if not values:
        return
    accuracy, epoch = max(zip(values, epochs))
    late = epoch > axes.get_xlim()[1] / 2
    axes.annotate(f"best {accuracy:.2f} %", (epoch, accuracy), (0, 9), va="bottom",
                  textcoords="offset points", ha="right" if late else "left", fontweight="bold",
                  color=COLOURS[0], bbox={"facecolor": "white", "linewidth": 0, "pad": 1.5})
