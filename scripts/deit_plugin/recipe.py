"""The settings of a run, complete with its data, beside those of the published recipe."""
import zlib
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional

from datasets import DATA_SETS

from .data import Data, names_of
from .errors import UserError
from .loaders import steps_per_epoch
from .options import Plan, settings_of
from .words import BATCH, HELD_OUT, STEPS, TEST_IMAGES, TRAIN_IMAGES, count, differing

PROCESSES = 8  # of the published recipes: MoCo v3's transfer/README.md


class Comparison(NamedTuple):
    """The settings of a run, and those that were published for its data set."""

    settings: Dict[str, Any]
    published: Optional[Dict[str, Any]]  # None if nothing was published

    @property
    def differs(self) -> Optional[List[str]]:
        """The settings that differ, in words; None if nothing was published."""
        if self.published is None:
            return None
        return differing(self.settings, self.published, "published")


def compare(args: Namespace, plan: Plan, data: Data) -> Comparison:
    """Complete the settings by the numbers of images and steps, and look up the published ones.

    Raises UserError if the train images do not fill one optimizer step.
    """
    settings, published = {**plan.settings, TEST_IMAGES: len(data.test)}, None
    if args.hold_out:
        images = list(zip(names_of(data.test, args.data_path), data.test.targets))
        settings[HELD_OUT] = f"{zlib.crc32(repr(images).encode()):08x}"
    if data.train is not None:
        settings[TRAIN_IMAGES] = len(data.train)
        settings[STEPS] = _steps(len(data.train), args, plan.accum_iter)
        _require_a_step(settings, args, plan.accum_iter)
    official = DATA_SETS[args.data_set].official
    if official and plan.recipe_args:
        # No seed was published, so any seed is the recipe's.
        recipe_args = Namespace(**{**vars(plan.recipe_args), "world_size": PROCESSES,
                                   "seed": args.seed})
        published = {**settings_of(recipe_args, 1, {}), TRAIN_IMAGES: official[0],
                     TEST_IMAGES: official[1], STEPS: _steps(official[0], recipe_args, 1)}
    return Comparison(settings, published)


def _steps(images: int, args: Namespace, accum_iter: int) -> int:
    return steps_per_epoch(images, args.world_size * accum_iter, args.batch_size, args.repeated_aug)


def _require_a_step(settings: Dict[str, Any], args: Namespace, accum_iter: int) -> None:
    if not settings[STEPS]:
        whole = " // 256 * 256" if args.repeated_aug else ""
        advice = ", or pass --no-repeated-aug" if args.repeated_aug else ""
        raise UserError(
            f"no whole step in an epoch: {settings[TRAIN_IMAGES]}{whole} train images are fewer "
            f"than {args.world_size} (processes) x {accum_iter} (--accum-iter) x {args.batch_size} "
            f"(--batch-size): lower one of the three{advice}")


def describe_batch(found: Comparison, args: Namespace, plan: Plan) -> str:
    """The factors of the effective batch size, and the flags that restore the published one."""
    accumulated = f" x {plan.accum_iter} accumulated" if plan.accum_iter > 1 else ""
    text = (f"{found.settings[BATCH]} = {count(args.world_size, 'process')} x {args.batch_size} "
            f"images{accumulated}; {count(found.settings[STEPS], 'step')} per epoch")
    flags = _restoring_flags(found, args, plan)
    return f"{text} ({flags} restores the published {found.published[BATCH]})" if flags else text


def _restoring_flags(found: Comparison, args: Namespace, plan: Plan) -> str:
    """Flags with which these processes take the recipe's steps over the official images, or "".

    For example "--batch-size 128 --accum-iter 4" for 2 processes with --batch-size 8.
    """
    if not found.published or found.published[TRAIN_IMAGES] != found.settings[TRAIN_IMAGES]:
        return ""
    for batch_size in (args.batch_size, 128, 64, 32, 16, 8, 4, 2):
        accum_iter, rest = divmod(found.published[BATCH], args.world_size * batch_size)
        changed = Namespace(**{**vars(args), "batch_size": batch_size})
        if accum_iter and not rest and found.published[STEPS] == _steps(
                found.published[TRAIN_IMAGES], changed, accum_iter):
            flags = [f"--batch-size {batch_size}"] if batch_size != args.batch_size else []
            flags += [f"--accum-iter {accum_iter}"] if accum_iter != plan.accum_iter else []
            return " ".join(flags)
    return ""
