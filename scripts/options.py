"""DeiT's command line, with the flags this bundle adds and the values it needs."""
import argparse
import os

from failures import Refusal

UNDERSCORED = ("output_dir", "num_workers", "start_epoch", "world_size", "dist_url")


def parse(main, data_sets, arguments=None):
    """Parse the command line with DeiT's own parser, extended.

    main: DeiT's module; data_sets: names that ``--data-set`` takes besides DeiT's.
    Returns DeiT's argparse.Namespace. Raises Refusal on values that cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="finetune.py", parents=[main.get_args_parser()], conflict_handler="resolve",
        description="Fine-tune a MoCo v3 vision transformer with DeiT's own trainer.")
    _offer(parser, data_sets)
    args = parser.parse_args(arguments)
    _check(args)
    return args


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


def planned_processes():
    """How many processes a launch would have, as launch.sh tells --check; else 1."""
    return int(os.environ.get("NPROC_PER_NODE", 1)) * int(os.environ.get("NNODES", 1))


def _check(args):
    for name, least in (("eval_freq", 1), ("save_freq", 1), ("epochs", 1), ("batch_size", 1),
                        ("num_workers", 0)):
        if getattr(args, name) < least:
            raise Refusal(f"{flag(name)} {getattr(args, name)}: must be {least} or more")
    if args.input_size % 16:
        raise Refusal(f"--input-size {args.input_size}: must be a multiple of 16, the patch size")


def flag(name):
    """The flag of an argument's name, as DeiT spells it."""
    return "--" + (name if name in UNDERSCORED else name.replace("_", "-"))
