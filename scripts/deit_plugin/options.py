"""DeiT's command line with this bundle's flags, and what differs from the published recipe."""
import argparse
import difflib
import os
import shlex
import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch

from . import weights
from .errors import UserError
from .words import flag_of

YOUR_FLAGS = "--your-flags"  # launch.sh puts it between the recipe's flags and the user's
PUBLISHED_PROCESSES = 8  # MoCo v3's transfer/README.md
# Flags that do not change what is learnt. All others that have an effect make up the settings.
NOT_SETTINGS = {
    "output_dir", "data_path", "resume", "device", "num_workers", "pin_mem", "dist_url", "rank",
    "world_size", "start_epoch", "batch_size", "eval", "download", "test_split"}
# Of these, a machine may have other values than the other machines of its run.
OF_ONE_MACHINE = {"output_dir", "data_path", "num_workers", "pin_mem", "dist_url", "rank"}

LARGEST, FINITE = 2**31 - 1, 1e38  # NumPy's seeds end at 2**32 - 1, float32 at 3e38
RANGES = {  # lowest and highest number that DeiT, timm and torch can work with
    (1, LARGEST): ("epochs", "batch_size", "accum_iter", "eval_freq", "save_freq"),
    (16, LARGEST): ("input_size",),
    (0, LARGEST): ("num_workers", "seed"),
    (0, FINITE): ("lr", "min_lr", "warmup_lr", "weight_decay", "mixup", "cutmix"),
    (0, 1): ("drop", "drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob",
             "model_ema_decay", "hold_out"),
}
OF_EVALUATION = ("model", "input_size", "data_set", "hold_out", "eval_crop_ratio")


class Plan(NamedTuple):
    """What this bundle adds to DeiT's args. Nothing changes it after ``parse``."""

    pretrained: str  # path of the checkpoint given by --resume; DeiT does not get to see it
    accum_iter: int  # batches per process for one optimizer step
    eval_freq: int  # epochs between evaluations
    save_freq: int  # epochs between writes of checkpoint.pth
    overwrite: bool  # delete the run in --output_dir first
    check: bool
    verbose: bool  # also print DeiT's own lines
    predictions: str  # path of the CSV file that --eval writes, or ""
    trust: bool  # load checkpoints that can run code
    command: str  # as typed
    settings: Dict[str, Any]  # what decides what is learnt
    recipe: Optional[argparse.Namespace]  # the published args, with their number of processes
    published: Dict[str, Any]  # the settings of the recipe


