"""Starts the processes of a launch with torch's own launcher, guarded against its surroundings."""
import contextlib
import fcntl
import glob
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from importlib import import_module
from typing import Any, Iterator, List, Mapping, NamedTuple, Optional

from . import errors
from .errors import UserError

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
# Longest path of a temporary folder. Data workers open sockets below it, whose paths have at most
# 107 characters (unix(7)), of which Python's own names take about 35 and the launch's folder 18.
LONGEST_TEMPORARY_FOLDER = 50
LOCK = "finetune-launcher.lock"
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # a variable of torch's
WAIT = 15  # minutes in which all machines must have started


class Machines(NamedTuple):
    """The machines of a run, as this one's environment tells."""

    processes: int  # on this machine, and on each other one
    nodes: int
    node_rank: int
    address: str
    port: int

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.nodes


def find_machines(environment: Mapping[str, str], default: int) -> Machines:
    """Read NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. Raises UserError.

    default: the number of processes on a machine.
    """
    problems = []

    def number(name: str, default: int, least: int = 1, most: int = 10000) -> int:
        text = environment.get(name) or str(default)
        if re.fullmatch("[0-9]{1,5}", text) and least <= int(text) <= most:
            return int(text)
        problems.append(f"{name}={text}: must be a whole number from {least} to {most}")
        return least

    processes = number("NPROC_PER_NODE", default)
    nodes = number("NNODES", 1)
    found = Machines(processes, nodes, 0, "127.0.0.1", random.randint(10000, 29999))
    if nodes > 1:  # the others are for several machines, and may be left from another job
        address = environment.get("MASTER_ADDR", "")
        if not address:
            problems.append("MASTER_ADDR is missing: set it to the first machine's address")
        found = Machines(processes, nodes, number("NODE_RANK", -1, 0, nodes - 1), address,
                         number("MASTER_PORT", 29500, 1, 65535))
        try:
            socket.getaddrinfo(address, found.port)
        except (OSError, UnicodeError) as error:  # torch would try it again until WAIT is over
            problems.append(f"MASTER_ADDR={address}: {errors.one_line(error)}: set it to the "
                            "first machine's address, as this machine knows it")
    if problems:
        raise UserError(*problems)
    return found


def require_gpus(device: str, machines: Machines, is_check: bool) -> str:
    """Describe the GPUs of this machine. Raises UserError if there are too few.

    With --check a machine without any GPU will do, as the login node of a cluster.
    """
    import torch

    needed = machines.processes
    if device == "cpu":
        return f"none needed: --device cpu, NPROC_PER_NODE={needed}"
    # device_count() alone would count GPUs that an old driver makes unusable.
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found and is_check:
        return f"not checked: no GPU on this machine; the launch needs {needed}"
    if found < needed:
        advice = f"set NPROC_PER_NODE={found}, or " if found else ""
        raise UserError(f"NPROC_PER_NODE={needed}, but torch can use {found} GPUs of this machine: "
                        f"{advice}pass --device cpu, which is slow")
    return f"{found} found, {needed} needed"


# Guards against what the shell, the cluster or an earlier launch left behind


def prepare() -> None:
    """Forget what would mislead torch, before it is imported; keep ignored signals ignored."""
    _keep_ignored_signals()
    # What torch's launcher logs in C++, it also raises. Workers log their errors: see launch.
    os.environ.setdefault(LOG_LEVEL, "FATAL")
    for name in list(os.environ):
        # PET_* is set in a Kubernetes pod, and torch's launcher takes it for flags.
        if name.startswith("PET_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    # Job folders of Slurm can have long paths.
    if len(tempfile.gettempdir()) > LONGEST_TEMPORARY_FOLDER and os.access("/tmp", os.W_OK):
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"


def _keep_ignored_signals() -> None:
    """Keep signals ignored that were ignored at the start, as SIGHUP is by nohup.

    torch's launcher would handle them, and end the run when the user logs out.
    """
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
    ignored = {number for number in numbers if signal.getsignal(number) == signal.SIG_IGN}
    handle = signal.signal
    signal.signal = lambda number, handler: (
        signal.SIG_IGN if number in ignored else handle(number, handler))


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


# The launch


def command(machines: Machines, folder: str) -> List[str]:
    """What to type for torch's launcher to start a worker for each process."""
    try:
        import torch
        import torch.distributed.run  # noqa: F401

        # From 2.4 on, torch tries twice to reach the first machine, with pauses in between.
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        wait = 27 * WAIT if machines.node_rank and version >= (2, 4) else 60 * WAIT
        module = ["torch.distributed.run", "--monitor_interval", "0.1",  # all in seconds
                  "--rdzv_conf", f"timeout={wait}"]
    except ImportError:  # before torch 1.9
        module = ["torch.distributed.launch", "--use_env"]
    return [sys.executable, "-m", *module, "--nproc_per_node", str(machines.processes),
            "--nnodes", str(machines.nodes), "--node_rank", str(machines.node_rank),
            "--master_addr", machines.address, "--master_port", str(machines.port), WORKER, folder]


class _OfOldLauncher(subprocess.Popen):
    """A process of the launcher before torch 1.8, which waits for one after the other.

    Seen with torch 1.7.1: if rank 1 fails while rank 0 waits for it under NCCL, that launcher waits
    forever. So ``wait`` raises at the first failure of any process.
    """

    started = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.started.append(self)

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for the end of this process, or for the first failure."""
        while self.poll() is None:
            for process in self.started:
                if process.poll():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
            time.sleep(0.1)
        return self.returncode


def show_own_gpus(processes: int) -> None:
    """Let the workers see one GPU each, and no other.

    DeiT's first barrier uses GPU RANK % number of GPUs before torch 2.6: without this, the second
    of two machines with 4 processes would use the other 4 of its 8 GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes))))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:processes])


