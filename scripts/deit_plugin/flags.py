"""The flags of a launch, DeiT's and this bundle's: one table, and the parser that reads them.

``args``, wherever it occurs in this package, has all flags by name, as ``complete`` returns them:
with ``world_size``, the number of processes on all machines. Nothing changes it.
"""
import argparse
import difflib
import os
import re
import shlex
import warnings
from argparse import Namespace
from types import ModuleType
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from datasets import DATA_SETS

from .errors import UserError

YOUR_FLAGS = "--your-flags"  # stands between a recipe's flags and the user's
# What the published recipes have in common; their other flags stand in scripts/*.sh. Source: MoCo
# v3's transfer/README.md. Accuracy in %, from there and from MoCo v3's README.md.
PROCESSES, BATCH_SIZE = 8, 128
ACCURACIES = {"cifar10": 98.9, "cifar100": 90.5, "flowers": 97.7, "pets": 93.2, "imagenet": 83.2}

# Roles of flags:
LEARNT = "learnt"  # decides what is learnt: a setting
BATCHED = "batched"  # counts through the effective batch size, which is a setting
SHARED = "shared"  # no setting, but the same on all machines
LOCAL = "local"  # may differ between machines
# What of a checkpoint a setting must agree with:
WEIGHTS = "weights"  # its weights
STATE = "state"  # its optimizer and EMA
ACCURACY = "accuracy"  # the accuracies of its epochs

LARGEST, FINITE = 2**31 - 1, 1e38  # NumPy's seeds end at 2**32 - 1, float32 at 3e38


