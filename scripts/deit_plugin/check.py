"""``--check``: after what every launch decides, every image, and one batch through the model."""
import hashlib
import os
from argparse import Namespace
from multiprocessing.pool import ThreadPool
from typing import Any, Callable, Dict, Optional

import numpy
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
        print("output: not checked, --output_dir is missing; the launch needs it")
    if found.decided and not args.eval:
        print(describe(found.decided, images))
    if images:
        splits = {name: split for name, split in images._asdict().items() if split is not None}
        if found.model and not found.problems:
            ask("evaluation", evaluate_a_batch, found.model, images, args)
        ask("images", decode, splits, args.num_workers)
        if images.train is not None:
            ask("classes", images_per_class, images)
            ask("duplicates", duplicates, images, args)
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


def decode(splits: Dict[str, Any], num_workers: int) -> str:
    """Decode every image, in threads. Raises UserError with a list of the broken ones.

    This takes the transforms away from the splits, so it must come after what needs them.
    """
    items = []
    for split in splits.values():
        split.transform = None  # decoding is enough
        items += [(split, index) for index in range(len(split))]
    print(f"decoding {len(items)} images ...", flush=True)
    with ThreadPool(max(1, num_workers)) as pool:
        found = follow(pool.imap(_why_broken, items, chunksize=16), len(items), "image", 1, print)
        broken = list(filter(None, found))
    if broken:
        heading = f"{len(broken)} of {len(items)} cannot be decoded; the first 20:"
        raise UserError("\n           ".join([heading, *broken[:20]]))
    return f"all {len(items)} can be decoded"


def _why_broken(item: Any) -> Optional[str]:
    """One line that names the file, or None. item: a data set and an index."""
    dataset, index = item
    try:
        dataset[index]
    except Exception as error:  # whatever it is, the image cannot be trained on
        return one_line(error)
    return None


def images_per_class(images: Data) -> str:
    """Describe the smallest and the largest class, and name classes with fewer than two images."""
    numbers = numpy.bincount(images.train.targets, minlength=len(images.classes))
    few = [name for name, number in zip(images.classes, numbers) if number < 2]
    least, most = numbers.argmin(), numbers.argmax()
    text = (f"class {images.classes[least]} has {numbers[least]} train images, class "
            f"{images.classes[most]} has {numbers[most]}")
    return f"warning: {text}; fewer than two: {first_five(few)}" if few else text


def duplicates(images: Data, args: Namespace) -> str:
    """Describe which images to evaluate on are also train images, with equal bytes."""
    if not hasattr(images.test, "samples") or not hasattr(images.train, "samples"):
        return "not checked: this data set does not store one file per image"
    train, test = ([path for path, _ in split.samples] for split in (images.train, images.test))
    common = set(map(os.path.getsize, train)) & set(map(os.path.getsize, test))
    of_train = {_digest(path): path for path in train if os.path.getsize(path) in common}
    pairs = [f"{os.path.relpath(path, args.data_path)} = "
             f"{os.path.relpath(of_train[_digest(path)], args.data_path)}" for path in test
             if os.path.getsize(path) in common and _digest(path) in of_train]
    if pairs:
        return (f"warning: {count(len(pairs), 'image')} to evaluate on are also train images, "
                f"which makes the accuracy too high: {first_five(pairs)}")
    return "no image to evaluate on is also a train image"


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.md5(file.read()).digest()
