"""How a process ends when something goes wrong: one line, from the first that fails; no orphans."""
import contextlib
import ctypes
import errno
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Optional

# Environment variables that launcher.py sets for the workers of a launch:
LAUNCHER = "FINETUNE_LAUNCHER_PID"
FIRST_FAILURE = "FINETUNE_FIRST_FAILURE"  # path of a file that the first process to fail creates
STATUS = "FINETUNE_STATUS"  # path of a file that says how much of the run is saved
REFUSED = 2  # exit status before training, as with argparse; later it is 1
# What gloo, NCCL and torch's store say when a machine was killed, has failed or is not there.
LOST = ("time.?out|timed out|connection (closed|reset|refused)|broken pipe|failed to connect|"
        "remote process")
PATIENCE = 4  # seconds in which torch's launcher notices that another process was killed
# What torch, CUDA, cuBLAS, cuDNN or NCCL says about a GPU, and what to do about it. Source: their
# texts; not one was seen on a GPU here.
OF_GPUS = {
    "out of memory|Failed to CUDA calloc|(CUBLAS|CUDNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)":
        "is the GPU's memory full? Pass a smaller --batch-size, and --accum-iter to make up for "
        "it; nvidia-smi shows who else uses the GPU",
    "busy or unavailable": "another process has this GPU for itself, or it is broken: nvidia-smi "
        "shows which; leave it out of CUDA_VISIBLE_DEVICES",
    "invalid device ordinal|no CUDA-capable device": "there are fewer GPUs than processes: set "
        "NPROC_PER_NODE to the number of GPUs that nvidia-smi shows, and check "
        "CUDA_VISIBLE_DEVICES",
    "no kernel image": "this torch has code for {} only: install one for your GPU, see "
        "scripts/README.md",
}


class UserError(Exception):
    """What the user can fix before training: a line for each argument."""