class Parser(argparse.ArgumentParser):
    """argparse, but raises UserError with the flag that was probably meant."""

    def error(self, message: str) -> None:
        """Raise UserError, which is reported once and not by every process."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        flags = [*self._option_string_actions, "--dry-run", "--all-flags"]  # launch.sh's, too
        near = difflib.get_close_matches(unknown, flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--all-flags lists the flags"
        raise UserError(f"{message}; {hint}")


def parse(main: Any, data_sets: Dict[str, Any], arguments: List[str]
          ) -> Tuple[argparse.Namespace, Plan]:
    """DeiT's args and this bundle's plan, for the recipe's flags, YOUR_FLAGS, the user's flags.

    main: DeiT's module; data_sets: datasets.DATA_SETS. The args contain DeiT's flags as they were
    typed, the flags that datasets.py and data.py read, and ``rank`` and ``world_size``. Nothing
    changes them later; DeiT gets a copy. Under --eval, OF_EVALUATION comes from the checkpoint
    unless the user gives it.
    """
    parser = _parser(main, data_sets)
    split = arguments.index(YOUR_FLAGS) if YOUR_FLAGS in arguments else 0
    recipe = parser.parse_args(arguments[:split]) if split else None
    yours = [word for word in arguments[split:] if word != YOUR_FLAGS]
    args = parser.parse_args(arguments[:split] + yours)
    if args.eval and args.resume:
        its = weights.read(os.path.expanduser(args.resume), args.trust).get("settings", {})
        base = vars(recipe) if recipe else {}
        inherited = {name: its[name] for name in OF_EVALUATION if name in its}
        args = parser.parse_args(yours, argparse.Namespace(**{**base, **inherited}))
        args.hold_out *= not args.test_split  # test/ has no held-out part
    for name in ("resume", "output_dir", "data_path", "predictions"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.rank = int(os.environ.get("RANK") or 0)  # as DeiT's main does later
    args.world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if args.pin_mem and not hasattr(torch, "inference_mode"):  # which torch 1.9 introduced
        args.pin_mem = False  # its thread would end before a second epoch of the same workers
        warnings.warn("--pin-mem has no effect: it takes torch 1.9 or newer", stacklevel=1)
    _refuse_what_cannot_work(args)
    without_effect = _without_effect(args, data_sets[args.data_set].flags)
    for name in sorted(_given(parser, yours) & without_effect.keys()):
        raise UserError(f"{flag_of(name)} has no effect {without_effect[name]}: leave it out")
    settings, published = _settings(args, without_effect), {}
    if recipe:
        recipe.world_size, recipe.seed = PUBLISHED_PROCESSES, args.seed  # no seed was published
        published = _settings(recipe, {})
    ours = {name: vars(args).pop(name) for name in Plan._fields if hasattr(args, name)}
    pretrained, args.resume = args.resume, ""
    script = f"{recipe.data_set}.sh" if recipe else "finetune.py"
    return args, Plan(pretrained=pretrained, command=shlex.join([f"scripts/{script}", *yours]),
                      settings=settings, recipe=recipe, published=published, **ours)


def _parser(main: Any, data_sets: Dict[str, Any]) -> Parser:
    parser = Parser(prog="finetune.py", parents=[main.get_args_parser()], allow_abbrev=False,
                    conflict_handler="resolve", description="Fine-tune with DeiT's own trainer.")
    parser.set_defaults(data_path="")
    parser.add_argument("--data-set", choices=sorted(data_sets))
    for name, choices in (("--device", ("cuda", "cpu")), ("--sched", ("cosine", "tanh", "step")),
                          ("--remode", ("pixel", "rand", "const")),
                          ("--mixup-mode", ("batch", "pair", "elem"))):
        parser.add_argument(name, choices=choices, default=choices[0])
    ours = parser.add_argument_group("added by this bundle")
    for name, text in (("--accum-iter", "accumulate N batches per process for one optimizer step"),
                       ("--eval-freq", "evaluate every N epochs and after the last"),
                       ("--save-freq", "write checkpoint.pth every N epochs and after the last")):
        ours.add_argument(name, type=int, default=1, metavar="N", help=text + " (default: 1)")
    ours.add_argument("--hold-out", type=float, default=0.0, metavar="SHARE",
                      help="evaluate on this share of the train images, such as 0.2, and train on "
                           "the others; test images are not used")
    ours.add_argument("--predictions", default="", metavar="FILE",
                      help="with --eval: write a CSV file with the prediction for each image")
    for name, text in (
            ("--overwrite", "start from scratch and delete the run that is in --output_dir"),
            ("--download", "download Flowers or Pets if they are missing (CIFAR always is)"),
            ("--check", "check everything a launch needs, and every image; train nothing"),
            ("--verbose", "also print DeiT's own lines"),
            ("--test-split", "with --eval: evaluate on test/ of folders that also have a val/"),
            ("--trust", "load checkpoints that contain more than tensors and plain values, as "
                        "torch did before it had weights_only; this runs the code in them")):
        ours.add_argument(name, action="store_true", help=text)
    return parser


def _given(parser: Parser, words: List[str]) -> Set[str]:
    """The names of the arguments that occur in ``words``."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(words, blank)).items()
            if value is not unset}


