"""What the tests share: small data, a converted checkpoint, and readers of what a run leaves."""
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads would not survive a fork

import pytest  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & ignores

import torch  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

import generate  # noqa: E402
from launches import (  # noqa: E402
    DEIT,
    DEPTH,
    FORK,
    REAL_DEIT,
    ROOT,
    SCRIPTS,
    TESTS,
    WIDTH,
    command,
    environment,
    fork,
    run_by_shell,
)

sys.path[:0] = [str(ROOT), str(SCRIPTS)]
sys.path.append(str(TESTS / "mini_deit"))

import convert_to_deit  # noqa: E402
import finetune  # noqa: E402
from deit_plugin import deit, errors  # noqa: E402

# The miniature has the faults of all three commits, in turn; a real checkout has its own.
ERAS = [None] if REAL_DEIT else os.environ.get("MINI_DEIT_ERA", "2020 2021 head").split()
TRAIN_IMAGES = {"cifar10": 50, "cifar100": 50, "flowers": 49, "pets": 49}


def cells(*fast, recipes=tuple(TRAIN_IMAGES)):
    """Parameters: each recipe in each DeiT. If there are many, all but the ``fast`` are slow."""
    return [pytest.param(recipe, era, marks=[] if len(ERAS) == 1 or (recipe, era) in fast
                         else pytest.mark.slow) for era in ERAS for recipe in recipes]


def version_of(module):
    """Such as (1, 0, 31)."""
    return tuple(map(int, re.findall(r"\d+", module.__version__)[:3]))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--all"):
        pytest.skip("slow: tests/run.sh --all")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The data sets, named like their --data-set: TRAIN_IMAGES and 21 test images per recipe."""
    folder = tmp_path_factory.mktemp("data")
    generate.images(folder / "folder")
    generate.imagenet(folder / "imagenet")
    generate.flowers(folder / "flowers")
    generate.pets(folder / "pets")
    for name in ("cifar10", "cifar100"):
        generate.cifar(folder / name, name)
    return folder


@pytest.fixture
def own(data, tmp_path):
    """Somebody's own images, for --data-set folder, to be changed."""
    return Path(shutil.copytree(data / "folder", tmp_path / "own"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A converted checkpoint that fits MODEL."""
    folder = tmp_path_factory.mktemp("checkpoint")
    moco, converted = folder / "moco.pth.tar", folder / "converted.pth"
    generate.moco_checkpoint(moco, width=WIDTH, depth=DEPTH)
    convert_to_deit.main(["--input", str(moco), "--output", str(converted)])
    return converted


@pytest.fixture
def flags(data, checkpoint, tmp_path):
    """What a Pets run needs: weights, data, and a folder, which is tmp_path / "run"."""
    return ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path / "run"]


@pytest.fixture(scope="session")
def finished(data, checkpoint, tmp_path_factory):
    """The folder of a Pets run that is over: two epochs, each evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    train("pets", "--resume", checkpoint, "--data-path", data / "pets", "--output_dir", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to be changed, in the folder that ``flags`` name."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def decide():
    """decide(recipe, *flags, **variables): the Decision on a launch, which is not started.

    A forked process decides, since to import DeiT patches timm and Pillow. The model stays there.
    """
    def ask(recipe, *flags, small=True, **variables):
        words = run_by_shell(command(recipe, *flags, small=small)).stdout.splitlines()[1:]
        return forked(_decide, words, environment(**variables))

    return ask


def forked(function, *arguments):
    """Its result. Once autograd has run in a process, torch 1.7 forks no launch from there."""
    with FORK.Pool(1) as pool:
        return pool.apply(function, arguments)


def _decide(words, variables):
    os.environ.clear()
    os.environ.update(variables)
    return finetune.decide(deit.import_main(), words)._replace(model=None)


@pytest.fixture
def refusal(decide):
    """refusal(recipe, *flags, **variables): the one line that says why a launch cannot work."""
    def refuse(recipe, *flags, **options):
        try:
            problems = decide(recipe, *flags, **options).problems
        except errors.UserError as error:  # argparse's, which ends the parsing
            problems = error.args
        assert len(problems) == 1 and "\n" not in problems[0], problems
        return problems[0]

    return refuse


def copy_deit(folder):
    """A copy of the DeiT, to be changed; the folder."""
    return Path(shutil.copytree(DEIT, folder, ignore=shutil.ignore_patterns(".git")))


def copy_bundle(folder, *tests):
    """Copy what users copy, and tests if named, into a folder that may exist; the folder."""
    for name in ("scripts", *tests):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def train(recipe, *flags, **options):
    """As ``fork``, and it must succeed."""
    done = fork(recipe, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


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


def results_of(folder):
    """The log without its times."""
    return [{name: value for name, value in row.items() if "seconds" not in name}
            for row in log_of(folder)]


def assert_rates(folder, epochs, warmup, peak):
    """Linear warm-up, then a cosine. DeiT steps the schedule late, by one epoch."""
    def rate(epoch):
        if epoch < warmup:
            return 1e-6 + epoch * (peak - 1e-6) / warmup
        return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    expected = [rate(max(0, epoch - 1)) for epoch in range(epochs)]
    assert rates_of(folder) == pytest.approx(expected, rel=1e-9)


def saved(path, **options):
    return convert_to_deit.load(str(path), **options)


def vit_of(state, size, heads):
    """timm's own model with these tensors, for images of ``size`` pixels."""
    model = VisionTransformer(
        img_size=size, embed_dim=state["cls_token"].shape[-1], num_heads=heads, qkv_bias=True,
        depth=sum(name.endswith("norm1.bias") for name in state),
        num_classes=len(state.get("head.bias", ())),
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    model.load_state_dict(state)
    return model.eval()


def rewrite(path, change):
    """Replace a checkpoint by what ``change`` makes of its content; the old one may be mapped."""
    torch.save(change(saved(path)), f"{path}.new")
    os.replace(f"{path}.new", path)
