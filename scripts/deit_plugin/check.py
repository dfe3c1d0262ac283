"""``--check``: everything that a launch needs, and every image, without training."""
from argparse import Namespace
from multiprocessing.pool import ThreadPool
from types import ModuleType
from typing import Any, Callable, List, Optional, Tuple

from . import data, options, output
from .errors import REFUSED, UserError, one_line
from .options import Plan
from .run import Run
from .words import count


def check(main: ModuleType, args: Namespace, plan: Plan) -> int:
    """Run all checks, skipping those that depend on a failed one; return the exit status."""
    problems = []

    def ask(what: str, question: Callable, *arguments: Any) -> Any:
        """Print the answer. A tuple is (answer to print, value to return)."""
        try:
            answer = question(*arguments)
            text, value = answer if isinstance(answer, tuple) else (answer, answer)
            print(f"ok       {what}: {text}", flush=True)
            return value
        except UserError as error:
            problems.append(what)
            print(f"PROBLEM  {what}: {error}", flush=True)
            return None

    folder = output.RunFolder(args.output_dir)
    ask("GPUs", options.check_gpus, args, plan)
    if args.output_dir and not args.eval:
        ask("output", folder.check)
    start = ask("start", _find_start, args, plan)
    images = ask("data", _load, args)
    if images and start:
        run = ask("model", _create_model, main, args, plan, images, folder, start)
        if run and not args.eval:
            print(run.describe())
    if images:
        ask("images", decode, images, args.num_workers)
    print(f"not ready: {count(len(problems), 'problem')}" if problems else "ready")
    return REFUSED if problems else 0


def _find_start(args: Namespace, plan: Plan) -> Tuple[str, output.Start]:
    start = output.find_start(args, plan)
    return start.path, start


def _load(args: Namespace) -> Tuple[str, data.Data]:
    images = data.load(args)
    sizes = " and ".join(f"{len(split)} {name}" for name, split in _splits(images))
    return f"{sizes} images", images


def _splits(images: data.Data) -> List[Tuple[str, Any]]:
    return [(name, split) for name, split in images._asdict().items() if split is not None]


def _create_model(main: ModuleType, args: Namespace, plan: Plan, images: data.Data,
                  folder: output.RunFolder, start: output.Start) -> Tuple[str, Run]:
    run = Run(main, args, plan, images, folder, start)
    model = run.create_model(args.model, num_classes=len(images.classes), drop_rate=args.drop,
                             drop_path_rate=args.drop_path)
    run.create_optimizer(args, model)
    return f"{args.model} takes the weights", run


def decode(images: data.Data, num_workers: int) -> str:
    """Decode every image, in threads. Raises UserError with a list of the broken ones."""
    items = []
    for _, split in _splits(images):
        split.transform = None  # decoding is enough
        items += [(split, index) for index in range(len(split))]
    print(f"decoding {len(items)} images ...", flush=True)
    with ThreadPool(max(1, num_workers)) as pool:
        broken = list(filter(None, pool.map(_why_broken, items)))
    if broken:
        heading = f"{len(broken)} of {len(items)} cannot be decoded; 20 at most are named:"
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
