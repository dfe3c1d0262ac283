"""The train and test images of a run."""
from argparse import Namespace
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

from datasets import DATA_SETS, build_dataset

from . import elsewhere
from .errors import UserError, one_line


class Data(NamedTuple):
    """The images of a run."""

    train: Optional[Any]  # None under --eval
    test: Any

    @property
    def classes(self) -> List[str]:
        """Names of the classes, by label."""
        return (self.test if self.train is None else self.train).classes


def load(args: Namespace) -> Data:
    """Build what a run of ``args.data_set`` needs. Raises UserError."""
    return Data(None if args.eval else _load_split(True, args), _load_split(False, args))


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
