"""What a launch was decided to do: finetune.py makes a Job and writes it, workers train it.

Also: the settings of a run beside others, in words, and beside those of the published recipe.
"""
import json
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from datasets import DATA_SETS, first_five, telling_apart

from . import flags, provenance
from .data import TEST_DATA, TEST_IMAGES, TRAIN_DATA, TRAIN_IMAGES, Data, checksum
from .errors import UserError
from .flags import BATCHED, LEARNT, PROCESSES, SHARED, Given, flag_of

# Settings that no flag gives. Their names have blanks, which tells them from names of arguments.
BATCH, STEPS = "effective batch size", "steps per epoch"
FILE = "job.json"


class Start(NamedTuple):
    """What a run starts from: a checkpoint, and what is known of the epochs before."""

    path: str
    mark: List[int]  # the file's size and time of change, by which workers know it again
    continues: bool  # whether it is --output_dir's own; then all settings must match
    epoch: int  # the first epoch to train, from 0; more than 0 if a run is resumed
    has_head: bool
    parent: Optional[Dict[str, str]]  # the checkpoint of another run that this run was resumed from
    origin: Dict[str, Any]  # the pretrained file that training began with
    rows: List[Dict[str, Any]]  # of log.txt, for the epochs before
    best: Optional[Dict[str, Any]]  # epoch, acc1, and the path of the checkpoint that has it
    launches: List[Dict[str, Any]]  # earlier ones, if it continues


class Job(NamedTuple):
    """Everything that a run depends on, but for the images. It can be written as JSON."""

    args: Namespace  # see flags.py; in a worker also with its rank
    settings: Dict[str, Any]  # what decides what is learnt: arguments, and facts about the data
    published: Optional[Dict[str, Any]]  # the recipe's settings; None if there is no recipe
    changed: Optional[List[str]]  # settings since the parent's run, in words; None without parent
    classes: List[str]  # by label
    start: Start
    launch: Dict[str, Any]  # facts about this launch for run.json

    @property
    def differs(self) -> Optional[List[str]]:
        """The settings that differ from the published recipe, in words; None if there is none."""
        if self.published is None:
            return None
        published = dict(self.published)
        if self.args.data_set == "flowers" and self.settings.get("reprob") == 0:
            # MoCo v3's code ignores the flag, so its figure was most likely reached without it.
            del published["reprob"]
        return differing(self.settings, published, "published")

    @property
    def published_accuracy(self) -> Optional[float]:
        """What MoCo v3's authors report on these test images, in %."""
        return None if self.args.hold_out else flags.ACCURACIES.get(self.args.data_set)

    @property
    def not_comparable(self) -> Optional[str]:
        """Why the run's accuracy may not be compared with the published one; None if it may."""
        if self.published_accuracy is None:
            return "nothing was published for it"
        if self.start.parent:
            return "it continues another run"
        if not self.start.origin["is_moco_v3"]:
            return "it began with other weights than MoCo v3's pretrained ones"
        if self.differs is None:
            return "no recipe launched it"
        if self.differs:
            return f"it differs from the recipe: {first_five(self.differs)}"
        return None


def write(job: Job, folder: str) -> None:
    """Write a job into the folder of a launch."""
    Path(folder, FILE).write_text(json.dumps({**job._asdict(), "args": vars(job.args),
                                      "start": job.start._asdict()}))


def read(folder: str, rank: int) -> Job:
    """Read a job for the worker of that rank."""
    content = json.loads(Path(folder, FILE).read_text())
    args = Namespace(**content["args"], rank=rank)
    return Job(**{**content, "args": args, "start": Start(**content["start"])})


def for_deit(job: Job) -> Namespace:
    """The arguments that DeiT's main gets.

    Without ``output_dir`` DeiT writes nothing: class Run does. DeiT scales the learning rate by
    the number of processes and the batch size, but knows nothing of accumulation.
    """
    args = job.args
    scale = 1 if getattr(args, "unscale_lr", False) else args.accum_iter
    changed = {"output_dir": "", "resume": "", "start_epoch": job.start.epoch,
               "lr": args.lr * scale}
    return Namespace(**{**vars(args), **changed})


