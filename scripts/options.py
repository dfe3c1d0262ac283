"""DeiT's command line, with the flags this bundle adds and the values it needs."""
import argparse
import math
import os
import re

from failures import Refusal

REMODES = ("const", "rand", "pixel")  # of timm's RandomErasing
UNDERSCORED = ("output_dir", "num_workers", "start_epoch", "world_size", "dist_url")


def parse(main, data_sets, arguments=None):
    """Parse the command line with DeiT's own parser, extended.

    main: DeiT's module; data_sets: names that ``--data-set`` takes besides DeiT's.
    Returns DeiT's argparse.Namespace. Raises Refusal on values that cannot work.
    """
    parser = Parser(
        prog="finetune.py", parents=[main.get_args_parser()], conflict_handler="resolve",
        description="Fine-tune a MoCo v3 vision transformer with DeiT's own trainer.")
    _offer(parser, data_sets)
    args = parser.parse_args(arguments)
    _check(args)
    return args


class Parser(argparse.ArgumentParser):
    """Says a mistake once for all processes, in one line; argparse prints its usage in each."""

    def error(self, message):
        """Raise Refusal instead of argparse's exit."""
        raise Refusal(f"{message}; --all-flags lists the flags")


def _offer(parser, data_sets):
    parser.add_argument("--data-set", choices=sorted(data_sets), required=True,
                        help="data set to fine-tune on")
    ours = parser.add_argument_group("added by this bundle")
    ours.add_argument("--eval-freq", type=int, default=1, metavar="N",
                      help="evaluate every N epochs and after the last (default: 1)")
    ours.add_argument("--save-freq", type=int, default=1, metavar="N",
                      help="write checkpoint.pth every N epochs and after the last (default: 1)")
    ours.add_argument("--overwrite", action="store_true",
                      help="start anew in an --output_dir that holds a run, deleting that run")
    ours.add_argument("--download", action="store_true",
                      help="fetch Flowers or Pets where absent (CIFAR always is)")
    ours.add_argument("--check", action="store_true",
                      help="check what a launch needs, and every image; train nothing")
    parser.set_defaults(num_workers=_sensible_workers())


def _sensible_workers():
    """DeiT's 10 data workers for each process, or fewer where there are fewer cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(10, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def rank_and_processes():
    """This process's rank and the number of all, as torch's launcher tells; DeiT wants both."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def planned_processes():
    """How many processes a launch would have, as launch.sh tells --check; else 1."""
    return math.prod(whole_number(variable, os.environ.get(variable) or "1")
                     for variable in ("NPROC_PER_NODE", "NNODES"))


def whole_number(variable, value):
    """The value of an environment variable as a number of 1 or more; or raise Refusal."""
    if not value.isdigit() or int(value) < 1:
        raise Refusal(f"{variable}={value}: must be a whole number, 1 or more")
    return int(value)


def _check(args):
    """Refuse what DeiT, timm or torch would end in a traceback for, or would quietly misuse."""
    for name, least in (("eval_freq", 1), ("save_freq", 1), ("epochs", 1), ("batch_size", 1),
                        ("input_size", 16), ("num_workers", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise Refusal(f"{flag(name)} {getattr(args, name)}: must be {least} or more")
    if args.input_size % 16:
        raise Refusal(f"--input-size {args.input_size}: must be a multiple of 16, the patch size")
    if args.start_epoch:
        raise Refusal(f"--start_epoch {args.start_epoch}: a run continues where its checkpoint "
                      "ends; leave it out")
    if args.remode not in REMODES:
        raise Refusal(f"--remode {args.remode}: the choice is {', '.join(REMODES)}")
    _check_device(args.device)
    _check_mixing(args)
    if getattr(args, "finetune", "") and args.resume and not args.eval:
        raise Refusal("--finetune and --resume both name weights to start from: pass --resume")
    if getattr(args, "distillation_type", "none") != "none" and (
            args.finetune or not args.teacher_path):
        raise Refusal(f"--distillation-type {args.distillation_type}: needs --teacher-path, and "
                      "--resume in the place of --finetune")


def _check_device(device):
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise Refusal(f"--device {device}: the choice is cuda and cpu")
    if ":" in device and rank_and_processes()[1] > 1:
        raise Refusal(f"--device {device}: all processes would share one GPU; pass cuda, and "
                      "choose GPUs by CUDA_VISIBLE_DEVICES")


def _check_mixing(args):
    """Mixup and CutMix mix an image with one from the other end of its batch."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise Refusal(f"--batch-size {args.batch_size}: must be even with --mixup or --cutmix")
    if getattr(args, "bce_loss", False) and not mixes:
        raise Refusal("--bce-loss: needs --mixup or --cutmix, which give it its targets")


def flag(name):
    """The flag of an argument's name, as DeiT spells it."""
    return "--" + (name if name in UNDERSCORED else name.replace("_", "-"))
