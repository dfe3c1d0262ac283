"""What the end-to-end tests share: a DeiT, small data, a converted checkpoint, launches.

The DeiT is the miniature in mini_deit/, or with DEIT_DIR set a real checkout. Most tests need one
process and one era of the miniature (its HEAD); where two or all count, the test says so.
"""
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import forked
import generate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
sys.path.append(str(ROOT / "tests" / "mini_deit"))

import convert_to_deit  # noqa: E402

REAL_DEIT = os.environ.get("DEIT_DIR")
DEIT = Path(REAL_DEIT or ROOT / "tests" / "mini_deit").resolve()
MODEL, WIDTH, DEPTH = (("deit_tiny_patch16_224", 192, 12) if REAL_DEIT
                       else ("deit_micro_patch16_224", 64, 2))
# The miniature has the faults of all three commits, in turn; a real checkout has its own.
ERAS = [None] if REAL_DEIT else os.environ.get("MINI_DEIT_ERA", "2020 2021 head").split()
TRAIN_IMAGES = {"cifar10": 50, "cifar100": 50, "flowers": 49, "pets": 49}


def cells(*fast):
    """Parameters: each recipe in each DeiT. The others than ``fast`` are slow if there are many."""
    return [pytest.param(recipe, era, marks=[] if len(ERAS) == 1 or (recipe, era) in fast
                         else pytest.mark.slow) for era in ERAS for recipe in TRAIN_IMAGES]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--all"):
        pytest.skip("slow: tests/run.sh --all")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The data sets, named like their --data-set. Of a recipe's: TRAIN_IMAGES, 21 test images."""
    folder = tmp_path_factory.mktemp("data")
    generate.images(folder / "folder")
    generate.flowers(folder / "flowers")
    generate.pets(folder / "pets")
    for name in ("cifar10", "cifar100"):
        generate.cifar(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A converted checkpoint that fits MODEL; where CONVERTED names a path, that one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    converted = Path(os.environ.get("CONVERTED", folder / "converted.pth"))
    if not converted.exists():
        generate.moco_checkpoint(folder / "moco.pth.tar", width=WIDTH, depth=DEPTH)
        subprocess.run([sys.executable, ROOT / "convert_to_deit.py", "--input",
                        folder / "moco.pth.tar", "--output", converted], check=True)
    return converted


@pytest.fixture
def flags(data, checkpoint, tmp_path):
    """What a Pets run needs: weights, data, and a folder, which is tmp_path / "run"."""
    return ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path / "run"]


def environment(processes=1, era=None, **variables):
    """The environment of a launch: with DEIT, this Python, and ``variables``; None removes one."""
    known = {"DEIT_DIR": str(DEIT), "PYTHON": sys.executable, "NPROC_PER_NODE": str(processes),
             "MINI_DEIT_ERA": era}
    merged = {**os.environ, **known, **variables}
    return {name: value for name, value in merged.items() if value is not None}


def command(recipe, *flags, scripts=ROOT / "scripts"):
    """A launch of a recipe that takes seconds; ``flags`` come last."""
    small = ["--device", "cpu", "--model", MODEL, "--input-size", "32", "--batch-size", "8",
             "--epochs", "2", "--eval-freq", "1", "--save-freq", "1", "--num_workers", "0"]
    return [str(part) for part in (scripts / f"{recipe}.sh", *small, *flags)]


def launch(recipe, *flags, scripts=ROOT / "scripts", **variables):
    """Launch a recipe as users do; return the completed process with its output as text."""
    return subprocess.run(command(recipe, *flags, scripts=scripts), capture_output=True, text=True,
                          timeout=300, env=environment(**variables))


def fork(recipe, *flags, scripts=ROOT / "scripts", script=None, altered="", alone=False,
         **variables):
    """What ``launch`` does, without torch's launcher and in a fraction of the time: see forked.py.

    script: one of tests/ to run in the place of finetune.py; altered: lines of Python to run before
    it; alone: without a process group.
    """
    done = launch(recipe, *flags, "--dry-run", scripts=scripts, **variables)
    if done.returncode:
        return done
    words = shlex.split(done.stdout)
    start = next(index for index, word in enumerate(words) if word.endswith("/finetune.py"))
    alone = alone or "--nnodes" not in words[:start]  # as with --check
    said = dict(word.split("=", 1) for word in words[1:start] if "=" in word)  # after env
    return forked.run(ROOT / "tests" / script if script else words[start], words[start + 1:],
                      {**environment(**variables), **said},
                      0 if alone else variables.get("processes", 1), altered)


def train(recipe, *flags, **options):
    """As ``fork``, and it must succeed."""
    done = fork(recipe, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def after_saving(line):
    """For ``fork``'s altered: a line of Python to run once checkpoint.pth has been written."""
    return f"""
import os, resource, signal
import convert_to_deit
save = convert_to_deit.save
def save_and_more(state, path):
    save(state, path)
    if path.endswith("/checkpoint.pth"):
        {line}
convert_to_deit.save = save_and_more"""


KILLED = after_saving("os.kill(os.getpid(), signal.SIGKILL)")


def error_of(done, status=2):
    """The one line, besides warnings, of a launch that failed with that exit status."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == status, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def log_of(folder):
    """The lines of a run's log.txt, each a dict; invalid JSON fails."""
    lines = Path(folder, "log.txt").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def rates_of(folder):
    return [row["train_lr"] for row in log_of(folder)]


def assert_rates(folder, epochs, warmup, peak, start=1e-6, end=1e-5):
    """Linear warm-up, then a cosine. DeiT steps the schedule late, by one epoch."""
    def rate(epoch):
        if epoch < warmup:
            return start + epoch * (peak - start) / warmup
        return end + (peak - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    expected = [rate(max(0, epoch - 1)) for epoch in range(epochs)]
    assert rates_of(folder) == pytest.approx(expected, rel=1e-9)


def saved(path):
    return convert_to_deit.load(str(path))