def shared(job: Job) -> Dict[str, Any]:
    """What must be the same on all machines of a run, by name."""
    return {**flags.with_role(job.args, LEARNT, BATCHED, SHARED), **job.settings,
            **provenance.decisive(job.launch),
            "first epoch": job.start.epoch + 1,
            "checksum of the pretrained file": job.start.origin["crc32"],
            "checksum of the run to continue": (job.start.parent or {}).get("crc32")}


# Settings


def settings_of(args: Namespace, data: Data) -> Dict[str, Any]:
    """The settings of a run. Raises UserError if the images do not fill one optimizer step."""
    settings = _learnt(args)
    if data.test is not None:
        settings.update({TEST_IMAGES: len(data.test),
                         TEST_DATA: checksum(data.test, args.data_path)})
    if data.train is not None:
        settings.update({TRAIN_IMAGES: len(data.train), STEPS: _steps(len(data.train), args),
                         TRAIN_DATA: checksum(data.train, args.data_path)})
        _require_a_step(settings, args)
    return settings


def published_settings(given: Given) -> Optional[Dict[str, Any]]:
    """The settings of the recipe that launched the run, on the official images, or None."""
    official = DATA_SETS[given.args.data_set].official
    if not official or not given.recipe_args:
        return None
    # No seed was published, so any seed is the recipe's.
    args = Namespace(**{**vars(given.recipe_args), "world_size": PROCESSES,
                        "seed": given.args.seed})
    return {**_learnt(args), TRAIN_IMAGES: official[0], TEST_IMAGES: official[1],
            STEPS: _steps(official[0], args)}


def _learnt(args: Namespace) -> Dict[str, Any]:
    unused = flags.without_effect(args)
    learnt = {name: value for name, value in flags.with_role(args, LEARNT).items()
              if name not in unused}
    return {**learnt, BATCH: args.world_size * args.batch_size * args.accum_iter}


def _steps(images: int, args: Namespace) -> int:
    """Optimizer steps of an epoch, without partial batches, as in DeiT."""
    virtual_ranks = args.world_size * args.accum_iter
    if args.repeated_aug:  # RASampler in DeiT's samplers.py
        return images // 256 * 256 // virtual_ranks // args.batch_size
    return -(-images // virtual_ranks) // args.batch_size


def _require_a_step(settings: Dict[str, Any], args: Namespace) -> None:
    if not settings[STEPS]:
        whole = " // 256 * 256" if args.repeated_aug else ""
        advice = ", or pass --no-repeated-aug" if args.repeated_aug else ""
        raise UserError(
            f"no whole step in an epoch: {settings[TRAIN_IMAGES]}{whole} train images are fewer "
            f"than {args.world_size} (processes) x {args.accum_iter} (--accum-iter) x "
            f"{args.batch_size} (--batch-size): lower one of the three{advice}")


# In words


def differing(settings: Dict[str, Any], others: Dict[str, Any], whose: str) -> List[str]:
    """What differs from the other settings, each as '--flag value (whose: other value)'.

    Only names in both are compared: DeiT's commits have different flags.
    """
    return [f"{_in_words(name, settings)} ({whose}: {other})"
            for name, other in others.items() if name in settings and settings[name] != other]


def _in_words(name: str, settings: Dict[str, Any]) -> str:
    value = settings[name]
    if name == TEST_IMAGES and settings.get("hold_out"):
        return f"{value} held-out images"
    if name in (STEPS, TRAIN_IMAGES, TEST_IMAGES):
        return f"{value} {name}"  # 2040 train images
    return f"{name if ' ' in name else flag_of(name)} {value}"


def unequal(own: List[str], others: List[str], here: str, there: str) -> str:
    """What differs between two lists of class names."""
    parts = [f"only {where}: {first_five(telling_apart(names, own + others))}" for where, names in (
        (here, sorted(set(own) - set(others))), (there, sorted(set(others) - set(own)))) if names]
    return "; ".join(parts) or "the same names in another order"
