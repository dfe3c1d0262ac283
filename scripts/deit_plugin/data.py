"""The train images of a run, and the images that it evaluates on."""
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

from datasets import DATA_SETS, ClassFolders, build_dataset, build_transform, split_of

from . import elsewhere, hold_out
from .errors import UserError, one_line
from .words import count, flag_of


class Data(NamedTuple):
    """The images of a run."""

    train: Optional[Any]  # None under --eval
    test: Any  # to evaluate on: test images, or with --hold-out a part of the train images

    @property
    def classes(self) -> List[str]:
        """Names of the classes, by label."""
        return self.test.classes


def load(args: Namespace) -> Data:
    """Build the images that a run of ``args.data_set`` needs. Raises UserError."""
    _require_transforms(args)
    if args.hold_out:
        train, test = hold_out.split(_load_split(True, args), args.hold_out,
                                     build_transform(False, args))
    else:
        train = None if args.eval else _load_split(True, args)
        test = _load_split(False, args)
    return Data(None if args.eval else train, test)


def _require_transforms(args: Namespace) -> None:
    """Raise UserError if timm cannot make the transforms from the arguments that they read."""
    try:
        for is_train in (True, False):
            build_transform(is_train, args)
    except Exception as error:  # timm raises almost anything
        flags = [f"{flag_of(name)} {getattr(args, name)}" for name in
                 ("aa", "color_jitter", "train_interpolation", "reprob", "recount", "input_size")]
        raise UserError(f"timm cannot make a transform from {', '.join(flags)}: "
                        f"{type(error).__name__} {one_line(error)}; pass DeiT's defaults"
                        ) from error


def _load_split(is_train: bool, args: Namespace) -> Any:
    row, root = DATA_SETS[args.data_set], Path(args.data_path).resolve()
    try:
        missing = row.missing(str(root), split_of(is_train, args))
        advice = elsewhere.advice(row.layout, root, missing[0]) if missing else ""
        if missing and not advice and not row.downloads(args) and args.eval and args.hold_out:
            advice = (f"--hold-out {args.hold_out}, as in the checkpoint's run, evaluates on train "
                      "images: pass --hold-out 0 to evaluate on test images")
        if advice:
            raise UserError(f"{missing[0]} is missing; {advice}")
        return build_dataset(is_train, args)[0]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from error


def names_of(dataset: Any, root: str) -> List[Any]:
    """The images' paths relative to ``root``, or for CIFAR their indices."""
    if hasattr(dataset, "samples"):
        return [os.path.relpath(path, os.path.abspath(root)) for path, _ in dataset.samples]
    return list(getattr(dataset, "indices", range(len(dataset))))


def kind_of_accuracy(args: Namespace) -> str:
    """The name of the accuracies of this run."""
    return "held-out accuracy" if args.hold_out else "test accuracy"


def describe(data: Data, args: Namespace) -> str:
    """The numbers of images and classes, in words."""
    kind = "held-out" if args.hold_out else "test"
    text = f"{len(data.test)} {kind} images, {count(len(data.classes), 'class')}"
    return text if data.train is None else f"{len(data.train)} train and {text}"


def evaluated_on(data: Data, args: Namespace) -> str:
    """The images to evaluate on, in words."""
    text = count(len(data.test), "held-out image" if args.hold_out else "image")
    if isinstance(data.test, ClassFolders):
        text += f" of {data.test.root}"
    return text
