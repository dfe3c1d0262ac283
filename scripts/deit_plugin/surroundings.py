"""Guards against what the shell, the cluster or an earlier launch left behind."""
import contextlib
import fcntl
import glob
import os
import shutil
import signal
import tempfile
from typing import Iterator

# Longest path of a temporary folder. Data workers open sockets below it, whose paths have at most
# 107 characters (unix(7)), of which Python's own names take about 35 and the launcher's 18.
LONGEST_TEMPORARY_FOLDER = 50
LOCK = "finetune-launcher.lock"


def keep_ignored_signals() -> None:
    """Keep signals ignored that were ignored at the start, as SIGHUP is by nohup.

    torch's launcher would handle them, and end the run when the user logs out.
    """
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
    ignored = {number for number in numbers if signal.getsignal(number) == signal.SIG_IGN}
    handle = signal.signal
    signal.signal = lambda number, handler: (
        signal.SIG_IGN if number in ignored else handle(number, handler))


def use_short_temporary_folder() -> None:
    """Use /tmp where the temporary folder's path is too long, as job folders of Slurm can be."""
    if len(tempfile.gettempdir()) > LONGEST_TEMPORARY_FOLDER and os.access("/tmp", os.W_OK):
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"


def forget_torchrun_variables() -> None:
    """Drop PET_* variables, which a Kubernetes pod sets and torch's launcher takes for flags."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder for all temporary files of a launch; those of launches that were killed are removed.

    A lock, which ends with its process, tells whether a launch still uses its folder. On a file
    system without locks, the folder of a killed launch stays.
    """
    for path in glob.glob(os.path.join(tempfile.gettempdir(), "finetune-*", LOCK)):
        with contextlib.suppress(OSError), open(path) as lock:  # it is in use, or not ours
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, \
            open(os.path.join(folder, "new"), "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(lock.name, os.path.join(folder, LOCK))  # nobody finds it before it is locked
        os.environ["TMPDIR"] = folder
        yield folder
