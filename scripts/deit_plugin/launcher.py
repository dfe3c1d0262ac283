#!/usr/bin/env python3
"""torch's own launcher and its flags, without the page of tracebacks that follows a failure."""
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import Optional

sys.path[0] = os.path.dirname(sys.path[0])  # scripts/, since this file is run as a script

from deit_plugin import errors  # noqa: E402


def main() -> None:
    """Run torch's launcher on this script's arguments; exit as the first process that failed."""
    os.environ[errors.LAUNCHER] = str(os.getpid())
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        os.environ[errors.FIRST_FAILURE] = os.path.join(folder, "first-failure")
        sys.exit(launch(folder))


def launch(folder: str) -> Optional[int]:
    """Start the processes, with torch's own files in ``folder``; return the exit status."""
    try:
        from torch.distributed.run import main as launch_torch

        sys.argv[1:1] = ["--monitor_interval", str(errors.MONITOR_INTERVAL), "--log_dir", folder]
    except ImportError:  # before torch 1.9
        from torch.distributed.launch import main as launch_torch

        sys.argv[1:1] = ["--use_env"]
    try:
        return launch_torch()
    except subprocess.CalledProcessError as error:  # before torch 1.9
        who, status = "a process", error.returncode
    except Exception as error:
        if hasattr(error, "sigval"):  # SignalException, which torch 1.9 does not have
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


if __name__ == "__main__":
    errors.guard(main)
