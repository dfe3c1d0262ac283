#!/usr/bin/env python3
"""torch's own launcher and its flags, with one error line instead of its tracebacks."""
import argparse
import logging
import os
import signal
import subprocess
import sys
import warnings
from typing import Any, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # scripts/

from deit_plugin import errors, surroundings  # noqa: E402


def main() -> None:
    """Run torch's launcher on this script's arguments; exit as the first process that failed."""
    surroundings.keep_ignored_signals()
    surroundings.forget_torchrun_variables()
    surroundings.use_short_temporary_folder()
    os.environ[errors.LAUNCHER] = str(os.getpid())
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with surroundings.temporary_folder() as folder:
        os.environ[errors.FIRST_FAILURE] = os.path.join(folder, "first-failure")
        os.environ[errors.STATUS] = os.path.join(folder, "status")
        signal.signal(signal.SIGINT, interrupted)  # until torch's launcher handles it
        args = parse()
        check_gpus(args)
        if args.nnodes > 1:
            others = "machine 1" if args.node_rank else f"{args.nnodes - 1} more"
            print(f"This is machine {args.node_rank + 1} of {args.nnodes}, waiting for {others} at "
                  f"{args.master_addr}:{args.master_port}", flush=True)
        sys.exit(launch(folder, args.nnodes))


def parse() -> argparse.Namespace:
    """What this module needs to know of the command line, which torch's launcher parses."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    for name, default in (("nproc_per_node", 1), ("nnodes", 1), ("node_rank", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("master_addr", "master_port"):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args()[0]


def check_gpus(args: argparse.Namespace) -> None:
    """Refuse to start the processes if there are too few GPUs, which each would find by itself."""
    from deit_plugin import gpus

    gpus.describe(args.device, args.nproc_per_node)


def launch(folder: str, machines: int) -> Optional[int]:
    """Start the processes, with torch's own files in ``folder``; return the exit status."""
    try:
        from torch.distributed.run import main as launch_torch

        sys.argv[1:1] = ["--monitor_interval", str(errors.MONITOR_INTERVAL), "--log_dir", folder]
        if machines > 1:
            # torch waits for the others in C++, where no handler of Python's runs, so that Ctrl-C
            # has to end this process without our line. Once its processes have started, torch
            # handles the signal itself (but not torch 1.9).
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ImportError:  # before torch 1.9
        from torch.distributed.launch import main as launch_torch

        sys.argv[1:1] = ["--use_env"]
    try:
        return launch_torch()
    except subprocess.CalledProcessError as error:  # before torch 1.9
        who, status = "a process", error.returncode
    except Exception as error:
        if hasattr(error, "sigval"):  # SignalException, which torch 1.9 does not have
            if error.sigval == signal.SIGINT:
                interrupted()
            return 128 + error.sigval
        if not hasattr(error, "get_first_failure"):  # ChildFailedError
            raise
        rank, failure = error.get_first_failure()
        who, status = f"rank {rank}", failure.exitcode
    if status >= 0:  # the process has said why
        return status
    hint = ": out of memory?" if -status == signal.SIGKILL else ""
    sys.stderr.write(f"error: {who} was ended by {signal.Signals(-status).name}{hint}\n")
    return 128 - status


def interrupted(*_: Any) -> None:
    """Say how much of the run is saved, and exit. Its processes end with this one."""
    saved = errors.read_status()
    text, again = (saved, "continues") if saved else ("nothing saved yet", "starts again")
    if "--eval" in sys.argv:
        text, again = "the evaluation is not finished", "starts again"
    elif "--node_rank" in sys.argv and sys.argv[sys.argv.index("--node_rank") + 1] != "0":
        text, again = "the first machine saves the run", "continues"
    without = " without --overwrite" if "--overwrite" in sys.argv else ""
    sys.stderr.write(f"interrupted: {text}; the same command{without} {again}\n")
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    errors.guard(main)