def guard(run: Callable[[], None]) -> None:
    """Call ``run()`` and end the process with its status; if it fails, say why in one line."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # which nohup and & can set
        # A process blocked in a C++ collective never runs Python's signal handlers.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _ignore_lost_connections  # a thread of multiprocessing calls it, too
    threading.excepthook = lambda failure: _ignore_lost_connections(*failure[:3])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8
    sys.stdout, sys.stderr = _Output(sys.stdout, "output"), _Output(sys.stderr, "error output")
    try:
        end(_run_and_print(run))
    except UserError as error:
        _fail("\n".join(f"error: {line}" for line in error.args), REFUSED)
    except ImportError as error:
        _fail(f"error: {error}; activate the environment that has it (for Slurm before sbatch), or "
              f"type {sys.executable} -m pip install -r requirements.txt", REFUSED)
    except Exception as error:  # the last resort, whatever it is
        line = _known_cause(error)
        if line is None and FIRST_FAILURE in os.environ and not _is_of_gpu(error):
            # If another process was killed, the launcher says so and ends this one meanwhile. But
            # after an error of its own GPU, NCCL's watchdog would end this process silently.
            time.sleep(PATIENCE)
            line = _not_connected(error)
        _fail(f"error: {line}" if line else traceback.format_exc(), 1)


def _run_and_print(run: Callable[[], None]) -> int:
    """Call ``run()``; return its exit status. Raises OSError if something it printed is lost."""
    status = 0
    try:
        run()
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):
            sys.stderr.write(status + "\n")
            status = 1
    sys.stdout.flush()
    return status


class _Output:
    """Wraps a stream: where nobody reads any more, later output is dropped and the run goes on.

    That is a closed pipe (`| head`), a terminal that was closed, or a stream that was closed from
    the start (`>&-`). Where output is lost, as on a full disk, OSError is raised with ``name``.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._name, self._lost = name, None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._is_terminal = self._stream.isatty()

    def write(self, text: str) -> int:
        """Write the text."""
        self._drop_if_nobody_reads(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; raise again what ``write`` has raised, since argparse ignores that."""
        self._drop_if_nobody_reads(lambda: self._stream.flush())
        if self._lost:
            raise self._lost

    def _drop_if_nobody_reads(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            closed = errno.EIO if self._is_terminal else errno.EPIPE
            if error.errno != closed:
                error.filename, self._lost = f"standard {self._name}", error
                raise
            self._stream = open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def begin_data_worker(*_: Any) -> None:
    """The worker_init_fn of every data loader: the worker ends with its run, and never hangs it."""
    die_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        end(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_data_worker)


def _end_data_worker(error: Exception, _: Any) -> None:
    """End the run: Python would only print the error, and the run would wait forever."""
    _fail(f"error: a data worker cannot hand over its images: {one_line(error)}; set TMPDIR to a "
          "short path with free space, or pass --num_workers 0", 1)


def write_status(text: str) -> None:
    """Note how much of the run is saved, for Ctrl-C, which may come at this very moment."""
    if STATUS in os.environ:
        aside = Path(os.environ[STATUS] + ".new")
        with contextlib.suppress(OSError):  # the launcher and its folder are gone
            aside.write_text(text, errors="surrogateescape")
            aside.replace(os.environ[STATUS])


def read_status() -> str:
    """What write_status noted last, or ""."""
    with contextlib.suppress(OSError, KeyError):  # nothing was launched yet
        return Path(os.environ[STATUS]).read_text(errors="surrogateescape")
    return ""


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends.

    Measured: an orphaned data worker with a full queue waits forever, and a process in a C++
    collective runs no Python signal handler.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG in prctl.h


def die_with_launcher() -> None:
    """Have Linux kill this process when launcher.py ends, which may have happened already."""
    if LAUNCHER in os.environ:
        die_with_parent()
        if os.environ[LAUNCHER] != str(os.getppid()):
            end(1)


def _ignore_lost_connections(kind: Any, error: Any, where: Any) -> None:
    """Show a traceback, unless it only says that the process at the other end has ended.

    That of a data worker is reported by the run's main thread; a data worker ends with its run.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, where)


def one_line(error: BaseException) -> str:
    """The error's text on one line, or its class if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_of_gpu(error: Exception) -> bool:
    """Whether this process's own GPU failed, and not the connection to another process."""
    return bool(re.search("cuda|cublas|cudnn", str(error), re.IGNORECASE))


def _known_cause(error: Exception) -> Optional[str]:
    """One line for an error that names its cause; None for any other error."""
    lines = (str(error).strip() or repr(error)).splitlines()
    last = lines[-1]
    for pattern, advice in OF_GPUS.items() if isinstance(error, RuntimeError) else ():
        named = [line for line in lines if re.search(pattern, line)]
        if named:
            import torch  # which has raised it

            return f"{named[0]}: {advice.format(' '.join(torch.cuda.get_arch_list()))}"
    is_of_worker = isinstance(error, RuntimeError) and "DataLoader worker" in last
    if is_of_worker or isinstance(error, ConnectionError):  # the pipe to a worker that was killed
        return (f"{last}: was a DataLoader worker killed, out of memory? Pass fewer "
                "--num_workers; in a container, enlarge /dev/shm")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"disk full: {error.filename or last}: make room and launch again"
    if isinstance(error, (OSError, FloatingPointError)):  # the latter from Run.train_one_epoch
        return last.split("OSError: ")[-1]  # a data worker's comes with its whole traceback
    return None


def _not_connected(error: Exception) -> Optional[str]:
    """One line for an error of torch's about other processes or machines; None for any other."""
    first = (str(error).splitlines() or [""])[0]
    if re.search("EADDRINUSE|ddress already in use", first):
        return (f"a port is in use on this machine ({first}): launch again, on several machines "
                "with another MASTER_PORT")
    lost = re.search(LOST, first, re.IGNORECASE)
    if isinstance(error, RuntimeError) and lost and "CUDA error" not in first:
        return (f"another machine or process has ended or does not answer ({lost[0]}): see its "
                "output, and launch on all machines again")
    return None


def _fail(text: str, status: int) -> None:
    """Print the text, unless another process of this machine has failed before, and exit."""
    with contextlib.suppress(ValueError):  # not in this thread
        # torch's handler would raise another error here, about a data worker that was killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if FIRST_FAILURE in os.environ:
        try:
            open(os.environ[FIRST_FAILURE], "x").close()
        except FileExistsError:
            end(status)
        except OSError:  # the launcher and its folder are gone, or that disk is full
            pass
    with contextlib.suppress(OSError):  # there is no other place to say it
        sys.stderr.write(text.rstrip() + "\n")  # DeiT silences print() in all ranks but 0
    end(status)


def end(status: int) -> None:
    """Exit without the clean-up of libraries: it would wait for processes, and takes a second.

    Data workers end with their parent. After Ctrl-C at a terminal the process dies of the signal: a
    shell goes on with a loop whose command has only exited.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # what was lost is an error already
            stream.flush()
    if status == 128 + signal.SIGINT and os.isatty(0):
        with contextlib.suppress(ValueError):  # not in this thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)
