"""The table of runs, a row for each group of seeds, and what has to be known to read it."""
from datetime import timedelta
from typing import List, Optional

from .runs import Group, LoggedRun, varying_settings

COLUMNS = ("data set", "seeds", "epochs", "last %", "± last", "95 % interval", "best %", "± best",
           "per class %", "published %", "vs. published", "training time")
NOTE = ("last and per class (the mean of the classes' accuracies): the last evaluation. best: of "
        "all evaluations, so it was chosen on the images that it is measured on. ±: the standard "
        "deviation over seeds (n - 1). 95 % interval: of last, by Wilson, for that number of "
        "images. published: by MoCo v3's authors, not run here; compared with last in finished "
        "runs of the recipe. training time: of one run, with evaluation.")


def rows_of(groups: List[Group]) -> List[List[str]]:
    """The table: a header, then for each group the settings that vary, COLUMNS and its folders."""
    varying = varying_settings(groups)
    header = [*(name.replace("_", " ") for name in varying), *COLUMNS, "folders"]
    return [header, *([*map(group.setting, varying), *cells(group),
                       ", ".join(run.name for run in group.runs)] for group in groups)]


def cells(group: Group) -> List[str]:
    """A text for each of COLUMNS."""
    run, interval = group.first, group.interval()
    return [group.subject, group.seeds(), f"{run.done} of {run.planned}",
            number(group.mean(lambda run: run.last)), number(group.deviation(lambda run: run.last)),
            "{:.2f}-{:.2f}".format(*interval) if interval else "-",
            number(group.mean(lambda run: run.best)), number(group.deviation(lambda run: run.best)),
            number(group.mean(lambda run: run.per_class)), number(run.published, ".1f"),
            number(group.above_published(), "+.2f"),
            duration(group.mean(lambda run: run.seconds))]


def number(value: Optional[float], form: str = ".2f") -> str:
    """The number as text, "-" for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """As hours, minutes and seconds; "-" if it is not known."""
    return str(timedelta(seconds=round(seconds))) if 0 < seconds < 1e9 else "-"


def as_text(rows: List[List[str]], left: int) -> str:
    """The rows as lines, without columns that say nothing.

    The first ``left`` columns and the last one stand to the left.
    """
    columns = [column for column in zip(*rows) if set(column[1:]) != {"-"}]
    sides = "<" * left + ">" * (len(columns) - left - 1) + "<"
    columns = [[f"{cell:{side}{max(map(len, column))}}" for cell in column]
               for side, column in zip(sides, columns)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


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