def _mixes(args: Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _has_three_augment(args: Namespace) -> bool:
    return getattr(args, "ThreeAugment", False)  # DeiT HEAD then replaces the train transform


# What a flag can need to have an effect, and what is said if it is not so.
NEEDS = {
    "mixing": (_mixes, "without --mixup or --cutmix"),
    "EMA": (lambda args: args.model_ema, "with --no-model-ema"),
    "steps": (lambda args: args.sched == "step", "with --sched cosine or tanh"),
    "noise": (lambda args: args.lr_noise, "without --lr-noise"),
    "erasing": (lambda args: args.reprob > 0, "with --reprob 0"),
    "ThreeAugment": (_has_three_augment, "without --ThreeAugment"),
    "no aa": (lambda args: not args.aa or "3a" in args.aa or _has_three_augment(args), "with --aa"),
    "no ThreeAugment": (lambda args: not _has_three_augment(args), "with --ThreeAugment"),
    "another bundle": (lambda args: False, "in this bundle"),
    "data set": (),  # that reads it: see without_effect
}


class Flag(NamedTuple):
    """What a flag means in this bundle. A flag that is not in FLAGS has these defaults."""

    role: str = LEARNT
    least: Optional[float] = None  # the range that DeiT, timm and torch can work with
    most: float = LARGEST
    agrees: str = ""  # what of a checkpoint it must agree with, when a run goes on elsewhere
    inherited: bool = False  # --eval takes it from the checkpoint, unless the user gives it
    needs: Tuple[str, ...] = ()  # keys of NEEDS; or "data set": one whose row names the flag


FLAGS = {
    # Data and model. A setting that changes the transform for evaluation must be inherited.
    "data_set": Flag(agrees=ACCURACY, inherited=True),
    "hold_out": Flag(LEARNT, 0, 0.99, ACCURACY, inherited=True),
    "model": Flag(agrees=WEIGHTS, inherited=True),
    "input_size": Flag(LEARNT, 16, agrees=WEIGHTS, inherited=True),
    "eval_crop_ratio": Flag(LEARNT, 0.1, 1, inherited=True, needs=("data set",)),
    "test_split": Flag(SHARED, needs=("data set",)),
    # Batches, epochs, and the learning rate.
    "batch_size": Flag(BATCHED, 1), "accum_iter": Flag(BATCHED, 1),
    "world_size": Flag(BATCHED, needs=("another bundle",)),
    "epochs": Flag(LEARNT, 1), "seed": Flag(LEARNT, 0),
    "lr": Flag(LEARNT, 0, FINITE), "min_lr": Flag(LEARNT, 0, FINITE),
    "warmup_lr": Flag(LEARNT, 0, FINITE),
    "decay_epochs": Flag(LEARNT, 1, needs=("steps",)),
    "decay_rate": Flag(LEARNT, 0, 1, needs=("steps",)),
    "lr_noise_pct": Flag(needs=("noise",)), "lr_noise_std": Flag(needs=("noise",)),
    # Optimizer and regularisation.
    "opt": Flag(agrees=STATE), "opt_betas": Flag(agrees=STATE), "opt_eps": Flag(agrees=STATE),
    "momentum": Flag(agrees=STATE), "weight_decay": Flag(LEARNT, 0, FINITE, STATE),
    "layer_decay": Flag(LEARNT, 0.01, 1, STATE),
    "drop": Flag(LEARNT, 0, 1), "drop_path": Flag(LEARNT, 0, 1), "smoothing": Flag(LEARNT, 0, 1),
    "model_ema": Flag(agrees=STATE), "model_ema_decay": Flag(LEARNT, 0, 1, needs=("EMA",)),
    "model_ema_force_cpu": Flag(needs=("EMA",)),
    # Augmentation.
    "mixup": Flag(LEARNT, 0, FINITE), "cutmix": Flag(LEARNT, 0, FINITE),
    "mixup_prob": Flag(LEARNT, 0, 1, needs=("mixing",)),
    "mixup_switch_prob": Flag(LEARNT, 0, 1, needs=("mixing",)),
    "mixup_mode": Flag(needs=("mixing",)),
    "aa": Flag(needs=("data set", "no ThreeAugment")),
    "train_interpolation": Flag(needs=("data set", "no ThreeAugment")),
    "color_jitter": Flag(needs=("data set", "no aa")),
    "reprob": Flag(LEARNT, 0, 1, needs=("no ThreeAugment",)),
    "remode": Flag(needs=("no ThreeAugment", "erasing")),
    "recount": Flag(needs=("no ThreeAugment", "erasing")),
    "src": Flag(needs=("ThreeAugment",)),
    # What DeiT has and a run here never uses.
    **dict.fromkeys(("resplit", "inat_category", "dist_eval", "distributed", "teacher_model",
                     "teacher_path", "distillation_alpha", "distillation_tau", "cooldown_epochs",
                     "patience_epochs"), Flag(needs=("another bundle",))),
    # What a launch does, and where.
    "eval": Flag(SHARED), "device": Flag(SHARED), "download": Flag(SHARED),
    "overwrite": Flag(SHARED), "start_epoch": Flag(SHARED),
    "eval_freq": Flag(SHARED, 0), "save_freq": Flag(SHARED, 1),
    "num_workers": Flag(LOCAL, 0), "pin_mem": Flag(LOCAL), "dist_url": Flag(LOCAL),
    "resume": Flag(LOCAL), "data_path": Flag(LOCAL), "output_dir": Flag(LOCAL),
    "predictions": Flag(LOCAL), "trust": Flag(LOCAL), "verbose": Flag(LOCAL),
    "check": Flag(LOCAL), "dry_run": Flag(LOCAL), "rank": Flag(LOCAL),
}


def about(name: str) -> Flag:
    """The row of a flag."""
    return FLAGS.get(name, Flag())


def with_role(args: Namespace, *roles: str) -> Dict[str, Any]:
    """The arguments with these roles, by name."""
    return {name: value for name, value in vars(args).items() if about(name).role in roles}


def flag_of(name: str) -> str:
    """The flag of an argument as DeiT spells it."""
    as_it_is = ("num_workers", "output_dir", "start_epoch", "world_size", "dist_url")
    return "--" + (name if name in as_it_is else name.replace("_", "-"))


class Parser(argparse.ArgumentParser):
    """argparse, but raises UserError with the flag that was probably meant."""

    def error(self, message: str) -> None:
        """Raise UserError."""
        words = message.partition("unrecognized arguments: ")[2].split(" ")
        known = [*self._option_string_actions, "--help"]
        near = [match for word in words if word.startswith("--")
                for match in difflib.get_close_matches(word.partition("=")[0], known, 1, 0.7)]
        hint = f"did you mean {' and '.join(near)}?" if near else "--all-flags lists the flags"
        if words[0] and not words[0].startswith("-"):
            hint = "put names with blanks in quotes"
        raise UserError(f"{message}; {hint}")


def parser_for(main: ModuleType) -> Parser:
    """The parser of DeiT's flags, as the commit of ``main`` has them, and of ours."""
    parser = Parser(prog="finetune.py", parents=[main.get_args_parser()], allow_abbrev=False,
                    conflict_handler="resolve", description="Fine-tune with DeiT's own trainer.")
    parser.set_defaults(data_path="", batch_size=BATCH_SIZE)
    parser.add_argument("--data-set", choices=sorted(DATA_SETS))
    for name, choices in (("--device", ("cuda", "cpu")), ("--sched", ("cosine", "tanh", "step")),
                          ("--remode", ("pixel", "rand", "const")),
                          ("--mixup-mode", ("batch", "pair", "elem"))):
        parser.add_argument(name, choices=choices, default=choices[0])
    ours = parser.add_argument_group("added by this bundle")
    for name, text in (
            ("--accum-iter", "accumulate N batches per process for one optimizer step"),
            ("--eval-freq", "evaluate every N epochs and after the last; with 0 never, to train on "
                            "all images in the end"),
            ("--save-freq", "write checkpoint.pth every N epochs, after the last, and whenever the "
                            "accuracy is the best so far")):
        ours.add_argument(name, type=int, default=1, metavar="N", help=text + " (default: 1)")
    ours.add_argument("--hold-out", type=float, default=0.0, metavar="SHARE",
                      help="evaluate on this share of the train images, such as 0.2, and train on "
                           "the others; test images are not used")
    ours.add_argument("--layer-decay", type=float, metavar="RATE",
                      help="multiply the learning rate by this, such as 0.75, for each layer below "
                           "the last (timm 0.6 or newer)")
    ours.add_argument("--predictions", default="", metavar="FILE",
                      help="with --eval: write a CSV file with the prediction for each image")
    for name, text in (
            ("--overwrite", "start from scratch and delete the run that is in --output_dir"),
            ("--download", "download Flowers or Pets if they are missing (CIFAR always is)"),
            ("--check", "check everything a launch needs, and every image; train nothing"),
            ("--dry-run", "print torch's command and every flag, and stop"),
            ("--verbose", "also print the lines of DeiT's engine"),
            ("--test-split", "with --eval: evaluate on test/ of folders that also have a val/"),
            ("--trust", "load checkpoints that contain more than tensors and plain values, as "
                        "torch did before it had weights_only; this runs the code in them")):
        ours.add_argument(name, action="store_true", help=text)
    ours.add_argument("--all-flags", action="help", help="list all flags")
    return parser


class Given(NamedTuple):
    """A command line."""

    args: Namespace
    recipe_args: Optional[Namespace]  # the recipe's own; None if no recipe launched this
    yours: List[str]  # the words that the user added to the recipe


def parse(parser: Parser, words: List[str]) -> Given:
    """Parse `RECIPE'S FLAGS --your-flags USER'S FLAGS`. Raises UserError."""
    split = words.index(YOUR_FLAGS) if YOUR_FLAGS in words else 0
    of_recipe, yours = words[:split], [word for word in words[split:] if word != YOUR_FLAGS]
    recipe_args = parser.parse_args(of_recipe) if split else None
    return Given(_expand(parser.parse_args(of_recipe + yours)), recipe_args, yours)


def inherit(parser: Parser, given: Given, settings: Dict[str, Any]) -> Given:
    """For --eval: take what is inherited from the settings of a checkpoint's run."""
    inherited = {name: value for name, value in settings.items() if about(name).inherited}
    if given.args.test_split:  # test/ has no held-out part
        inherited["hold_out"] = 0.0
    base = vars(given.recipe_args) if given.recipe_args else {}
    args = parser.parse_args(given.yours, Namespace(**{**base, **inherited}))
    return given._replace(args=_expand(args))


def _expand(args: Namespace) -> Namespace:
    for name in ("resume", "output_dir", "data_path", "predictions"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    return args


def complete(args: Namespace, world_size: int) -> Namespace:
    """``args`` for that many processes on all machines, without a --pin-mem that cannot work."""
    import torch

    pin_mem = args.pin_mem and args.device != "cpu"  # where torch would warn that it has no effect
    if pin_mem and not hasattr(torch, "inference_mode"):  # which torch 1.9 introduced
        # Older: the pinning thread ends after persistent workers' first epoch.
        warnings.warn("--pin-mem has no effect: it needs torch 1.9 or newer", stacklevel=1)
        pin_mem = False
    return Namespace(**{**vars(args), "world_size": world_size, "pin_mem": pin_mem})


def command(given: Given) -> str:
    """The script and the user's flags, to be typed again."""
    its = given.recipe_args
    return shlex.join([f"scripts/{its.data_set}.sh" if its else "scripts/finetune.py",
                       *given.yours])


def all_words(parser: Parser, args: Namespace) -> List[str]:
    """A command line that means ``args``, with every flag."""
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, "")  # --help has none
        if action.nargs == 0 and value == action.const:  # --eval, --no-pin-mem
            words.append(action.option_strings[-1])
        elif action.nargs != 0 and value not in (None, ""):
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [action.option_strings[0], *map(str, values)]
    return words


def problems(parser: Parser, given: Given) -> List[str]:
    """What DeiT, timm or torch would misuse or crash on, each in one line."""
    args = given.args
    found = [*_out_of_range(args), *_not_supported(args),
             *(message for wrong, message in _combinations(args) if wrong)]
    if args.data_set:
        unused = without_effect(args)
        found += [f"{flag_of(name)} has no effect {unused[name]}: leave it out"
                  for name in sorted(_names_in(parser, given.yours) & unused.keys())
                  if not any(text.startswith(flag_of(name)) for text in found)]
    return found


def without_effect(args: Namespace) -> Dict[str, str]:
    """The names of arguments that change nothing here, each with the reason."""
    read = DATA_SETS[args.data_set].flags + (("color_jitter",) * _has_three_augment(args))
    reasons = {}
    for name in vars(args):
        for need in about(name).needs:
            if need == "data set":
                is_met, reason = name in read, f"on --data-set {args.data_set}"
            else:
                is_met, reason = NEEDS[need][0](args), NEEDS[need][1]
            if not is_met:
                reasons[name] = reason
    return reasons


def _names_in(parser: Parser, words: List[str]) -> Set[str]:
    """The names of the arguments that occur in ``words``."""
    unset = object()
    blank = Namespace(**{action.dest: unset for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(words, blank)).items()
            if value is not unset}


def _out_of_range(args: Namespace) -> Iterator[str]:
    for name, value in vars(args).items():
        flag = about(name)
        if None not in (flag.least, value) and not flag.least <= value <= flag.most:  # nan, too
            limits = f"{flag.least} or more" if flag.most > 1 else f"{flag.least} to {flag.most}"
            yield f"{flag_of(name)} {value}: must be {limits}"


def _not_supported(args: Namespace) -> Iterator[str]:
    for name, unused in (("start_epoch", 0), ("finetune", ""), ("distillation_type", "none")):
        value = getattr(args, name, unused)
        if value != unused:
            yield (f"{flag_of(name)} {value} is not supported: pass the converted checkpoint, or "
                   "the checkpoint of a run to continue, to --resume")


def implied_input_size(model: str) -> int:
    """The input size in a model's name, such as vit_base_patch16_384, or else 224."""
    found = re.search(r"_(\d{3})(?=[_.]|$)", model)
    return int(found[1]) if found else 224


def _combinations(args: Namespace) -> Iterator[Tuple[bool, str]]:
    """What several flags together make wrong: whether they do, and what to say."""
    minmax, size = args.cutmix_minmax or (0, 1), implied_input_size(args.model)
    yield not args.data_set, "--data-set is missing: pass pets, folder or another one"
    yield not args.data_path, "--data-path is missing: pass the folder of the data set"
    yield (not args.output_dir and not (args.eval or args.check),
           "--output_dir is missing: pass the folder for checkpoints and log.txt")
    yield bool(args.predictions) and not args.eval, "--predictions: needs --eval"
    yield args.test_split and not args.eval, (
        "--test-split: needs --eval; training evaluates on val/, so that nothing is chosen on the "
        "test images")
    yield args.test_split and args.hold_out > 0, (
        "--test-split: evaluates on test/, but --hold-out on train images: leave one out")
    yield args.eval_freq == 0 and args.hold_out > 0, (
        "--eval-freq 0: evaluates nothing, but --hold-out keeps images for it: leave one out")
    yield args.resume.startswith(("http:", "https:")), (
        f"--resume {args.resume}: download it first, with wget, and pass the file")
    yield args.input_size == 224 != size, (
        f"--model {args.model} is made for images of {size} pixels: pass --input-size {size}")
    yield args.input_size % 16 > 0, (
        f"--input-size {args.input_size}: must be a multiple of 16, the patch size")
    yield bool(args.opt_betas) and len(args.opt_betas) != 2, (
        f"--opt-betas {args.opt_betas}: takes two numbers, such as 0.9 0.999")
    yield "adahessian" in args.opt.lower(), (
        f"--opt {args.opt}: needs second derivatives, which DistributedDataParallel cannot "
        "compute; the recipes use adamw")
    yield _mixes(args) and args.batch_size % 2 > 0 and not args.eval, (
        f"--batch-size {args.batch_size}: must be even with --mixup or --cutmix")
    yield len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= 1, (
        "--cutmix-minmax: takes two numbers from 0 to 1, the smaller first, as 0.2 0.8")
    yield getattr(args, "cosub", False), "--cosub: needs models and losses of its own: leave it out"
    yield getattr(args, "bce_loss", False) and (not _mixes(args) or args.smoothing > 0), (
        "--bce-loss: needs --mixup or --cutmix, and --smoothing 0: DeiT turns every target above 0 "
        "into 1")
