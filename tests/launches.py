"""Launches of a recipe: as users do it, or forked to save time. Those to kill are in underway.py.

A forked launch imports nothing anew: finetune.py is forked from pytest, the workers from it.

The DeiT is the miniature in mini_deit/ or, with DEIT_DIR set, a real checkout. Most tests need one
process and one era of the miniature (its HEAD); where two or all matter, the test says so.
"""
import argparse
import functools
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
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
FORK = multiprocessing.get_context("fork")
REAL_DEIT = os.environ.get("DEIT_DIR")
DEIT = Path(REAL_DEIT or TESTS / "mini_deit").resolve()
# tests/gpu sets these: the number of GPUs, which launches then use, and more flags of theirs.
GPUS, ON_GPUS = int(os.environ.get("GPUS", 0)), os.environ.get("ON_GPUS", "--device cpu").split()
PAIR = 1 if GPUS == 1 else 2  # processes
# Width, depth and name of a model that trains in seconds, and of another one.
MODEL, WIDTH, DEPTH, OTHER_MODEL = (
    ("deit_tiny_patch16_224", 192, 12, "deit_small_patch16_224") if REAL_DEIT
    else ("deit_micro_patch16_224", 64, 2, "deit_tiny_patch16_224"))


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


def launch(recipe, *flags, scripts=SCRIPTS, **variables):
    """Launch a recipe as users do; return the completed process with its output as text."""
    return subprocess.run(command(recipe, *flags, scripts=scripts), capture_output=True, text=True,
                          timeout=300, env=environment(**variables))


def fork(recipe, *flags, **options):
    """What ``launch`` does, forked. For the options see ``start_fork``."""
    return start_fork(recipe, *flags, **options)()


def start_fork(recipe, *flags, processes=1, scripts=SCRIPTS, small=True, script=None, before=None,
               **variables):
    """Start a forked launch; return a function that waits for its end.

    script: path of one to run in place of the worker, with all flags; before: called before
    anything else, to change what is imported.
    """
    shown = run_by_shell(command(recipe, *flags, scripts=scripts, small=small), **variables)
    if shown.returncode:
        return lambda: shown
    finetune, *words = shown.stdout.splitlines()

    def change():
        if before:
            before()
        fork_workers_in_place_of_torch([script, *words] if script else None)

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
    process = FORK.Process(target=_become, args=(Path(script), list(map(str, arguments)),
                                                 variables, before, outputs))
    process.start()

    def finish():
        with folder:
            _, status = end_together([process])
            return subprocess.CompletedProcess(arguments, status, *map(Path.read_text, outputs))

    return finish


def end_together(processes):
    """Wait for the processes; the first that fails ends all. Its rank and status, or 0 and 0."""
    alive = {process.sentinel: rank for rank, process in enumerate(processes)}
    try:
        while alive:
            ended = connection.wait(alive, timeout=300)
            if not ended:
                for rank in alive.values():  # pytest's fault handler shows where it waits
                    os.kill(processes[rank].pid, signal.SIGABRT)
                raise AssertionError("no process has ended in 5 minutes")
            for rank in map(alive.pop, ended):
                processes[rank].join()
                if processes[rank].exitcode:
                    return rank, processes[rank].exitcode
        return 0, 0
    finally:
        for rank in alive.values():
            processes[rank].kill()
            processes[rank].join()


def _become(script, arguments, variables, before, outputs):
    """Be a fresh process."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep)
    accept_made_up_cifar()
    _forget_and_run(script, arguments, before)


def _forget_and_run(script, arguments, before=None):
    """Run a script as if nothing of ours or of DeiT's had been imported yet."""
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__file__", None) or "")
        if file.startswith((str(ROOT), str(DEIT))) and "site-packages" not in file:
            del sys.modules[name]
    ours = {str(folder) for folder in (TESTS, TESTS / "mini_deit", DEIT, ROOT, SCRIPTS)}
    sys.path[:] = [str(Path(script).parent), *(path for path in sys.path if path not in ours)]
    if before:
        before()
    _run(script, arguments)


def _run(script, arguments):
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def fork_workers_in_place_of_torch(words=None):
    """Have torch's launcher fork its processes from this one; words: what they run instead."""
    try:
        import torch.distributed.run as torch_launcher
    except ImportError:  # before torch 1.9
        import torch.distributed.launch as torch_launcher

    def main():
        parser = argparse.ArgumentParser()
        for name in ("nproc_per_node", "nnodes", "node_rank", "master_port"):
            parser.add_argument(f"--{name}", type=int)
        parser.add_argument("--master_addr")
        args, (*_, worker, folder) = parser.parse_known_args()
        run = functools.partial(_forget_and_run, words[0], words[1:]) if words else (
            functools.partial(_run, worker, [folder]))
        workers = []
        for local in range(args.nproc_per_node):
            told = {"RANK": args.node_rank * args.nproc_per_node + local, "LOCAL_RANK": local,
                    "WORLD_SIZE": args.nnodes * args.nproc_per_node,
                    "MASTER_ADDR": args.master_addr, "MASTER_PORT": args.master_port}
            workers.append(FORK.Process(target=_become_worker, args=(told, run)))
            workers[-1].start()
        rank, status = end_together(workers)
        if status:
            failure = subprocess.CalledProcessError(status, worker)
            if torch_launcher.__name__.endswith("run"):
                failure = Exception()
                failure.get_first_failure = lambda: (rank, SimpleNamespace(exitcode=status))
            raise failure

    torch_launcher.main = main


def _become_worker(variables, run):
    os.environ.update({name: str(value) for name, value in variables.items()})
    logging.disable(logging.NOTSET)
    warnings.resetwarnings()  # as Python starts: the launcher has silenced all
    for category in (PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    run()


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


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)
