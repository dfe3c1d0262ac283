"""The settings of a run once its data are known, and how they compare with the published recipe."""
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple

from datasets import DATA_SETS

from .data import Data
from .errors import UserError
from .loaders import steps_per_epoch
from .options import Plan
from .words import count, differing

SIZE = "effective batch size"


class Recipe(NamedTuple):
    """What a run is, and what was published for its data set."""

    settings: Dict[str, Any]
    published: Dict[str, Any]  # empty if nothing was published

    @property
    def differs(self) -> List[str]:
        """The settings that differ from the published ones, in words."""
        return differing(self.settings, self.published, "published")


def compare(args: Namespace, plan: Plan, data: Data) -> Recipe:
    """Raises UserError if the train images do not fill one optimizer step."""
    settings, published = {**plan.settings, "test images": len(data.test)}, {}
    if data.train is not None:
        settings["train images"] = len(data.train)
        settings["steps per epoch"] = _steps(len(data.train), args, plan.accum_iter)
        _require_a_step(settings, args, plan.accum_iter)
    official = DATA_SETS[args.data_set].official
    if official and plan.recipe:
        train_images, test_images = official
        published = {**plan.published, "train images": train_images, "test images": test_images,
                     "steps per epoch": _steps(train_images, plan.recipe, 1)}
    return Recipe(settings, published)


def _steps(images: int, args: Namespace, accum_iter: int) -> int:
    return steps_per_epoch(images, args.world_size * accum_iter, args.batch_size, args.repeated_aug)


def _require_a_step(settings: Dict[str, Any], args: Namespace, accum_iter: int) -> None:
    if not settings["steps per epoch"]:
        whole = " // 256 * 256" if args.repeated_aug else ""
        advice = ", or pass --no-repeated-aug" if args.repeated_aug else ""
        raise UserError(
            f"no whole step in an epoch: {settings['train images']}{whole} train images are fewer "
            f"than {args.world_size} (processes) x {accum_iter} (--accum-iter) x {args.batch_size} "
            f"(--batch-size): lower one of the three{advice}")


def describe_batch(recipe: Recipe, args: Namespace, plan: Plan) -> str:
    """How the effective batch size comes about, and which flags restore the published one."""
    size, steps = recipe.settings[SIZE], recipe.settings["steps per epoch"]
    accumulated = f" x {plan.accum_iter} accumulated" if plan.accum_iter > 1 else ""
    text = (f"{size} = {count(args.world_size, 'process')} x {args.batch_size} images{accumulated}"
            f"; {count(steps, 'step')} per epoch")
    flags = _restoring_flags(recipe, args, plan)
    return f"{text} ({flags} restores the published {plan.published[SIZE]})" if flags else text


def _restoring_flags(recipe: Recipe, args: Namespace, plan: Plan) -> str:
    """Flags with which these processes take the recipe's steps over the official images, or ""."""
    if not recipe.published:
        return ""
    size, steps = recipe.published[SIZE], recipe.published["steps per epoch"]
    for batch_size in (args.batch_size, 128, 64, 32, 16, 8, 4, 2):
        accum_iter, rest = divmod(size, args.world_size * batch_size)
        changed = Namespace(**{**vars(args), "batch_size": batch_size})
        if accum_iter and not rest and steps == _steps(recipe.published["train images"], changed,
                                                       accum_iter):
            flags = [f"--batch-size {batch_size}"] if batch_size != args.batch_size else []
            flags += [f"--accum-iter {accum_iter}"] if accum_iter != plan.accum_iter else []
            return " ".join(flags)
    return ""
