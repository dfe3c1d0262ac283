"""Launches of a recipe, forked to save time. Those as users start them are in underway.py.

A forked launch imports nothing anew: finetune.py is forked from pytest, the workers from it.

The DeiT is the miniature in mini_deit/ or, with DEIT_DIR set, a real checkout. Most tests need one
process and one era of the miniature (its HEAD); where two or all matter, the test says so.
"""
import logging
import multiprocessing
import os
import resource
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import connection
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
FORK = multiprocessing.get_context("fork")
REAL_DEIT = os.environ.get("DEIT_DIR")
DEIT = Path(REAL_DEIT or TESTS / "mini_deit").resolve()
# tests/gpu sets these: the number of GPUs, which launches then use, and more flags of theirs.
GPUS, ON_GPUS = int(os.environ.get("GPUS", 0)), os.environ.get("ON_GPUS", "--device cpu").split()
PAIR = 1 if GPUS == 1 else 2  # processes
# A model that trains in seconds.
MODEL, WIDTH, DEPTH = (("deit_tiny_patch16_224", 192, 12) if REAL_DEIT
                       else ("deit_micro_patch16_224", 64, 2))


def environment(processes=1, era=None, **variables):
    """The environment of a launch: DEIT, this Python, and ``variables``; None removes one."""
    known = {"DEIT_DIR": str(DEIT), "PYTHON": sys.executable, "NPROC_PER_NODE": str(processes),
             "MINI_DEIT_ERA": era}
    merged = {**os.environ, **known, **variables}
    return {name: str(value) for name, value in merged.items() if value is not None}


def command(recipe, *flags, scripts=SCRIPTS, small=True):
    """A launch of a recipe that takes seconds, unless it is not ``small``; ``flags`` come last."""
    short = ["--model", MODEL, "--input-size", "32", "--batch-size", "8", "--epochs", "2",
             "--eval-freq", "1", "--save-freq", "1"] if small else []
    words = ("bash", scripts / f"{recipe}.sh", *ON_GPUS, "--num_workers", "0", *short, *flags)
    return [str(part) for part in words]


def as_published(words, processes):
    """The complete command of a launch, with the published procedure in place of ours.

    Flags that DeiT does not have are ignored there.
    """
    shown = subprocess.run([*words, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True,
                           env=environment(processes)).stdout
    torch_runs, main_gets = (shlex.split(line) for line in shown.splitlines()[1::2])
    return [*torch_runs[:-2], str(TESTS / "published.py"), *main_gets[1:]]


def run_code(code, *words, **options):
    """Run code that imports deit_plugin in a new Python, which other words may start."""
    return subprocess.run([*words, sys.executable, "-c", code], text=True, timeout=60, **options,
                          env={**os.environ, "PYTHONPATH": str(SCRIPTS)})


def fork(recipe, *flags, **options):
    """Launch a recipe; return the completed process. For the options see ``start_fork``."""
    return start_fork(recipe, *flags, **options)()


def start_fork(recipe, *flags, processes=1, scripts=SCRIPTS, small=True, script=None, before=None,
               forks_workers=True, **variables):
    """Start a forked launch; return a function that waits for its end.

    script: path of one to run in place of the worker, with all flags; before: called before
    anything else, to change what is imported; forks_workers: or torch's own launcher starts them.
    """
    shown = run_by_shell(command(recipe, *flags, scripts=scripts, small=small), **variables)
    if shown.returncode:
        return lambda: shown
    finetune, *words = shown.stdout.splitlines()

    def change():
        if before:
            before()
        if forks_workers:
            fork_workers_in_place_of_torch(script, words)

    return start_fork_script(finetune, *words, variables=environment(processes, **variables),
                             before=change)


def run_by_shell(words, **variables):
    """Run a recipe with a Python that prints its arguments, one on a line."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "python")
        python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        python.chmod(0o755)
        return subprocess.run(words, capture_output=True, text=True, errors="surrogateescape",
                              env=environment(**{"PYTHON": python, **variables}))


def fork_script(script, *arguments, **options):
    """Run a Python script in a forked process. For the options see ``start_fork_script``."""
    return start_fork_script(script, *arguments, **options)()


def start_fork_script(script, *arguments, variables, before=None):
    """Start a Python script in a forked process; return a function that waits for its end."""
    folder = tempfile.TemporaryDirectory()
    outputs = [Path(folder.name, name) for name in ("stdout", "stderr")]

    def become():
        """Be a new process."""
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.clear()
        os.environ.update(variables)
        accept_made_up_cifar()
        forget_what_is_ours()
        sys.path[:0] = [str(Path(script).parent), *variables.get("PYTHONPATH", "").split(":")]
        if before:
            before()
        run_as_main(script, arguments)

    process = FORK.Process(target=become)
    process.start()

    def finish():
        with folder:
            process.join(300)
            if process.is_alive():  # pytest's fault handler shows where it waits
                os.kill(process.pid, signal.SIGABRT)
                process.join()
            texts = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)

    return finish


def forget_what_is_ours():
    """Import this bundle and DeiT again, from where the next import finds them."""
    def is_ours(path):
        return path.startswith((str(ROOT), str(DEIT))) and "site-packages" not in path

    for name, module in list(sys.modules.items()):
        if is_ours(str(getattr(module, "__file__", None))):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not is_ours(path)]


def run_as_main(script, arguments):
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def fork_workers_in_place_of_torch(script=None, arguments=()):
    """Have torch's launcher fork its processes from this one; script: what they run instead."""
    try:
        import torch.distributed.run as torch_launcher
    except ImportError:  # before torch 1.9
        import torch.distributed.launch as torch_launcher

    def be(rank, local):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(local))
        logging.disable(logging.NOTSET)
        warnings.resetwarnings()  # as Python starts: the launcher has silenced all
        for category in (PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        if script:
            forget_what_is_ours()
            run_as_main(script, arguments)
        else:
            worker, folder = sys.argv[-2:]
            run_as_main(worker, [folder])

    def main():
        def told(name):
            return sys.argv[sys.argv.index(f"--{name}") + 1]

        processes = int(told("nproc_per_node"))
        os.environ.update(
            WORLD_SIZE=str(processes * int(told("nnodes"))), MASTER_ADDR=told("master_addr"),
            MASTER_PORT=told("master_port"))
        first = processes * int(told("node_rank"))
        running = [FORK.Process(target=be, args=(first + local, local))
                   for local in range(processes)]
        for worker in running:
            worker.start()
        while running:
            connection.wait([worker.sentinel for worker in running])
            ended = [worker for worker in running if worker.exitcode is not None]
            for worker in ended:
                if worker.exitcode:  # the others end with this process
                    raise subprocess.CalledProcessError(worker.exitcode, "worker")
                running.remove(worker)

    torch_launcher.main = main


def accept_made_up_cifar():
    """torchvision refuses CIFAR files whose md5 is not the official one."""
    from torchvision.datasets import cifar

    cifar.check_integrity = lambda path, md5=None: os.path.isfile(path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def after_saving(action):
    """For ``fork``'s before: call ``action`` once a checkpoint.pth has been written."""
    def change():
        replace = os.replace

        def replace_and_act(source, target):
            replace(source, target)
            if os.path.basename(target) == "checkpoint.pth":
                action()

        os.replace = replace_and_act

    return change


def limit_file_size():
    """Stands for the full disk: both fail a write in torch's C++."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))


def fill_the_disk():
    """What was written does not reach the disk."""
    os.fsync = lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x")


def print_to_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)
