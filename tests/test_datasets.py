"""The data sets: what they yield, what they refuse and advise, and how they are downloaded."""

import builtins
import errno
import functools
import hashlib
import http.server
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import scipy.io
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402  found through the path set above
import generate  # noqa: E402
from oxford_flowers_dataset import Flowers  # noqa: E402
from oxford_pets_dataset import Pets  # noqa: E402

# Small sets are meant to warn about their number of images.
pytestmark = [pytest.mark.filterwarnings("ignore:.*official data set"),
              pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]
CLASSES = {"cifar10": 10, "cifar100": 100, "flowers": 102, "pets": 37, "folder": 3}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small folder of each data set, named like its --data-set."""
    folder = tmp_path_factory.mktemp("made")
    generate.flowers(folder / "flowers", train_per_class=2, test_per_class=1, size=(20, 16))
    generate.pets(folder / "pets", train_per_class=2, test_per_class=1, size=(20, 16))
    generate.cifar(folder / "cifar10", "cifar10", 50, 20, archive=folder / "cifar-10-python.tar.gz")
    generate.cifar(folder / "cifar100", "cifar100", 200, 100)
    for number in range(12):
        image = folder / "folder" / ("train", "val")[number // 6] / "abc"[number % 3] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16), number).save(image)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """Copies one of the made folders, to be changed."""

    def copy(name):
        shutil.copytree(str(made / name), str(tmp_path / name))
        return tmp_path / name

    return copy


@pytest.fixture
def any_cifar(monkeypatch):
    """Let torchvision take the CIFAR files made here for the official ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity",
                        lambda path, md5=None: os.path.isfile(path))


def build(name, root, train=True, **options):
    args = Namespace(data_set=name, data_path=str(root), input_size=32, reprob=0.0, **options)
    return datasets.build_dataset(train, args)[0]


def refusal(name, root, kind=FileNotFoundError, **options):
    """The one line that says why a data set cannot be built."""
    with pytest.raises(kind) as error:
        build(name, root, **options)
    text = str(error.value)
    assert "\n" not in text and "[Errno" not in text.split("cannot download")[0]
    return text


def files_in(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


# --- transforms and items -----------------------------------------------------------------------


@pytest.mark.parametrize("is_train, reprob", [(True, 0.0), (True, 0.7), (False, 0.7)])
def test_transforms_are_the_published_ones(is_train, reprob):
    steps = [transforms.RandomResizedCrop((57, 57), scale=(0.05, 1.0)),
             transforms.RandomHorizontalFlip()]
    if not is_train:
        steps = [transforms.Resize(int((256 / 224) * 57)), transforms.CenterCrop(57)]
    steps += [transforms.ToTensor(),
              transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    if is_train and reprob:
        steps.append(RandomErasing(reprob, mode="pixel", max_count=2, device="cpu"))
    args = Namespace(input_size=57, reprob=reprob, remode="pixel", recount=2)
    outcomes = []
    for transform in (transforms.Compose(steps), datasets.build_transform(is_train, args)):
        random.seed(0)
        torch.manual_seed(0)
        images = [transform(Image.effect_noise((90, 60), 80).convert("RGB").point(lambda v: v // 3))
                  for _ in range(0)] or [transform(gradient(*size)) for size in 5 * [(90, 60), (40, 75)]]
        outcomes.append((torch.stack(images), torch.get_rng_state(), random.getstate()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1]) and outcomes[0][2] == outcomes[1][2]
