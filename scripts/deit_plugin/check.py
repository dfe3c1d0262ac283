"""``--check``: everything that a launch needs, and every image, without training."""
import hashlib
import os
from argparse import Namespace
from multiprocessing.pool import ThreadPool
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Tuple

import numpy
from torch.utils.data import DataLoader

from datasets import first_five

from . import data, gpus, loaders, output
from .errors import REFUSED, UserError, one_line
from .options import Plan
from .progress import follow
from .run import Run
from .words import count


def check(main: ModuleType, args: Namespace, plan: Plan) -> int:
    """Run all checks, skipping those that depend on a failed one; return the exit status."""
    problems, folder = [], output.RunFolder(args.output_dir)

    def ask(what: str, question: Callable, *arguments: Any) -> Any:
        """Print the answer. A tuple is (answer to print, value to return)."""
        try:
            answer = question(*arguments)
        except UserError as error:
            problems.append(what)
            print(f"PROBLEM  {what}: {error}", flush=True)
            return None
        text, value = answer if isinstance(answer, tuple) else (answer, answer)
        ok = "" if text.startswith(("not checked", "warning")) else "ok       "
        print(f"{ok}{what}: {text}", flush=True)
        return value

    ask("GPUs", gpus.describe, args.device, int(os.environ.get("NPROC_PER_NODE") or 1), False)
    if args.output_dir and not args.eval:
        ask("output", folder.check)
    elif not args.eval:
        print("output: not checked, --output_dir is missing; the launch needs it")
    start = ask("start", _find_start, args, plan)
    images = ask("data", _load, args)
    if images and start:
        run = ask("model", _create_model, main, args, plan, images, folder, start)
        if run and not args.eval:
            print(run.narrator.describe())
    if images:
        splits = {name: split for name, split in images._asdict().items() if split is not None}
        ask("data worker", fetch_a_batch, images.test, args)
        ask("images", decode, splits, args.num_workers)
        if images.train is not None:
            ask("classes", images_per_class, images)
            ask("duplicates", duplicates, images, args)
    print(f"not ready: {count(len(problems), 'problem')}" if problems else "ready")
    return REFUSED if problems else 0


def _find_start(args: Namespace, plan: Plan) -> Tuple[str, output.Start]:
    start = output.find_start(args, plan)
    return start.path, start


def _load(args: Namespace) -> Tuple[str, data.Data]:
    images = data.load(args)
    return data.describe(images, args), images


def _create_model(main: ModuleType, args: Namespace, plan: Plan, images: data.Data,
                  folder: output.RunFolder, start: output.Start) -> Tuple[str, Run]:
    run = Run(main, args, plan, images, folder, start)
    model = run.create_model(args.model, num_classes=len(images.classes), drop_rate=args.drop,
                             drop_path_rate=args.drop_path)
    run.create_optimizer(args, model)
    return f"{args.model} takes the weights", run


def fetch_a_batch(images: Any, args: Namespace) -> str:
    """Start a data worker as training does, and have it hand over a batch."""
    loader = DataLoader(images, args.batch_size, num_workers=min(args.num_workers, 1))
    try:
        next(iter(loaders.evaluation(loader, args)))
    except OSError:  # the next check names the image
        return "not checked: an image cannot be read"
    return "hands over a batch"


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


def _why_broken(item: Tuple[Any, int]) -> Optional[str]:
    """One line that names the file, or None."""
    dataset, index = item
    try:
        dataset[index]
    except Exception as error:  # whatever it is, the image cannot be trained on
        return one_line(error)
    return None


def images_per_class(images: data.Data) -> str:
    """Describe the smallest and the largest class, and name classes with fewer than two images."""
    numbers = numpy.bincount(images.train.targets, minlength=len(images.classes))
    few = [name for name, number in zip(images.classes, numbers) if number < 2]
    least, most = numbers.argmin(), numbers.argmax()
    text = (f"class {images.classes[least]} has {numbers[least]} train images, class "
            f"{images.classes[most]} has {numbers[most]}")
    return f"warning: {text}; fewer than two: {first_five(few)}" if few else text


def duplicates(images: data.Data, args: Namespace) -> str:
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
