"""The train and test images of a run."""
from argparse import Namespace
from pathlib import Path
from typing import Any, List, NamedTuple, Tuple

from datasets import DATA_SETS, build_dataset

from . import elsewhere
from .errors import UserError, one_line


class Data(NamedTuple):
    """The images of a run, and what differs from the official data set, in words."""

    train: Any
    test: Any
    differs: Tuple[str, ...]

    @property
    def classes(self) -> List[str]:
        """Names of the classes, by label."""
        return self.train.classes


def load(args: Namespace) -> Data:
    """Build both splits of ``args.data_set``. Raises UserError."""
    splits, differs = [], []
    for number, (is_train, name) in enumerate(((True, "train"), (False, "test"))):
        dataset = _load_split(is_train, args)
        official = DATA_SETS[args.data_set].official
        if official and len(dataset) != official[number]:
            differs.append(f"{len(dataset)} {name} images (published: {official[number]})")
        splits.append(dataset)
    return Data(*splits, tuple(differs))


def _load_split(is_train: bool, args: Namespace) -> Any:
    row, root = DATA_SETS[args.data_set], Path(args.data_path).resolve()
    try:
        for path in row.missing(str(root), is_train)[:1]:
            advice = elsewhere.advice(row.layout, root, path)
            if advice:
                raise UserError(f"{path} is missing; {advice}")
        return build_dataset(is_train, args)[0]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from error
