"""How a process ends when something goes wrong: one line, from the first that fails; no orphans."""
import ctypes
import errno
import os
import signal
import sys
import time
import traceback

LAUNCHER = "FINETUNE_LAUNCHER_PID"  # set by launcher.py for its processes, like the next
FIRST_FAILURE = "FINETUNE_FIRST_FAILURE"  # path of a file that the first to fail creates
REFUSED = 2  # exit status before training, as argparse has it; later it is 1
NOTICES = 4.0  # seconds in which the launcher notices a killed process and ends the others


class UserError(Exception):
    """A mistake the user can mend before training; its text is the line that is printed."""


def guard(run):
    """Call ``run()``; if it fails, say why in one line and end the process with its status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # C++, waiting for other processes, heeds no other
    try:
        run()
    except UserError as error:
        _fail(f"error: {error}", REFUSED)
    except ImportError as error:
        _fail(f"error: {error}; type {sys.executable} -m pip install -r requirements.txt", REFUSED)
    except Exception as error:  # the last resort, whatever it is
        line = _known_cause(error)
        if line is None and FIRST_FAILURE in os.environ:
            time.sleep(NOTICES)  # if a peer was killed, the launcher says so and ends this process
        _fail(f"error: {line}" if line else traceback.format_exc(), 1)


def die_with_parent(*_):
    """Have Linux kill this process when its parent ends. Takes, as worker_init_fn, a number.

    Measured: an orphaned data worker with a full queue waits forever, and a process in a C++
    collective heeds no signal handler of Python's.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG of prctl.h


def die_with_launcher():
    """The same for a process of launcher.py, which may have ended already."""
    if LAUNCHER in os.environ:
        die_with_parent()
        if os.environ[LAUNCHER] != str(os.getppid()):
            _end(1)


def one_line(error):
    """The error's text on one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _known_cause(error):
    """The line for errors that name their cause; None for all others."""
    first, *_, last = (str(error).strip() or repr(error)).splitlines() * 2
    if isinstance(error, RuntimeError) and "out of memory" in first:
        return f"{first}: pass a smaller --batch-size, and --accum-iter to make up for it"
    is_of_worker = isinstance(error, RuntimeError) and "DataLoader worker" in last
    if is_of_worker or isinstance(error, ConnectionError):  # the pipe to a worker that was killed
        return (f"{last}: was a DataLoader worker killed, out of memory? Pass fewer "
                "--num_workers; in a container, enlarge /dev/shm")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"disk full: {error.filename or last}: make room and launch again"
    if isinstance(error, (OSError, FloatingPointError)):  # the loss's, see Run.train_one_epoch
        return last.split("OSError: ")[-1]  # a data worker's arrives with its whole traceback
    return None


def _fail(text, status):
    """Print the text, if no other process of this machine has failed before, and exit."""
    if FIRST_FAILURE in os.environ:
        try:
            open(os.environ[FIRST_FAILURE], "x").close()
        except FileExistsError:
            _end(status)
        except OSError:  # the launcher is gone, and its folder with it, or that disk is full
            pass
    sys.stderr.write(text.rstrip() + "\n")  # DeiT silences print() in all but rank 0
    _end(status)


def _end(status):
    """Exit without the clean-up of libraries, which would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
