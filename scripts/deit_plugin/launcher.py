#!/usr/bin/env python3
"""torch's own launcher and its flags, without the page of tracebacks that follows a failure."""
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings

sys.path[0] = os.path.dirname(sys.path[0])  # scripts/, since this file is run as a script

from deit_plugin import errors  # noqa: E402


def main():
    """Run torch's launcher on this script's arguments; exit as the first process that failed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # C++, waiting for other machines, heeds no other
    os.environ[errors.LAUNCHER] = str(os.getpid())
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        os.environ[errors.FIRST_FAILURE] = os.path.join(folder, "first-failure")
        status = launch(sys.argv[1:])
    os._exit(status)  # torch's own end takes half a second (measured)


def launch(arguments):
    """Start and await the processes; returns the exit status."""
    if importlib.util.find_spec("torch.distributed.run") is None:  # before torch 1.9
        from torch.distributed import launch as torch_launch

        sys.argv = [torch_launch.__file__, "--use_env", *arguments]
        try:
            torch_launch.main()
        except subprocess.CalledProcessError as error:
            return _status(error.returncode, "a process")
        return 0
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import errors as elastic

    try:
        run.main(["--monitor_interval", "1", *arguments])
    except elastic.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(failure.exitcode, f"rank {rank}")
    except Exception as error:  # SignalException, which not every version has
        if not hasattr(error, "sigval"):
            raise
        return 128 + error.sigval
    return 0


def _status(code, who):
    """A process that failed has said why; one that was killed could not."""
    if code >= 0:
        return code
    hint = ": out of memory?" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"error: {who} was ended by {signal.Signals(-code).name}{hint}\n")
    return 128 - code


if __name__ == "__main__":
    errors.guard(main)
