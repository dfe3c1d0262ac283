"""The table of runs, a row for each group of seeds, and what has to be known to read it."""
import operator
from datetime import timedelta
from typing import List, Optional

from .runs import Group, LoggedRun, varying_settings

COLUMNS = ("data set", "images", "seeds", "epochs", "last %", "± last", "95 % from", "95 % to",
           "best %", "± best", "per class %", "published %", "vs. published", "training time")
# What columns mean, if they are there.
NOTES = {
    "images": "images: to evaluate on",
    "last %": "last: the last evaluation",
    "± last": "±: the standard deviation over seeds (n - 1)",
    "95 % from": "95 % from, to: Wilson's interval of last, by the number of images; rows whose "
                 "intervals overlap may not differ",
    "best %": "best: of all evaluations, so it was chosen on the images that it is measured on",
    "per class %": "per class: the mean of the classes' accuracies",
    "published %": "published: by MoCo v3's authors, not run here; compared with last in finished "
                   "runs of the recipe",
    "training time": "training time: of one run, with evaluation"}


def rows_of(groups: List[Group]) -> List[List[str]]:
    """The table: a header, then for each group the settings that vary, COLUMNS and its folders."""
    varying = varying_settings(groups)
    header = [*(name.replace("_", " ").replace(" of the names and labels", "") for name in varying),
              *COLUMNS, "folders"]
    return [header, *([*map(group.setting, varying), *cells(group),
                       ", ".join(run.name for run in group.runs)] for group in groups)]


def cells(group: Group) -> List[str]:
    """A text for each of COLUMNS."""
    run, last, best = group.first, operator.attrgetter("last"), operator.attrgetter("best")
    return [group.subject, group.setting("test images"), group.seeds(),
            f"{run.done} of {run.planned}", number(group.mean(last)), number(group.deviation(last)),
            *map(number, group.interval() or (None, None)),
            number(group.mean(best)), number(group.deviation(best)),
            number(group.mean(operator.attrgetter("per_class"))),
            number(run.published if run.is_of_recipe else None, ".1f"),
            number(group.above_published(), "+.2f"),
            duration(group.mean(operator.attrgetter("seconds")))]


def number(value: Optional[float], form: str = ".2f") -> str:
    """The number as text, "-" for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """As hours, minutes and seconds; "-" if it is not known."""
    return str(timedelta(seconds=round(seconds))) if 0 < seconds < 1e9 else "-"


def as_text(rows: List[List[str]], left: int) -> str:
    """The rows as lines. The first ``left`` columns and the last one stand to the left."""
    columns = list(zip(*rows))
    sides = "<" * left + ">" * (len(columns) - left - 1) + "<"
    columns = [[f"{cell:{side}{max(map(len, column))}}" for cell in column]
               for side, column in zip(sides, columns)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def without_empty(rows: List[List[str]]) -> List[List[str]]:
    """The rows without columns that say nothing."""
    return list(zip(*(column for column in zip(*rows) if set(column[1:]) != {"-"})))


def meaning_of(header: List[str]) -> str:
    """What the columns mean."""
    return "\n".join(note for name, note in NOTES.items() if name in header)


def notes_on(runs: List[LoggedRun]) -> List[str]:
    """What keeps runs from being compared: with published figures, or among seeds."""
    notes = {}
    for run in runs:
        if run.not_comparable and (run.published or run.has_facts and not run.held_out
                                   and run.data_set != "folder"):
            notes.setdefault(f"not compared with MoCo v3's figure, since {run.not_comparable}", []
                             ).append(run.name)
        if run.continues_another:
            notes.setdefault("not counted among seeds, since it continues another run", []
                             ).append(run.name)
        if run.repeated:
            notes.setdefault("log.txt repeats epochs; what came last counts", []).append(run.name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]
