"""The processes of a launch without their launcher, forked from one that has imported torch.

That saves seconds for each. What is about the launcher itself needs a real launch.
"""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
os.environ["OMP_NUM_THREADS"] = "1"  # threads would not survive a fork
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "torchvision",
                                 "timm", "scipy.io"])


def run(script, arguments, variables, processes, altered=""):
    """Run ``processes`` of a Python script; return a subprocess.CompletedProcess.

    variables: the whole environment, to which each process adds what torch's launcher sets; 0
    processes: one, to which it says nothing; altered: lines of Python that run before the script.
    """
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        started = [_context.Process(target=_become, args=(
            str(script), arguments, {**rank, **variables}, altered, outputs))
            for rank in ranks or [{}]]
        for process in started:
            process.start()
        status, running = 0, started
        while running and not status:  # the first that fails ends all, as with torch's launcher
            ended = connection.wait([process.sentinel for process in running], timeout=300)
            status = next((process.exitcode for process in started if process.exitcode), 0)
            assert ended, "not one process has ended in 5 minutes"
            running = [process for process in running if process.is_alive()]
        for process in running:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(arguments, status, *map(Path.read_text, outputs))


def _become(script, arguments, variables, altered, outputs):
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # data workers start as they do by default
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    import any_cifar.sitecustomize  # noqa: F401
    # multiprocessing has put pytest's in here
    ours = {str(folder) for folder in (TESTS, TESTS / "mini_deit", ROOT, ROOT / "scripts")}
    sys.path[:] = [os.path.dirname(script), *variables.get("PYTHONPATH", "").split(os.pathsep),
                   *(path for path in sys.path if path not in ours)]
    if altered:
        sys.path.append(str(ROOT))
        exec(altered, {})
    runpy.run_path(script, run_name="__main__")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
