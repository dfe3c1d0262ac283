"""Launches that are under way: to wait for, and to kill."""
import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from launches import SCRIPTS, command, environment


@contextlib.contextmanager
def running(recipe, *flags, scripts=SCRIPTS, **variables):
    """A launch that is under way; ended with all its processes when the block is left."""
    words = command(recipe, *flags, scripts=scripts)
    output = words[len(words) - words[::-1].index("--output_dir")]  # the last one counts
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment(**variables, LAUNCHED_INTO=output))
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def meanwhile(act):
    """For ``fork``'s before: ``act``, in a thread of the launch."""
    return threading.Thread(target=act, daemon=True).start


def end_of(run, timeout=60):
    """Wait for the end of a launch that is under way; the completed process."""
    output = run.communicate(timeout=timeout)
    return subprocess.CompletedProcess(run.args, run.returncode, *output)


def wait_for(condition, seconds=120, pause=0.05):
    """Poll until ``condition()`` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def wait_for_epochs(folder, epochs=1, seconds=120):
    """Until the log of the run in ``folder`` has that many lines."""
    log = folder / "log.txt"
    wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) >= epochs, seconds)


def processes_of(folder):
    """Process ids of launches into or below ``folder``: of workers, and of their data workers.

    ``running`` marks them with LAUNCHED_INTO; who forks a launch passes it.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            launched = b"LAUNCHED_INTO=" + bytes(folder) in (entry / "environ").read_bytes()
            if launched and b"worker.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def kill_all(run, folder):
    """``kill -9`` for every process of a launch, as when its machine goes down."""
    def none_is_left():
        left = processes_of(folder)  # also those that were just forked
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not left

    run.kill()
    wait_for(none_is_left, seconds=20)
