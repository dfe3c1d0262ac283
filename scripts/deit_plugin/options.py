"""DeiT's command line with this bundle's flags."""
import argparse
import difflib
import os
import shlex
import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch

from . import weights
from .errors import UserError
from .words import BATCH, flag_of

YOUR_FLAGS = "--your-flags"  # launch.sh puts it between the recipe's flags and the user's
# Arguments that are not settings: they do not change what is learnt, or, like the batch size, they
# count through the effective batch size.
NOT_SETTINGS = {
    "output_dir", "data_path", "resume", "device", "num_workers", "pin_mem", "dist_url", "rank",
    "world_size", "start_epoch", "batch_size", "eval", "download", "test_split"}
# Arguments that may differ between the machines of a run.
OF_ONE_MACHINE = {"output_dir", "data_path", "num_workers", "pin_mem", "dist_url", "rank"}
# Arguments that --eval takes from the checkpoint, unless the user gives them. weights.finished
# makes the transform of a checkpoint from its settings, so one that changes it must be a setting.
OF_EVALUATION = ("model", "input_size", "data_set", "hold_out", "eval_crop_ratio")
# Arguments that only some data sets read; their rows in datasets.py name them.
OF_SOME_DATA_SETS = {"aa", "color_jitter", "train_interpolation", "eval_crop_ratio", "test_split"}

LARGEST, FINITE = 2**31 - 1, 1e38  # NumPy's seeds end at 2**32 - 1, float32 at 3e38
RANGES = {  # lowest and highest number that DeiT, timm and torch can work with
    (1, LARGEST): ("epochs", "batch_size", "accum_iter", "eval_freq", "save_freq", "decay_epochs"),
    (16, LARGEST): ("input_size",),
    (0, LARGEST): ("num_workers", "seed"),
    (0, FINITE): ("lr", "min_lr", "warmup_lr", "weight_decay", "mixup", "cutmix"),
    (0, 1): ("drop", "drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob",
             "model_ema_decay", "decay_rate"),
    (0, 0.99): ("hold_out",),
    (0.1, 1): ("eval_crop_ratio",),
}


class Plan(NamedTuple):
    """What this bundle adds to DeiT's args. Nothing changes it after ``parse``."""

    accum_iter: int  # batches per process for one optimizer step
    eval_freq: int  # epochs between evaluations
    save_freq: int  # epochs between writes of checkpoint.pth
    overwrite: bool  # delete the run in --output_dir first
    check: bool
    verbose: bool  # also print DeiT's own lines
    predictions: str  # path of the CSV file that --eval writes, or ""
    trust: bool  # load checkpoints that can run code
    resume: str  # path given by --resume, which is not passed to DeiT
    command: str  # the script and the user's flags
    settings: Dict[str, Any]  # the arguments that decide what is learnt
    recipe_args: Optional[argparse.Namespace]  # the recipe's; None if launched without a recipe


OURS = Plan._fields[:8]  # those above `resume`: the arguments of the command line


class Parser(argparse.ArgumentParser):
    """argparse, but raises UserError with the flag that was probably meant."""

    def error(self, message: str) -> None:
        """Raise UserError, which errors.py prints once and not for every process."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        flags = [*self._option_string_actions, "--dry-run", "--all-flags"]  # launch.sh's, too
        near = difflib.get_close_matches(unknown, flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--all-flags lists the flags"
        raise UserError(f"{message}; {hint}")


def parse(main: Any, data_sets: Dict[str, Any], arguments: List[str]
          ) -> Tuple[argparse.Namespace, Plan]:
    """Parse `RECIPE'S FLAGS --your-flags USER'S FLAGS` into DeiT's args and this bundle's plan.

    main: DeiT's module; data_sets: datasets.DATA_SETS. Besides DeiT's flags, the args contain those
    that datasets.py and data.py read, and ``rank`` and ``world_size``. Nothing changes them later;
    DeiT gets a copy.
    """
    parser = _parser(main, data_sets)
    split = arguments.index(YOUR_FLAGS) if YOUR_FLAGS in arguments else 0
    of_recipe, yours = arguments[:split], [word for word in arguments[split:] if word != YOUR_FLAGS]
    recipe_args = parser.parse_args(of_recipe) if split else None
    args = parser.parse_args(of_recipe + yours)
    if args.eval and args.resume:
        args = _inherit(parser, args, recipe_args, yours)
    _complete(args)
    _refuse_what_cannot_work(args)
    unused = _without_effect(args, data_sets[args.data_set].flags)
    for name in sorted(_given(parser, yours) & unused.keys()):
        raise UserError(f"{flag_of(name)} has no effect {unused[name]}: leave it out")
    ours = {name: vars(args).pop(name) for name in OURS}
    resume, args.resume = args.resume, ""
    script = f"scripts/{recipe_args.data_set}.sh" if recipe_args else "scripts/finetune.py"
    return args, Plan(**ours, resume=resume, command=shlex.join([script, *yours]),
                      settings=settings_of(args, ours["accum_iter"], unused),
                      recipe_args=recipe_args)


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
    for name, text in (
            ("--accum-iter", "accumulate N batches per process for one optimizer step"),
            ("--eval-freq", "evaluate every N epochs and after the last"),
            ("--save-freq", "write checkpoint.pth every N epochs, after the last, and whenever the "
                            "accuracy is the best so far")):
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


def _inherit(parser: Parser, args: argparse.Namespace, recipe_args: Optional[argparse.Namespace],
             yours: List[str]) -> argparse.Namespace:
    """Parse again, with OF_EVALUATION from the checkpoint in place of the recipe's."""
    its = weights.read(os.path.expanduser(args.resume), args.trust).get("settings", {})
    inherited = {name: its[name] for name in OF_EVALUATION if name in its}
    if args.test_split:  # test/ has no held-out part
        inherited["hold_out"] = 0.0
    base = vars(recipe_args) if recipe_args else {}
    return parser.parse_args(yours, argparse.Namespace(**{**base, **inherited}))


