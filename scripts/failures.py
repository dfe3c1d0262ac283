"""How a run ends when something goes wrong: one line, once, and no process left behind."""
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

LAUNCHER_PID = "FINETUNE_LAUNCHER_PID"  # set by torch_launcher.py for the processes it starts
FIRST_FAILURE = "FINETUNE_FIRST_FAILURE"  # path of a file which the first process to fail creates
REFUSED = 2  # exit status of a user's mistake, as argparse has it; a crash exits with 1

# How the processes of a group hear that one of their peers is gone (gloo, nccl, the store).
_LOST_PEER = ("gloo", "nccl", "connection", "socket", "broken pipe", "recvvalue", "c10d", "store")
_SIGNAL_WHEN_PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux's prctl.h
_LOST_PEER_WAIT = 8.0  # seconds in which the launcher, which looks every few, ends this process


class Refusal(Exception):
    """Something the user can mend; its text is the one line that is printed."""


def guard(run):
    """Call ``run()`` and end the process: status 0, 2 after a Refusal, 1 after anything else.

    The first process of a launch that fails prints why; its peers, which fail because the first
    is gone, end without a word.
    """
    status = 0
    try:
        run()
    except Refusal as refusal:
        status = _report(f"error: {refusal}", REFUSED)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = _system_exit(stop)
    except BaseException as error:  # the last stop: whatever it is, it is said once
        status = _crash(error)
    _leave(status)


def _system_exit(stop):
    if stop.code in (None, 0):
        return 0
    if stop.code == REFUSED:  # argparse has printed its line
        return REFUSED
    reason = stop.code if isinstance(stop.code, str) else f"DeiT stopped with status {stop.code}"
    if stop.code == 1:  # DeiT has no other reason, at any commit
        reason = ("DeiT stopped, since the loss is not finite: use a smaller --lr, and look at the "
                  "data with --check")
    return _report(f"error: {reason} (process {_rank()})", 1)


def _crash(error):
    if _is_lost_peer(error):
        time.sleep(_LOST_PEER_WAIT)
    line = _known_cause(error)
    return _report(f"error: {line}" if line else traceback.format_exc(), 1)


def _known_cause(error):
    """The line that says it all for errors that name their own cause, else None."""
    text = str(error).strip()
    if isinstance(error, RuntimeError) and "out of memory" in text:
        what = text.splitlines()[0]
        return (f"process {_rank()}: {what} -- use a smaller --batch-size "
                "(with more processes, to keep the images a step)")
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        what = text.splitlines()[-1]
        return (f"process {_rank()}: {what} -- out of memory? Use fewer --num_workers, and see "
                "that /dev/shm is large enough")
    if isinstance(error, OSError):
        # A data worker's error arrives as its whole traceback; the last line is the error itself.
        return text.splitlines()[-1] if text else repr(error)
    return None


def _is_lost_peer(error):
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER)


def _report(text, status):
    if _first_to_fail():
        sys.stdout.flush()
        sys.stderr.write(text.rstrip() + "\n")  # DeiT silences print() in all but one process
    return status


def _first_to_fail():
    marker = os.environ.get(FIRST_FAILURE)
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the launcher has removed its folder: it is gone, say it in any case
        return True
    return True


def _rank():
    return os.environ.get("RANK", "0")


def _leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        end_at_once(status)


def end_at_once(status):
    """Exit with the data workers, and without waiting for peers in some library's clean-up."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


def watch_launcher():
    """End this process within seconds of the launcher's death, even by ``kill -9``.

    torch's launcher starts its processes in sessions of their own, so nothing else ends them.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if not launcher:
        return
    die_with_parent()
    threading.Thread(target=_wait_for_orphanhood, args=(int(launcher),), daemon=True).start()


def die_with_parent(*_):
    """Have Linux kill this process when its parent ends, whatever either is doing then.

    A thread cannot run while C++ waits for other machines, and a data worker of torch, orphaned
    with a full queue, waits forever for someone to read it. Takes, as worker_init_fn, a number.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGKILL)


def _wait_for_orphanhood(launcher):
    while os.getppid() == launcher:
        time.sleep(1)
    end_at_once(1)