def _refuse_what_cannot_work(args: argparse.Namespace) -> None:
    """Refuse what DeiT, timm or torch would silently misuse or end in a traceback."""
    for (least, most), names in RANGES.items():
        limits = f"{least} or more" if most > 1 else f"{least} to {most}"
        for name in names:
            value = getattr(args, name, least)
            if not least <= value <= most:  # true for nan, too
                raise UserError(f"{flag_of(name)} {value}: must be {limits}")
    for flag, unused in (("--start_epoch", 0), ("--finetune", ""), ("--distillation-type", "none")):
        value = vars(args).get(flag[2:].replace("-", "_"), unused)
        if value != unused:
            raise UserError(f"{flag} {value} is not supported: pass the converted checkpoint, or "
                            "the checkpoint of a run to continue, to --resume")
    minmax = args.cutmix_minmax or (0, 1)
    size_in_name = weights.size_in_name(args.model)
    for wrong, message in (
            (not args.data_set, "--data-set is missing: pass pets, folder or another one"),
            (not args.data_path, "--data-path is missing: pass the folder of the data set"),
            (not args.output_dir and not (args.eval or args.check),
             "--output_dir is missing: pass the folder for checkpoints and log.txt"),
            (args.hold_out == 1, "--hold-out 1.0: leaves nothing to train on; pass 0.2, say"),
            (args.predictions and not args.eval, "--predictions: needs --eval"),
            (args.test_split and not args.eval, "--test-split: needs --eval; training evaluates on "
             "val/, so that test/ chooses nothing"),
            (args.resume.startswith(("http:", "https:")),
             f"--resume {args.resume}: download it first, with wget, and pass the file"),
            (size_in_name not in (None, "224") and args.input_size == 224,
             f"--model {args.model} is made for images of {size_in_name} pixels: pass --input-size "
             f"{size_in_name}"),
            (args.opt_betas and len(args.opt_betas) != 2,
             f"--opt-betas {args.opt_betas}: takes two numbers, such as 0.9 0.999"),
            (args.opt.startswith("ada") and "hess" in args.opt,
             f"--opt {args.opt}: takes second derivatives, which several processes cannot compute; "
             "the recipes use adamw"),
            (args.input_size % 16,
             f"--input-size {args.input_size}: must be a multiple of 16, the patch size"),
            (_mixes(args) and args.batch_size % 2,
             f"--batch-size {args.batch_size}: must be even with --mixup or --cutmix"),
            (len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= 1,
             "--cutmix-minmax: takes two numbers from 0 to 1, the smaller first, as 0.2 0.8"),
            (getattr(args, "bce_loss", False) and (not _mixes(args) or args.smoothing),
             "--bce-loss: needs --mixup or --cutmix, and --smoothing 0: DeiT turns every target "
             "above 0 into 1")):
        if wrong:
            raise UserError(message)


def _mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _without_effect(args: argparse.Namespace, of_data_set: Tuple[str, ...]) -> Dict[str, str]:
    """The names of arguments that change nothing here, and the reason.

    of_data_set: those that this data set reads, of those that not all data sets read.
    """
    three = getattr(args, "ThreeAugment", False)  # then DeiT HEAD makes the train transform
    of_some = ("aa", "color_jitter", "train_interpolation", "eval_crop_ratio", "test_split")
    groups = (  # names, whether they have an effect, the reason why not
        (("resplit", "inat_category", "dist_eval", "distributed", "world_size", "teacher_model",
          "teacher_path", "distillation_alpha", "distillation_tau", "cooldown_epochs",
          "patience_epochs"), False, "in this bundle"),
        (set(of_some) - set(of_data_set) - ({"color_jitter"} if three else set()), False,
         f"on --data-set {args.data_set}"),
        (("aa", "train_interpolation", "reprob", "remode", "recount"), not three,
         "with --ThreeAugment"),
        (("src",), three, "without --ThreeAugment"),
        (("remode", "recount"), args.reprob > 0, "with --reprob 0"),
        (("mixup_prob", "mixup_switch_prob", "mixup_mode"), _mixes(args),
         "without --mixup or --cutmix"),
        (("model_ema_decay", "model_ema_force_cpu"), args.model_ema, "with --no-model-ema"),
        (("decay_epochs", "decay_rate"), args.sched == "step", f"with --sched {args.sched}"),
        (("lr_noise_pct", "lr_noise_std"), args.lr_noise, "without --lr-noise"),
    )
    return {name: reason for names, has_effect, reason in groups if not has_effect
            for name in names}


def _settings(args: argparse.Namespace, without_effect: Dict[str, str]) -> Dict[str, Any]:
    left_out = {*NOT_SETTINGS, *Plan._fields, *without_effect}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings["effective batch size"] = args.world_size * args.batch_size * args.accum_iter
    return settings


def shared(args: argparse.Namespace, plan: Plan) -> Dict[str, Any]:
    """What must be the same on all machines of a run, by name."""
    of_plan = {name: value for name, value in plan._asdict().items()
               if isinstance(value, int)}  # which is true for bool, too
    return {**{name: value for name, value in vars(args).items() if name not in OF_ONE_MACHINE},
            **of_plan}


def for_deit(args: argparse.Namespace, plan: Plan, start_epoch: int) -> argparse.Namespace:
    """The copy of ``args`` that DeiT's main gets.

    Without ``output_dir`` DeiT writes nothing: class Run does. DeiT scales the learning rate by
    the number of processes and the batch size, but knows nothing of accumulation.
    """
    scale = 1 if getattr(args, "unscale_lr", False) else plan.accum_iter
    changed = {"output_dir": "", "start_epoch": start_epoch, "lr": args.lr * scale}
    return argparse.Namespace(**{**vars(args), **changed})