def _complete(args: argparse.Namespace) -> None:
    for name in ("resume", "output_dir", "data_path", "predictions"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.rank = int(os.environ.get("RANK") or 0)  # as DeiT's main does later
    args.world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if args.device == "cpu":
        args.pin_mem = False  # torch would warn that it has no effect
    if args.pin_mem and not hasattr(torch, "inference_mode"):  # which torch 1.9 introduced
        args.pin_mem = False  # older: the pinning thread ends after persistent workers' first epoch
        warnings.warn("--pin-mem has no effect: it needs torch 1.9 or newer", stacklevel=1)


def _given(parser: Parser, words: List[str]) -> Set[str]:
    """The names of the arguments that occur in ``words``."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(words, blank)).items()
            if value is not unset}


def _refuse_what_cannot_work(args: argparse.Namespace) -> None:
    """Refuse what DeiT, timm or torch would silently misuse or crash on."""
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
    minmax, size = args.cutmix_minmax or (0, 1), weights.implied_input_size(args.model)
    for wrong, message in (
            (not args.data_set, "--data-set is missing: pass pets, folder or another one"),
            (not args.data_path, "--data-path is missing: pass the folder of the data set"),
            (not args.output_dir and not (args.eval or args.check),
             "--output_dir is missing: pass the folder for checkpoints and log.txt"),
            (args.predictions and not args.eval, "--predictions: needs --eval"),
            (args.test_split and not args.eval, "--test-split: needs --eval; training evaluates on "
             "val/, so that nothing is chosen on the test images"),
            (args.test_split and args.hold_out,
             "--test-split: evaluates on test/, but --hold-out on train images: leave one out"),
            (args.resume.startswith(("http:", "https:")),
             f"--resume {args.resume}: download it first, with wget, and pass the file"),
            (args.input_size == 224 != size,
             f"--model {args.model} is made for images of {size} pixels: pass --input-size {size}"),
            (args.input_size % 16,
             f"--input-size {args.input_size}: must be a multiple of 16, the patch size"),
            (args.opt_betas and len(args.opt_betas) != 2,
             f"--opt-betas {args.opt_betas}: takes two numbers, such as 0.9 0.999"),
            ("adahessian" in args.opt.lower(),
             f"--opt {args.opt}: needs second derivatives, which DistributedDataParallel cannot "
             "compute; the recipes use adamw"),
            (_mixes(args) and args.batch_size % 2 and not args.eval,
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
    """The names of arguments that change nothing here, each with the reason.

    of_data_set: the names in OF_SOME_DATA_SETS that this data set reads.
    """
    three = getattr(args, "ThreeAugment", False)  # DeiT HEAD then replaces the train transform
    read = {*of_data_set, *(("color_jitter",) if three else ())}
    groups = (  # names, whether they have an effect, the reason why not
        (("resplit", "inat_category", "dist_eval", "distributed", "world_size", "teacher_model",
          "teacher_path", "distillation_alpha", "distillation_tau", "cooldown_epochs",
          "patience_epochs"), False, "in this bundle"),
        (OF_SOME_DATA_SETS - read, False, f"on --data-set {args.data_set}"),
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


def settings_of(args: argparse.Namespace, accum_iter: int, left_out: Dict[str, str]
                ) -> Dict[str, Any]:
    """The arguments that decide what is learnt, and the effective batch size, by name."""
    settings = {name: value for name, value in vars(args).items()
                if name not in {*NOT_SETTINGS, *OURS, *left_out}}
    settings[BATCH] = args.world_size * args.batch_size * accum_iter
    return settings


def same_on_all_machines(args: argparse.Namespace, plan: Plan) -> Dict[str, Any]:
    """The arguments that decide what the processes of a run do together, by name."""
    of_plan = {name: getattr(plan, name) for name in ("accum_iter", "eval_freq", "save_freq",
                                                      "overwrite")}
    return {**{name: value for name, value in vars(args).items() if name not in OF_ONE_MACHINE},
            **of_plan, "predictions": bool(plan.predictions)}


def for_deit(args: argparse.Namespace, plan: Plan, start_epoch: int) -> argparse.Namespace:
    """The copy of ``args`` that DeiT's main gets.

    Without ``output_dir`` DeiT writes nothing: class Run does. DeiT scales the learning rate by
    the number of processes and the batch size, but knows nothing of accumulation.
    """
    scale = 1 if getattr(args, "unscale_lr", False) else plan.accum_iter
    changed = {"output_dir": "", "start_epoch": start_epoch, "lr": args.lr * scale}
    return argparse.Namespace(**{**vars(args), **changed})
