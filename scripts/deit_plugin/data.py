"""The train images of a run, and the images that it evaluates on."""
import copy
import os
import pickle
import re
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy

from datasets import (
    DATA_SETS,
    ClassFolders,
    DataSet,
    build_dataset,
    build_transform,
    first_five,
    split_of,
)

from .errors import UserError, one_line

FILE = "data.pickle"
# Settings that the data give.
TRAIN_IMAGES, TEST_IMAGES = "train images", "test images"
TRAIN_DATA = "checksum of the names and labels of the train images"
TEST_DATA = "checksum of the names and labels of the images to evaluate on"


class Data(NamedTuple):
    """The images of a run."""

    train: Optional[Any]  # None under --eval
    # To evaluate on: test images, or with --hold-out a part of the train images. None with
    # --eval-freq 0.
    test: Optional[Any]

    @property
    def classes(self) -> List[str]:
        """Names of the classes, by label."""
        return (self.test or self.train).classes


def must_download(args: Namespace) -> bool:
    """Whether images are missing that this launch is to download first."""
    row = DATA_SETS[args.data_set]
    try:
        root = Path(args.data_path).resolve()
        missing = [path for is_train in _splits(args) if row.downloads(args)
                   for path in row.missing(str(root), split_of(is_train, args))]
        return bool(missing) and not where_else(row, root, missing[0])
    except (OSError, ValueError, RuntimeError):  # load says what is wrong
        return False


def download(args: Namespace) -> None:
    """Download what is missing. Raises UserError."""
    for is_train in _splits(args):
        _load_split(is_train, args)


def _splits(args: Namespace) -> Tuple[bool, ...]:
    """Which images a run needs: True for those of the train split, False for the others."""
    if args.eval:
        return (bool(args.hold_out),)
    return (True,) if args.hold_out or not args.eval_freq else (True, False)


def load(args: Namespace) -> Data:
    """Build the images that a run of ``args.data_set`` needs. Raises UserError."""
    _require_transforms(args)
    if args.hold_out:
        train, test = split(_load_split(True, args), args.hold_out, build_transform(False, args))
    else:
        needed = {is_train: _load_split(is_train, args) for is_train in _splits(args)}
        train, test = needed.get(True), needed.get(False)
    return Data(None if args.eval else train, test)


def write(data: Data, folder: str) -> None:
    """Write the data sets into the folder of a launch, so that no worker lists images again."""
    with open(os.path.join(folder, FILE), "wb") as file:
        pickle.dump(tuple(data), file, protocol=pickle.HIGHEST_PROTOCOL)


def read(folder: str) -> Data:
    """Read what ``write`` has written."""
    with open(os.path.join(folder, FILE), "rb") as file:
        return Data(*pickle.load(file))


def _require_transforms(args: Namespace) -> None:
    """Raise UserError if timm cannot make the transforms from the arguments that they read."""
    try:
        for is_train in (True, False):
            build_transform(is_train, args)
    except Exception as error:  # timm raises almost anything
        flags = [f"--{name} {getattr(args, name.replace('-', '_'))}" for name in
                 ("aa", "color-jitter", "train-interpolation", "reprob", "recount", "input-size")]
        raise UserError(f"timm cannot make a transform from {', '.join(flags)}: "
                        f"{type(error).__name__} {one_line(error)}; pass DeiT's defaults"
                        ) from error


def _load_split(is_train: bool, args: Namespace) -> Any:
    row = DATA_SETS[args.data_set]
    try:
        root = Path(args.data_path).resolve()
        missing = row.missing(str(root), split_of(is_train, args))
        advice = where_else(row, root, missing[0]) if missing else ""
        is_val_of_photos = args.data_set == "folder" and not is_train and not args.eval
        if missing and not advice and is_val_of_photos and (root / "train").is_dir():
            advice = ("pass --hold-out 0.2 to evaluate on a part of train/, or --eval-freq 0 to "
                      "train on all of it and evaluate nothing")
        if missing and not advice and not row.downloads(args) and args.eval and args.hold_out:
            advice = (f"--hold-out {args.hold_out}, as in the checkpoint's run, evaluates on train "
                      "images: pass --hold-out 0 to evaluate on test images")
        is_of_folders = args.data_set in ("folder", "imagenet")
        if missing and not advice and not is_of_folders and any(root.glob("train/*/*")):
            advice = "it has train/CLASS/, so pass --data-set folder"
        if advice:
            raise UserError(f"{missing[0]} is missing; {advice}")
        return build_dataset(is_train, args)[0]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from error


