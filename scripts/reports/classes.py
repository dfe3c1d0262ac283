"""What a model takes the images of each class for, from a table of predictions."""
import csv
from collections import Counter
from pathlib import Path
from typing import List, NamedTuple

HEADER = ["class", "images", "accuracy %", "most frequent wrong answer", "times"]
NEEDED = {"image", "label", "predicted"}  # columns, as deit_plugin/evaluation.py writes them


class Predictions(NamedTuple):
    """How often the images of a class were taken for another one."""

    classes: List[str]  # all that occur, sorted
    counts: List[List[int]]  # images, by their class and by the predicted one

    @property
    def accuracy(self) -> float:
        """In percent, over all images."""
        right = sum(row[index] for index, row in enumerate(self.counts))
        return 100 * right / sum(map(sum, self.counts))


def read(path: Path) -> Predictions:
    """Read a CSV file as --predictions writes it. Raises OSError, or ValueError if it is not one.

    It is read as text: classes can be called None, NA or 001.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not NEEDED.issubset(rows.fieldnames or ()):
            raise ValueError("it has no columns image, label, predicted")
        pairs = Counter((row["label"], row["predicted"]) for row in rows)
    if not pairs or any(None in pair for pair in pairs):
        raise ValueError("it has no rows, or a row is incomplete")
    classes = sorted({name for pair in pairs for name in pair}, key=_in_order)
    return Predictions(classes, [[pairs[label, predicted] for predicted in classes]
                                 for label in classes])


def _in_order(name: str) -> tuple:
    """Sorts numbers, as Flowers' classes are, by value."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def rows_of(found: Predictions) -> List[List[str]]:
    """A header and a row for each class that has images, the least accurate first."""
    rows = []
    for index, (name, counts) in enumerate(zip(found.classes, found.counts)):
        images = sum(counts)
        wrong = [*counts[:index], 0, *counts[index + 1:]]
        most = max(wrong)
        answer = [found.classes[wrong.index(most)], str(most)] if most else ["-", "0"]
        if images:
            rows.append((100 * counts[index] / images, name, str(images), answer))
    return [HEADER, *([name, images, f"{accuracy:.2f}", *answer]
                      for accuracy, name, images, answer in sorted(rows, key=lambda row: row[0]))]
