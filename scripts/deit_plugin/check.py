"""``--check``: after what every launch decides, every image, and one batch through the model."""
import copy
import hashlib
import os
from argparse import Namespace
from multiprocessing.pool import ThreadPool
from typing import Any, Callable, List, Optional, Tuple

import numpy
from PIL import Image
from torch.utils.data import DataLoader

from datasets import first_five

from . import evaluation, loaders
from .data import Data, count
from .errors import REFUSED, UserError, one_line
from .narrator import describe, follow


def check(found: Any) -> int:
    """Report what was decided, and check the images; return the exit status.

    found: a Decision of finetune.py.
    """
    problems = list(found.problems)
    for text in problems:
        print(f"PROBLEM  {text}", flush=True)

    def ask(what: str, question: Callable, *arguments: Any) -> None:
        """Print the answer."""
        try:
            text = question(*arguments)
        except UserError as error:
            problems.append(what)
            print(f"PROBLEM  {what}: {error}", flush=True)
        else:
            ok = "" if text.startswith(("not checked", "warning")) else "ok       "
            print(f"{ok}{what}: {text}", flush=True)

    args, images = found.args, found.data
    if found.gpus:
        ask("GPUs", str, found.gpus)
    if not args.output_dir and not args.eval:
        print("not checked: --output_dir, which is not given")
    if found.decided and not args.eval:
        print(describe(found.decided, images))
    if images:
        if found.model and images.test and not found.problems:
            ask("evaluation", evaluate_a_batch, found.model, images, args)
        looked_at = Images(images, args)
        ask("images", looked_at.decode)
        if looked_at.dark:
            ask("brightness", looked_at.brightness)
        if images.train is not None:
            ask("classes", images_per_class, images)
            ask("duplicates", looked_at.duplicates)
    print(f"not ready: {count(len(problems), 'problem')}" if problems else "ready")
    return REFUSED if problems else 0


def evaluate_a_batch(model: Any, images: Data, args: Namespace) -> str:
    """Have a data worker fetch four images, as training does, and the model classify them."""
    loader = DataLoader(images.test, 4, **loaders.in_workers(min(args.num_workers, 1)))
    try:
        batch = next(iter(loader))
    except OSError:  # the next check names the image
        return "not checked: an image cannot be read"
    except RuntimeError as error:
        raise UserError(f"--input-size {args.input_size}: images of --data-set {args.data_set} "
                        f"make no batch: {one_line(error)}; pass --input-size 224") from error
    evaluation.evaluate(model, [batch], "cpu", len(images.classes))
    return "a data worker hands over a batch, and the model classifies it"


class Images:
    """All images of a launch, decoded once, in threads."""

    def __init__(self, images: Data, args: Namespace) -> None:
        self.args, self.dark = args, []
        self.splits = {name: copy.copy(split) for name, split in images._asdict().items()
                       if split is not None}
        for split in self.splits.values():
            split.transform = None  # decoding is enough
        self.places = {}  # of each image: (split, label, path), by checksum of the pixels

    def decode(self) -> str:
        """Decode every image. Raises UserError with a list of the broken ones."""
        items = [(name, index) for name, split in self.splits.items()
                 for index in range(len(split))]
        print(f"decoding {len(items)} images ...", flush=True)
        with ThreadPool(max(1, self.args.num_workers)) as pool:
            found = follow(pool.imap(self._look_at, items, chunksize=16), len(items), "image", 1,
                           print)
            broken = list(filter(None, found))
        if broken:
            only = "; the first 20" if len(broken) > 20 else ""
            heading = f"{len(broken)} of {len(items)} cannot be decoded{only}:"
            raise UserError("\n           ".join([heading, *broken[:20]]))
        return f"all {len(items)} can be decoded"

    def _look_at(self, item: Tuple[str, int]) -> Optional[str]:
        """One line that names the file if it is broken, or None."""
        name, index = item
        split = self.splits[name]
        try:
            image, label = split[index]
            if hasattr(split, "samples"):
                path, _ = split.samples[index]
                pixels = hashlib.md5(repr(image.size).encode() + image.tobytes()).digest()
                self.places.setdefault(pixels, []).append((name, label, path))
                with Image.open(path) as file:
                    if file.mode.startswith("I") and numpy.asarray(file).max() < 2**14:
                        self.dark.append(path)
        except Exception as error:  # whatever it is, the image cannot be trained on
            return one_line(error)
        return None

    def brightness(self) -> str:
        """Describe which images of 16 bits have numbers of 14 bits or fewer, nearly black."""
        names = [os.path.relpath(path, self.args.data_path) for path in sorted(self.dark)]
        return (f"warning: {count(len(names), 'image')} of 16 bits with numbers below {2**14}, as "
                "from a camera of 12 bits, will be nearly black: convert to 8 bits first: "
                f"{first_five(names)}")

    def duplicates(self) -> str:
        """Describe which images, by their pixels, are in two classes, or in train and test."""
        if not all(hasattr(split, "samples") for split in self.splits.values()):
            return "not checked: this data set does not store one file per image"
        repeated = [sorted(places) for places in self.places.values() if len(places) > 1]
        leaked = [places for places in repeated if len({split for split, _, _ in places}) > 1]
        unclear = [places for places in repeated if len({label for _, label, _ in places}) > 1]
        warnings = [f"{count(len(found), 'image')} {what}: {first_five(map(self._names, found))}"
                    for found, what in (
                        (leaked, "both to train and to evaluate on, which makes the accuracy too "
                                 "high"), (unclear, "in more than one class")) if found]
        if warnings:
            return f"warning: {'; '.join(warnings)}"
        return "no image is in two classes, or both to train and to evaluate on"

    def _names(self, places: List[Tuple[str, int, str]]) -> str:
        return " = ".join(os.path.relpath(path, self.args.data_path) for _, _, path in places)


def images_per_class(images: Data) -> str:
    """Describe the smallest and the largest class, and name classes with fewer than two images."""
    numbers = numpy.bincount(images.train.targets, minlength=len(images.classes))
    few = [name for name, number in zip(images.classes, numbers) if number < 2]
    least, most = numbers.argmin(), numbers.argmax()
    text = f"each class has {numbers[least]} train images"
    if numbers[least] < numbers[most]:
        text = (f"class {images.classes[least]} has {numbers[least]} train images, class "
                f"{images.classes[most]} has {numbers[most]}")
    return f"warning: {text}; fewer than two: {first_five(few)}" if few else text
