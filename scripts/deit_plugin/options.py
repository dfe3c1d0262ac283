"""DeiT's command line with the flags of this bundle, and what differs from the published recipe.

Only ``parse`` changes DeiT's args, but for ``start_epoch`` and ``seed``, which Run.train sets.
"""
import argparse
import difflib
import os
import warnings

import torch

from .errors import UserError

YOUR_FLAGS = "--your-flags"  # launch.sh puts it between the recipe's flags and the user's
PUBLISHED_PROCESSES, PUBLISHED_BATCH_SIZE = 8, 1024  # MoCo v3's transfer/README.md
# What does not change what is learnt; all else makes up the settings of a run.
NOT_SETTINGS = {
    "output_dir", "data_path", "resume", "pretrained", "device", "num_workers", "pin_mem",
    "dist_url", "rank", "world_size", "distributed", "start_epoch", "batch_size", "accum_iter",
    "eval", "eval_freq", "save_freq", "dist_eval", "overwrite", "download", "check",
    # DeiT's flags that this bundle's transforms and evaluation have no use for
    "aa", "color_jitter", "train_interpolation", "resplit", "inat_category", "eval_crop_ratio"}

LARGEST, FINITE = 2**31 - 1, 1e38  # NumPy's seeds end at 2**32 - 1, float32 at 3e38
RANGES = {  # lowest and highest number that DeiT, timm and torch can work with
    (1, LARGEST): ("epochs", "batch_size", "accum_iter", "eval_freq", "save_freq"),
    (16, LARGEST): ("input_size",),
    (0, LARGEST): ("num_workers", "seed"),
    (0, FINITE): ("lr", "min_lr", "warmup_lr", "weight_decay", "mixup", "cutmix"),
    (0, 1): ("drop", "drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob",
             "model_ema_decay"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is said once for all processes, with the flag that was meant."""

    def error(self, message):
        """Raise UserError in the place of argparse's exit."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        flags = [*self._option_string_actions, "--dry-run", "--all-flags"]  # launch.sh's, too
        near = difflib.get_close_matches(unknown, flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--all-flags lists the flags"
        raise UserError(f"{message}; {hint}")


def parse(main, data_sets, arguments):
    """DeiT's argparse.Namespace for ``arguments``: the recipe's, YOUR_FLAGS, the user's.

    main: DeiT's module; data_sets: what ``--data-set`` takes. Besides DeiT's arguments it has ours;
    ``pretrained``, the path given by --resume, which DeiT itself does not get to see; ``settings``
    and ``differs`` (see below).
    """
    parser = _parser(main, data_sets)
    args = parser.parse_args([word for word in arguments if word != YOUR_FLAGS])
    for name in ("resume", "output_dir", "data_path"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.pretrained, args.resume = args.resume, ""
    args.rank = int(os.environ.get("RANK", 0))  # as DeiT's main does, but for --check
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.pin_mem and not hasattr(torch, "inference_mode"):  # which is new in 1.9
        args.pin_mem = False  # its thread would end before a second epoch of the same workers
        warnings.warn("--pin-mem has no effect: it takes torch 1.9 or newer", stacklevel=1)
    _refuse_what_cannot_work(args)
    args.settings = _settings(args)
    args.differs = ["no recipe of scripts/"]
    if YOUR_FLAGS in arguments:
        recipe = parser.parse_args(arguments[:arguments.index(YOUR_FLAGS)])
        recipe.seed, recipe.pretrained = args.seed, args.pretrained  # are no recipe's
        recipe.world_size = PUBLISHED_PROCESSES
        args.differs = differing(args.settings, _settings(recipe), "published")
    if not getattr(args, "unscale_lr", False):
        args.lr *= args.accum_iter  # DeiT knows of the processes and the batch size
    return args


def _parser(main, data_sets):
    parser = Parser(prog="finetune.py", parents=[main.get_args_parser()], allow_abbrev=False,
                    conflict_handler="resolve", description="Fine-tune with DeiT's own trainer.")
    parser.set_defaults(data_path="")
    parser.add_argument("--data-set", choices=sorted(data_sets), required=True)
    for name, choices in (("--device", ("cuda", "cpu")), ("--sched", ("cosine", "tanh", "step")),
                          ("--remode", ("pixel", "rand", "const")),
                          ("--mixup-mode", ("batch", "pair", "elem"))):
        parser.add_argument(name, choices=choices, default=choices[0])
    ours = parser.add_argument_group("added by this bundle")
    for name, text in (("--accum-iter", "take N batches per process for one optimizer step"),
                       ("--eval-freq", "evaluate every N epochs and after the last"),
                       ("--save-freq", "write checkpoint.pth every N epochs and after the last")):
        ours.add_argument(name, type=int, default=1, metavar="N", help=text + " (default: 1)")
    for name, text in (
            ("--overwrite", "start anew in an --output_dir that contains a run, deleting that run"),
            ("--download", "download Flowers or Pets where absent (CIFAR always is)"),
            ("--check", "check what a launch needs, and every image; train nothing")):
        ours.add_argument(name, action="store_true", help=text)
    return parser


def _refuse_what_cannot_work(args):
    """What DeiT, timm or torch would quietly misuse or end in a traceback."""
    for (least, most), names in RANGES.items():
        limits = f"{least} or more" if most > 1 else f"{least} to {most}"
        for name in names:
            value = getattr(args, name, least)
            if not least <= value <= most:  # true of nan, too
                raise UserError(f"{flag_of(name)} {value}: must be {limits}")
    for flag, unused in (("--start_epoch", 0), ("--finetune", ""), ("--distillation-type", "none")):
        value = vars(args).get(flag[2:].replace("-", "_"), unused)
        if value != unused:
            raise UserError(f"{flag} {value} is not supported: --resume takes the converted "
                            "checkpoint, or one of a run to go on from")
    minmax = args.cutmix_minmax or (0, 1)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    for wrong, message in (
            (not args.data_path, "--data-path is missing: pass the folder of the data set"),
            (not args.output_dir and not (args.eval or args.check),
             "--output_dir is missing: pass the folder for checkpoints and log.txt"),
            (args.input_size % 16,
             f"--input-size {args.input_size}: must be a multiple of 16, the patch size"),
            (mixes and args.batch_size % 2,
             f"--batch-size {args.batch_size}: must be even with --mixup or --cutmix"),
            (len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= 1,
             "--cutmix-minmax: takes two numbers from 0 to 1, the smaller first, as 0.2 0.8"),
            (getattr(args, "bce_loss", False) and (not mixes or args.smoothing),
             "--bce-loss: needs --mixup or --cutmix, and --smoothing 0: DeiT makes 1 of every "
             "target over 0")):
        if wrong:
            raise UserError(message)


def check_gpus(args):
    """Say which GPUs there are; this machine must have as many as processes."""
    # Newer torch counts GPUs also where its CUDA is too new for the driver.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = int(os.environ.get("NPROC_PER_NODE", 1))
    found = f"NPROC_PER_NODE={wanted}: torch can use {count(gpus, 'GPU')} of this machine"
    looks_ahead = args.check and not gpus  # as on the machine that one logs in to
    if args.device == "cuda" and wanted > gpus and not looks_ahead:
        advice = "set NPROC_PER_NODE to that, or " if gpus else ""
        raise UserError(f"{found}; {advice}pass --device cpu to rehearse")
    return f"{found}, --device {args.device}"


def flag_of(name):
    """The flag of an argument, as DeiT spells it; words are left as they are."""
    if " " in name:
        return name
    return "--" + (name if name == "num_workers" else name.replace("_", "-"))


def _settings(args):
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings["effective_batch_size"] = args.world_size * args.batch_size * args.accum_iter
    settings["pretrained_file"] = os.path.basename(args.pretrained)
    return settings


def differing(settings, others, whose):
    """What differs from others' settings, each as 'flag value (whose: other value)'."""
    flags = {"effective_batch_size": "effective batch size", "pretrained_file": "--resume"}
    return [f"{flags.get(name) or flag_of(name)} {settings.get(name)} ({whose}: {other})"
            for name, other in others.items() if settings.get(name) != other]


def batch_size_in_words(args):
    """How the effective batch size comes about, and what would restore the published one."""
    size = args.settings["effective_batch_size"]
    accumulated = f" x {args.accum_iter} accumulated" if args.accum_iter > 1 else ""
    text = f"{size} = {count(args.world_size, 'process')} x {args.batch_size} images{accumulated}"
    restoring, rest = divmod(PUBLISHED_BATCH_SIZE, args.world_size * args.batch_size)
    if size != PUBLISHED_BATCH_SIZE and not rest:
        text += f" (--accum-iter {restoring} restores the published {PUBLISHED_BATCH_SIZE})"
    return text


def count(number, what):
    """'1 process', '2 processes'."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"
