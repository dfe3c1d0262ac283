"""Launches of a recipe: as users do it, or forked to save time. Those to kill are in underway.py.

The DeiT is the miniature in mini_deit/ or, with DEIT_DIR set, a real checkout. Most tests need one
process and one era of the miniature (its HEAD); where two or all matter, the test says so.
"""
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
from multiprocessing import connection
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
REAL_DEIT = os.environ.get("DEIT_DIR")
DEIT = Path(REAL_DEIT or TESTS / "mini_deit").resolve()
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
    words = ("bash", scripts / f"{recipe}.sh", "--device", "cpu", "--num_workers", "0", *short,
             *flags)
    return [str(part) for part in words]


def as_published(words, script=(TESTS / "published.py",)):
    """The complete command of a launch, with the published procedure in place of finetune.py.

    Flags that DeiT does not have are ignored there.
    """
    complete = subprocess.run([*words, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True,
                              env=environment()).stdout
    return [str(part) for word in shlex.split(complete)
            for part in (script if word.endswith("/finetune.py") else [word])]


def launch(recipe, *flags, scripts=SCRIPTS, **variables):
    """Launch a recipe as users do; return the completed process with its output as text."""
    return subprocess.run(command(recipe, *flags, scripts=scripts), capture_output=True, text=True,
                          timeout=300, env=environment(**variables))


def fork(recipe, *flags, processes=1, scripts=SCRIPTS, small=True, script=None, before=None,
         by_hand=False, **variables):
    """What ``launch`` does, without torch's launcher: its processes are forked from this one.

    That saves the seconds that each of them would take to import torch.

    script: path of one to run in place of finetune.py; before: called in each process before the
    script, to change what it imports; by_hand: as if no launcher had started it.
    """
    shown = subprocess.run(
        command(recipe, "--dry-run", *flags, scripts=scripts, small=small), capture_output=True,
        text=True, env=environment(processes, **variables))
    if shown.returncode or not shown.stdout.startswith("env "):
        return shown
    words = shlex.split(shown.stdout)
    start = next(index for index, word in enumerate(words) if word.endswith("/finetune.py"))
    given = dict(word.split("=", 1) for word in words[1:start] if "=" in word)
    by_hand = by_hand or "--nnodes" not in words[:start]  # as --check and --all-flags
    variables = {**given, **environment(processes, **variables),
                 "NPROC_PER_NODE": given["NPROC_PER_NODE"]}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)} for port in [free_port()] for rank in range(processes)]
    return fork_script(script or words[start], *words[start + 1:], variables=variables,
                       ranks=[{}] if by_hand else ranks, before=before)


def fork_script(script, *arguments, variables, ranks=({},), before=None):
    """Run a Python script as a process for each of ``ranks``, which have variables of their own."""
    with tempfile.TemporaryDirectory() as folder:
        if len(ranks) > 1:  # one of them says why all of them end
            variables = {**variables, "FINETUNE_FIRST_FAILURE": os.path.join(folder, "first")}
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        started = [multiprocessing.get_context("fork").Process(
            target=_become, args=(Path(script), list(map(str, arguments)), {**rank, **variables},
                                  before, outputs)) for rank in ranks]
        for process in started:
            process.start()
        status = _end_together(started)
        return subprocess.CompletedProcess(arguments, status, *map(Path.read_text, outputs))


def _end_together(processes):
    """Wait for the processes; the first that fails ends all, as with torch's launcher."""
    status, alive = 0, {process.sentinel: process for process in processes}
    try:
        while alive and not status:
            ended = connection.wait(alive, timeout=300)
            if not ended:
                for process in alive.values():  # pytest's fault handler shows where it waits
                    os.kill(process.pid, signal.SIGABRT)
                raise AssertionError("no process has ended in 5 minutes")
            for process in map(alive.pop, ended):
                process.join()
                status = status or process.exitcode
    finally:
        for process in alive.values():
            process.kill()
            process.join()
    return status


def _become(script, arguments, variables, before, outputs):
    """Be a fresh process of a launch: nothing of ours or of DeiT's is imported yet."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [str(script), *arguments]
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__file__", None) or "")
        if file.startswith(str(ROOT)) and "site-packages" not in file:
            del sys.modules[name]
    ours = {str(folder) for folder in (TESTS, TESTS / "mini_deit", ROOT, SCRIPTS)}
    sys.path[:] = [str(script.parent), *variables.get("PYTHONPATH", "").split(os.pathsep),
                   *(path for path in sys.path if path not in ours)]
    accept_made_up_cifar()
    if before:
        sys.path.append(str(ROOT))
        before()
        sys.path.remove(str(ROOT))
    runpy.run_path(str(script), run_name="__main__")


def accept_made_up_cifar():
    """torchvision refuses CIFAR files whose md5 is not the official one."""
    from torchvision.datasets import cifar

    cifar.check_integrity = lambda path, md5=None: os.path.isfile(path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def after_saving(action):
    """For ``fork``'s before: call ``action`` once checkpoint.pth has been written."""
    def change():
        import convert_to_deit

        save = convert_to_deit.save

        def save_and_act(state, path):
            save(state, path)
            if path.endswith("/checkpoint.pth"):
                action()

        convert_to_deit.save = save_and_act

    return change


def limit_file_size():
    """Stands for the full disk: both fail a write in torch's C++."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))


def fill_the_disk():
    """What was written does not reach the disk."""
    os.fsync = lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x")


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)