def launch(machines: Machines, folder: str, args: Namespace, saved: str) -> int:
    """Start a worker for each process, with ``folder`` as its argument; return the exit status.

    saved: how much of the run is saved already, for Ctrl-C, or "".
    """
    _tell_workers(machines, folder, args, saved)
    tempfile.tempdir = folder  # for torch's own files
    signal.signal(signal.SIGINT, lambda *_: interrupted(args, machines))  # until torch handles it
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    _, _, module, *sys.argv[1:] = command(machines, folder)
    is_old = not module.endswith("run")  # before torch 1.9
    if is_old:
        subprocess.Popen = _OfOldLauncher
        # As newer launchers do. Without it, NCCL waits forever when another machine fails.
        os.environ.setdefault("NCCL_ASYNC_ERROR_HANDLING", "1")
    if machines.nodes > 1:
        _announce_the_wait(machines, 30 if is_old else WAIT)
    if machines.nodes > 1 and not is_old:
        # torch waits for the others in C++, where no handler of Python's runs, so that Ctrl-C has
        # to end this process without our line. Once its processes have started, torch handles the
        # signal itself (but not torch 1.9).
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return import_module(module).main() or 0
    except subprocess.CalledProcessError as error:  # before torch 1.9
        return _status_of("a process", error.returncode, args, machines)
    except Exception as error:
        if hasattr(error, "sigval"):  # SignalException, which torch 1.9 does not have
            if error.sigval == signal.SIGINT:
                interrupted(args, machines)
            return 128 + error.sigval
        if not hasattr(error, "get_first_failure"):  # ChildFailedError
            raise  # such as torch's when the machines did not meet
        rank, failure = error.get_first_failure()
        return _status_of(f"rank {rank}", failure.exitcode, args, machines)


def _tell_workers(machines: Machines, folder: str, args: Namespace, saved: str) -> None:
    """Set the environment of the workers."""
    os.environ[errors.LAUNCHER] = str(os.getpid())
    os.environ[errors.FIRST_FAILURE] = os.path.join(folder, "first-failure")
    os.environ[errors.STATUS] = os.path.join(folder, "status")
    errors.write_status(saved)
    if os.environ.get(LOG_LEVEL) == "FATAL":  # see prepare
        os.environ[LOG_LEVEL] = "ERROR"
    if args.device == "cuda":
        show_own_gpus(machines.processes)


def _announce_the_wait(machines: Machines, minutes: int) -> None:
    others = "machine 1" if machines.node_rank else f"{machines.nodes - 1} more"
    print(f"This is machine {machines.node_rank + 1} of {machines.nodes}, waiting for {others} at "
          f"{machines.address}:{machines.port}, at most {minutes} minutes", flush=True)


def _status_of(who: str, status: int, args: Namespace, machines: Machines) -> int:
    """The exit status after a process failed; says so if the process was killed, and could not."""
    if status >= 0:
        return status
    if status == -signal.SIGINT:  # Ctrl-C, which has reached that process before this one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupted(args, machines)
    # NCCL's watchdog aborts a process that waited for another in vain.
    hint = {signal.SIGKILL: ": out of memory?",
            signal.SIGABRT: ": has another machine or process stopped?"}.get(-status, "")
    sys.stderr.write(f"error: {who} was ended by {signal.Signals(-status).name}{hint}\n")
    return 128 - status


def interrupted(args: Namespace, machines: Machines) -> None:
    """Say how much of the run is saved, and exit. Its processes end with this one."""
    saved = errors.read_status()
    text, again = (saved, "continues") if saved else ("nothing saved yet", "starts again")
    if args.eval:
        text, again = "the evaluation is not finished", "starts again"
    elif machines.node_rank:
        text, again = "the first machine saves the run", "continues"
    without = " without --overwrite" if args.overwrite else ""
    sys.stderr.write(f"interrupted: {text}; the same command{without} {again}\n")
    sys.exit(128 + signal.SIGINT)


def interrupted_while_deciding(*_: Any) -> None:
    """Exit at once: an exception would be caught by whatever is asking a library something."""
    sys.stderr.write("interrupted: nothing was started; the same command starts again\n")
    errors.end(128 + signal.SIGINT)
