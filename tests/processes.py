"""Launches that are under way, to be killed."""
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import command, environment


@contextlib.contextmanager
def running(recipe, *flags, processes=2, era=None, **variables):
    """A launch that is under way; ended with all its processes when the block is left."""
    process = subprocess.Popen(
        command(recipe, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, env=environment(processes, MINI_DEIT_ERA=era, **variables))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=120, pause=0.05):
    """Poll until ``condition()`` holds; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError("waited in vain")


def finetune_processes(folder):
    """Process ids of the finetune.py processes, and their data workers, writing to ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if b"finetune.py" in line and str(folder).encode() in line \
                        and b"torch_launcher" not in line:
                    found.append(int(entry.name))
    return found


def parent(process):
    """The process id of a process's parent."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_all(run, folder):
    """``kill -9`` for every process of a launch, as when its machine goes down."""
    for process in [run.pid, *finetune_processes(folder)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_for(lambda: not finetune_processes(folder), seconds=20)


def lines_in(log):
    """How many lines ``log`` has; none if it is not there."""
    return len(log.read_bytes().splitlines()) if log.exists() else 0
