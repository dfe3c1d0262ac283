"""What the end-to-end tests share: a DeiT, small data, a converted checkpoint, and launches.

The DeiT is the miniature in mini_deit/, or with DEIT_DIR set a real checkout.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import harmless_load  # noqa: E402
import versions  # noqa: E402

versions.trust_namespace()
saved = harmless_load.load
REAL_DEIT = os.environ.get("DEIT_DIR")
DEIT = Path(REAL_DEIT or ROOT / "tests" / "mini_deit").resolve()
MODEL, WIDTH, DEPTH = (("deit_tiny_patch16_224", 192, 12) if REAL_DEIT
                       else ("deit_micro_patch16_224", 64, 2))
# The miniature has the faults of all three commits, in turn; a real checkout has its own.
ERAS = [None] if REAL_DEIT else os.environ.get("MINI_DEIT_ERA", "2020 2021 head").split()
RECIPES = ("cifar10", "cifar100", "flowers", "pets")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with the four data sets, named like their recipes.

    CIFAR has 50 training images, the others 49; all have 21 test images.
    """
    folder = tmp_path_factory.mktemp("data")
    generate.cifar(folder / "cifar10", "cifar10", train=50, test=21)
    generate.cifar(folder / "cifar100", "cifar100", train=50, test=21)
    for write in (generate.flowers, generate.pets):
        write(folder / write.__name__, classes=7, train_per_class=7, test_per_class=3)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A converted checkpoint that fits MODEL: the one named in CONVERTED, or one made here."""
    if os.environ.get("CONVERTED"):
        return Path(os.environ["CONVERTED"])
    folder = tmp_path_factory.mktemp("checkpoint")
    generate.moco_checkpoint(folder / "moco.pth.tar", width=WIDTH, depth=DEPTH)
    converted = folder / "converted.pth"
    subprocess.run([sys.executable, ROOT / "convert_to_deit.py", "--input",
                    folder / "moco.pth.tar", "--output", converted], check=True)
    return converted


def environment(processes=2, **variables):
    """The environment of a launch: with DEIT, this Python, and ``variables``; None removes one."""
    known = {"DEIT_DIR": str(DEIT), "PYTHON": sys.executable, "NPROC_PER_NODE": str(processes)}
    merged = {**os.environ, **known, **variables}
    return {name: value for name, value in merged.items() if value is not None}


def command(recipe, *flags, scripts=ROOT / "scripts"):
    """A launch of a recipe that takes seconds; ``flags`` come last."""
    small = ["--device", "cpu", "--model", MODEL, "--input-size", "32", "--batch-size", "8",
             "--epochs", "2", "--eval-freq", "1", "--save-freq", "1", "--num_workers", "1"]
    return [str(part) for part in (scripts / f"{recipe}.sh", *small, *flags)]


def launch(recipe, *flags, processes=2, era=None, scripts=ROOT / "scripts", **variables):
    """Run a recipe to its end; return the completed process with its output as text."""
    return subprocess.run(command(recipe, *flags, scripts=scripts), capture_output=True,
                          text=True, timeout=600,
                          env=environment(processes, MINI_DEIT_ERA=era, **variables))


def instead(script, recipe, *flags, without=(), **variables):
    """The launch of a recipe with another ``script`` of tests/ in the place of finetune.py.

    without: flags to leave out, with their values.
    """
    printed = launch(recipe, *flags, "--dry-run", **variables).stdout
    arguments = [str(ROOT / "tests" / script) if part.endswith("/finetune.py") else part
                 for part in shlex.split(printed) if not part.startswith("DEIT_DIR=")]
    for flag in without:
        while flag in arguments:
            del arguments[arguments.index(flag):arguments.index(flag) + 2]
    return arguments


def launch_instead(script, recipe, *flags, processes=2, era=None, without=(), **variables):
    """As ``launch``, with another ``script`` of tests/ in the place of finetune.py."""
    arguments = instead(script, recipe, *flags, without=without, processes=processes, **variables)
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600,
                          env=environment(processes, MINI_DEIT_ERA=era, **variables))


def train(recipe, *flags, **options):
    """As ``launch``, and it must succeed."""
    done = launch(recipe, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def errors_of(stderr):
    """The lines of a launch's stderr that are no warnings."""
    return [line for line in stderr.splitlines() if not line.startswith("warning: ")]


def refusal_of(done):
    """The one line of a launch that was refused, with the exit status of a refusal."""
    lines = errors_of(done.stderr)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def log_of(folder):
    """The lines of a run's log.txt, each a dict; invalid JSON fails."""
    lines = Path(folder, "log.txt").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]
