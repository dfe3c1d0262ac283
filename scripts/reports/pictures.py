"""Curves of runs, and the confusion matrix of classes. Needs matplotlib, which is imported late."""
import contextlib
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List

from .classes import Predictions
from .runs import Group, varying_settings
from .table import number

PANELS = {"test_loss": "loss", "train_loss": "Train loss", "train_lr": "Learning rate"}
MOST_COLOURS = 10  # of curves; matplotlib has no more
STYLE = {"figure.figsize": (13, 8), "figure.constrained_layout.use": True, "savefig.dpi": 120,
         "svg.fonttype": "none",  # text that can be edited
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "axes.titleweight": "bold", "axes.titlelocation": "left",
         "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.12}
# Inches that a class takes in the matrix, and the most classes whose names and counts fit.
SIDE, MOST_NAMES, MOST_COUNTS, LONGEST_NAME = 0.15, 110, 25, 30


def draw_curves(groups: List[Group], path: Path) -> None:
    """Write a picture with the groups' curves: the mean over seeds, in a band of ± its deviation.

    The accuracies of each data set that was evaluated have a panel. The best groups of each have a
    colour; all others are grey. Raises ImportError, OSError, ValueError.
    """
    matplotlib, style = _matplotlib()
    evaluated = [group for group in groups if group.mean(lambda run: run.last) is not None]
    subjects = list(dict.fromkeys(group.subject for group in evaluated or groups))
    coloured = _best_of_each(groups)
    labels = _labels(coloured)
    grey = [group for group in groups if group not in coloured]
    rows = range(len(subjects) * len(PANELS))
    with style.context(STYLE, after_reset=True):
        height = max(8, 3 * len(subjects) + len(coloured) / 6)
        figure = matplotlib.figure.Figure(figsize=(13, height))
        panels = figure.subplot_mosaic(
            [[f"accuracy {subjects[row // len(PANELS)]}", list(PANELS)[row // len(subjects)]]
             for row in rows], gridspec_kw={"width_ratios": (1.8, 1)})
        for key, panel in panels.items():
            drawn = [group for group in [*grey, *coloured]
                     if key in PANELS or key[9:] == group.subject]
            for group in drawn:
                _draw_curve(panel, group, key if key in PANELS else "test_acc1", labels)
                if key not in PANELS and group.first.is_of_recipe:
                    panel.axhline(group.first.published, color="#555555", linestyle="--")
            if key not in PANELS:
                panel.set_ylim(top=min(101, panel.get_ylim()[1]))
            panel.set(title=_title(key, drawn), xlabel="epoch")
            panel.xaxis.set_major_locator(
                matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        handles = {label: handle for panel in panels.values() for handle, label
                   in zip(*panel.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2,
                      title=_key_of(groups, grey), fontsize="small" if len(handles) > 6 else None)
        _save(figure, path)


def _best_of_each(groups: List[Group]) -> List[Group]:
    """The groups that have a colour: all, or as many of the best of each subject as there are."""
    most, places, best = MOST_COLOURS, Counter(), []
    if len(groups) > MOST_COLOURS:
        most = max(1, MOST_COLOURS // len({group.subject for group in groups}))
    for group in groups:  # which are sorted by accuracy
        places[group.subject] += 1
        best += [group] if places[group.subject] <= most else []
    return best


def _key_of(groups: List[Group], grey: List[Group]) -> str:
    """What lines mean that are not in the legend."""
    said = []
    if any(group.first.is_of_recipe for group in groups):
        said.append("dashed: published by MoCo v3's authors")
    if any(len(group.runs) > 1 for group in groups):
        said.append("band: ± the deviation over seeds")
    if grey:
        said.append(f"grey: {len(grey)} with lower accuracies")
    return "; ".join(said)


def _draw_curve(panel: Any, group: Group, key: str, labels: Dict[int, str]) -> None:
    epochs, means, deviations = group.curve(key)
    label = labels.get(id(group))
    colour = f"C{list(labels).index(id(group))}" if label else "#cccccc"
    panel.plot(epochs, means, color=colour, label=label, linewidth=1.5 if label else 0.8,
               marker="." if len(epochs) <= 25 else "")
    if label and len(group.runs) > 1:
        panel.fill_between(epochs, [mean - deviation for mean, deviation in zip(means, deviations)],
                           [mean + deviation for mean, deviation in zip(means, deviations)],
                           color=colour, alpha=0.2, linewidth=0)


def _title(key: str, groups: Iterable[Group]) -> str:
    kinds = sorted({group.first.held_out for group in groups})
    kind = " and ".join(("test", "held-out")[held_out] for held_out in kinds).capitalize()
    if key in PANELS:
        return f"{kind} loss" if key == "test_loss" else PANELS[key]
    return _escape(f"{kind} accuracy on {key[9:].partition(', held-out')[0]}, %")


def _labels(groups: List[Group]) -> Dict[int, str]:
    """Each group in the legend, by its id: what varies, and its folder where that does not tell."""
    names = {group.subject: varying_settings([other for other in groups
                                              if other.subject == group.subject])
             for group in groups}
    texts = [", ".join(f"{name.replace('_', ' ').replace('--resume', 'from')} {group.setting(name)}"
                       for name in names[group.subject]) for group in groups]
    labels = {}
    for group, text in zip(groups, texts):
        same = [other for other, its in zip(groups, texts) if its == text
                and other.subject == group.subject]
        if not text or len(same) > 1 or len(text) > 60:
            text = group.first.name[-60:]
        if len(set(other.subject for other in groups)) > 1:
            text = f"{group.subject}: {text}"
        seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        deviation = group.deviation(lambda run: run.last)
        labels[id(group)] = _escape(
            f"{text}{seeds}: last {number(group.mean(lambda run: run.last))}"
            + (f" ± {number(deviation)} %" if deviation is not None else " %"))
    return labels


def draw_matrix(found: Predictions, path: Path) -> None:
    """Write a picture of the confusion matrix: shares of each class's images.

    Names of classes are written for up to MOST_NAMES classes, numbers of images up to MOST_COUNTS.
    Raises ImportError, OSError, ValueError.
    """
    matplotlib, style = _matplotlib()
    count, images = len(found.classes), sum(map(sum, found.counts))
    side = max(8, SIDE * min(count, MOST_NAMES) + 3)
    of_class = [max(1, sum(row)) for row in found.counts]
    shares = [[100 * cell / total for cell in row] for row, total in zip(found.counts, of_class)]
    with style.context({**STYLE, "axes.grid": False, "font.size": 8, "xtick.labelsize": 7,
                        "ytick.labelsize": 7}, after_reset=True):
        figure = matplotlib.figure.Figure(figsize=(side + 1, side))
        panel = figure.subplots()
        drawn = panel.imshow(shares, cmap="Blues", interpolation="nearest",  # shows few errors, too
                             norm=matplotlib.colors.PowerNorm(0.5, 0, 100))
        figure.colorbar(drawn, label="% of the class's images", shrink=0.6)
        panel.set(title=f"Accuracy {found.accuracy:.2f} % on {images} images",
                  xlabel="predicted class", ylabel="class")
        if count <= MOST_NAMES:
            names = [_escape(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME - 1] + "…")
                     for name in found.classes]
            panel.set_xticks(range(count), names, rotation=90)
            panel.set_yticks(range(count), names)
        if count <= MOST_COUNTS:
            for row, counts in enumerate(found.counts):
                for column, cell in enumerate(counts):
                    if cell:
                        panel.text(column, row, cell, ha="center", va="center",
                                   color="white" if shares[row][column] > 30 else "black")
        _save(figure, path)


def _matplotlib() -> tuple:
    os.environ.pop("MPLBACKEND", None)  # nothing is shown on a screen
    warnings.simplefilter("ignore")  # characters without a glyph
    import matplotlib
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.ticker
    from matplotlib import style

    return matplotlib, style


def _escape(text: str) -> str:
    """Keep matplotlib from reading a formula between dollar signs."""
    return text.replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    """Write the file, complete or not at all."""
    # As convert_to_deit.atomic_write, which needs torch. A link's target is replaced.
    path = path.resolve()
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(str(aside), format=path.suffix[1:])
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is gone once renamed
            aside.unlink()