def where_else(row: DataSet, root: Path, missing: str) -> str:
    """What to pass or rename if the data lie one folder up or down; "" if they do not.

    missing: a path below ``root`` that does not exist.
    """
    if root.is_file():
        return f"{root} is a file: pass a folder"
    if root == root.parent:  # /
        return ""
    absent = [pattern for pattern in row.layout if not any(root.glob(pattern))]
    below = sorted(path for path in root.glob("*")
                   if path.is_dir() and os.access(path, os.R_OK | os.X_OK))
    for folder in (root.parent, *below) if absent else ():
        if all(any(folder.glob(pattern)) for pattern in row.layout):
            return f"it is in {folder}: pass --data-path {folder}"
    renames = []
    for wanted in absent or [os.path.relpath(missing, root)]:
        found = sorted(path for folder in (root, *below) for path in folder.glob(_loose(wanted)))
        if not found or any(root.glob(wanted)):  # it has appeared: another process downloads
            return ""
        place = found[0].with_name("*" + found[0].suffix) if "*" in wanted else found[0]
        its_top, top = place.relative_to(root).parts[0], Path(wanted).parts[0]
        if its_top != top and its_top.lower() == top.lower():  # Train/ instead of train/
            place, wanted = root / its_top, top
        renames.append(f"{place} to {root / wanted}")
    return f"move or rename {', '.join(renames)}"


def _loose(pattern: str) -> str:
    """The pattern for upper and lower case, and for .jpg also another ending of images."""
    loose = re.sub("[a-zA-Z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return loose.replace(".[jJ][pP][gG]", ".[jJpPwW]*")


def names_of(dataset: Any, root: str) -> List[Any]:
    """The images' paths relative to ``root``, or for CIFAR their indices."""
    if hasattr(dataset, "samples"):
        start = os.path.join(os.path.abspath(root), "")  # relpath would take 10 s for ImageNet
        return [path[len(start):] if path.startswith(start) else os.path.relpath(path, start)
                for path, _ in dataset.samples]
    return list(getattr(dataset, "indices", range(len(dataset))))


def checksum(dataset: Any, root: str) -> str:
    """Of the images' names and labels, in their order, and of the names of the classes."""
    content = repr((dataset.classes, names_of(dataset, root), list(map(int, dataset.targets))))
    return f"{zlib.crc32(content.encode('utf-8', 'surrogateescape')):08x}"


# --hold-out: evaluates on a part of the train images, so that test images choose nothing.


def split(dataset: Any, share: float, transform: Callable) -> Tuple[Any, Any]:
    """Divide train images into those to train on and ``share`` of each class to evaluate on.

    Both parts are copies of the data set with fewer images, and have at least one image of each
    class. The division depends only on the labels and the share. ``transform`` is for evaluation.
    Raises UserError if a class has a single image, or for a data set that cannot be divided.
    """
    if not hasattr(dataset, "samples") and not hasattr(dataset, "data"):
        raise UserError(f"--hold-out {share}: cannot divide a data set that has neither samples "
                        "nor data; leave --hold-out out")
    random, kept, held_out = numpy.random.RandomState(0), [], []
    targets = numpy.asarray(dataset.targets)  # once, since a list takes long to compare
    for label, name in enumerate(dataset.classes):
        indices = random.permutation(numpy.flatnonzero(targets == label))
        if len(indices) == 1:
            raise UserError(f"--hold-out {share}: class {name} has only one train image; add "
                            "another one or remove the class")
        number = max(1, round(share * len(indices)))
        number = min(number, len(indices) - 1) if len(indices) else 0
        held_out += indices[:number].tolist()
        kept += indices[number:].tolist()
    return (_part(dataset, sorted(kept), dataset.transform),
            _part(dataset, sorted(held_out), transform))


def _part(dataset: Any, indices: List[int], transform: Callable) -> Any:
    part = copy.copy(dataset)
    part.transform, part.indices = transform, indices
    for name in ("samples", "targets"):
        if hasattr(dataset, name):
            setattr(part, name, [getattr(dataset, name)[index] for index in indices])
    if hasattr(dataset, "data"):  # CIFAR's pixels
        part.data = dataset.data[indices]
    return part


# In words


def count(number: int, what: str) -> str:
    """'1 process', '2 processes'."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def nested_in_words(dataset: Any) -> str:
    """Which class folders have folders in them, whose images are used, too; "" if none has."""
    nested = {os.path.relpath(os.path.dirname(path), dataset.root) for path, _ in dataset.samples}
    nested = sorted(folder for folder in nested if os.sep in folder)
    return (f"images of a folder in a class folder belong to that class: {first_five(nested)}"
            if nested else "")


def kind_of_accuracy(args: Namespace) -> str:
    """The name of the accuracies of this run."""
    return "held-out accuracy" if args.hold_out else "test accuracy"


def describe(data: Data, args: Namespace) -> str:
    """The numbers of images and classes, in words."""
    kind = "held-out" if args.hold_out else "test"
    if data.test is None:
        return f"{len(data.train)} train images, {count(len(data.classes), 'class')}"
    text = f"{len(data.test)} {kind} images, {count(len(data.classes), 'class')}"
    return text if data.train is None else f"{len(data.train)} train and {text}"


def evaluated_on(data: Data, args: Namespace) -> str:
    """The images to evaluate on, in words."""
    if data.test is None:
        return "nothing"
    text = count(len(data.test), "held-out image" if args.hold_out else "image")
    if isinstance(data.test, ClassFolders):
        text += f" of {data.test.root}"
    return text
