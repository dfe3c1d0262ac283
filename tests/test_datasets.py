"""The data sets: what they yield, what they refuse, how they are downloaded and divided."""
import functools
import http.server
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy
import pytest
import scipy.io
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, cifar
from torchvision.datasets.utils import calculate_md5, check_integrity

import datasets
import published
from deit_plugin import deit
from deit_plugin.data import load, split
from deit_plugin.errors import UserError
from launches import FORK, accept_made_up_cifar
from oxford_flowers_dataset import Flowers
from oxford_pets_dataset import Pets


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    """As launches are: for made-up CIFAR, and for RandAugment with the newest Pillow."""
    monkeypatch.setattr(cifar, "check_integrity", cifar.check_integrity)
    monkeypatch.setattr(ImageOps, "posterize", ImageOps.posterize)
    accept_made_up_cifar()
    deit.restore_posterize()


@pytest.fixture
def copy(data, tmp_path):
    """Copies the folder of a data set, to be changed."""
    return lambda name: Path(shutil.copytree(data / name, tmp_path / "a" / "b" / name))


def arguments(name, root, **changed):
    known = {"input_size": 32, "reprob": 0.0, "hold_out": 0.0, "eval": False, "eval_freq": 1}
    return Namespace(data_set=name, data_path=str(root), **{**known, **changed})


def build(name, root, train=True, **changed):
    return datasets.build_dataset(train, arguments(name, root, **changed))[0]


def refusal(name, root, **changed):
    """The one line that says why a run cannot have these data."""
    with pytest.raises(UserError) as error:
        load(arguments(name, root, **changed))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name, size, more", [
    *[(name, size, {}) for name in ("cifar10", "cifar100", "flowers", "pets")
      for size in (53, 224)],
    *[("imagenet", size, more) for size in (32, 53, 224)
      for more in ({"eval_crop_ratio": 0.9}, {"aa": None})]])
def test_images_labels_and_transforms_are_the_published_ones(data, name, size, more, is_train):
    args = arguments(name, data / name, input_size=size, reprob=0.25 * (name == "imagenet"),
                     remode="pixel", recount=1, color_jitter=0.3, train_interpolation="bicubic",
                     **{"aa": "rand-m9-mstd0.5-inc1", **more})
    found, names = [], []
    for build_dataset in (published.build_dataset, datasets.build_dataset):
        dataset, classes = build_dataset(is_train, args)
        names.append(getattr(dataset, "classes", None))
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        some = range(0, len(dataset), 10 if size == 224 else 1)
        images, labels = zip(*map(dataset.__getitem__, some))
        found.append((classes, labels, torch.stack(images)))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
    assert len(names[1]) == classes and names[0] in (names[1], None)  # or known by number only
    assert [dataset.targets[index] for index in some] == list(labels)
    assert all(type(label) is int for label in labels)


def test_random_erasing_after_normalisation():
    args = Namespace(input_size=53, reprob=1.0, remode="const", recount=1)
    image = Image.effect_noise((60, 60), 50).convert("RGB")
    erased = [(datasets.build_transform(is_train, args)(image) == 0).any()
              for is_train in (True, False)]
    assert erased == [True, False]


@pytest.mark.parametrize("name, change, says", [
    ("pets", "echo cat_2 > annotations/trainval.txt", "trainval.txt: .*'cat_2'"),
    ("pets", "echo cat_1 38 > annotations/trainval.txt", "trainval.txt: .* 37, found 'cat_1 38'"),
    ("pets", "echo > annotations/trainval.txt", "trainval.txt lists no images"),
    ("flowers", "echo '<!DOCTYPE html>' > imagelabels.mat", "imagelabels.mat: cannot read"),
    ("flowers", "mv setid.mat setid.MAT", "rename .*/setid.MAT to .*/setid.mat"),
    ("flowers", "mv jpg JPG", "rename .*/flowers/JPG to .*/flowers/jpg$"),
    ("pets", "mv images/dog_breed2_1.jpg images/dog_breed2_1.PNG", "_1.PNG to .*_1.jpg$"),
    ("pets", "for name in *; do mv $name in; mkdir $name; mv in $name/$name; done",  # Kaggle's
     r"pets/images/images/\*.jpg to .*pets/images/\*.jpg, .*annotations/trainval.txt"),
    ("folder", "mv train Train", "rename .*/folder/Train to .*/folder/train$"),
    ("folder", "mv val Val", "rename .*/folder/Val to .*/folder/val$"),
    ("folder", "rm -r train", "train is missing; .*val/CLASS.*test/CLASS"),
    ("folder", "rm -r val/bee", "same class.*only train/ has bee"),
    ("folder", "rm -r train/cow", "same class.*only val/ has cow"),
    ("folder", "mv val/ant 'val/ant '", "only val/ has 'ant '"),
    ("folder", "rm -r */[ab]*", "train must have two or more.* it has 1"),
    ("folder", "rm train/[ab]*/*", "train: no images of the classes ant, bee;"),
    ("folder", "rm val/ant/*; echo > val/ant/a.heic", "1 .heic; convert HEIC .* pillow-heif"),
    ("folder", "rm -r val/*; echo > val/1.JPEG", "it has 0, and 1 files.*valprep.sh"),
])
def test_what_is_wrong_with_a_folder_is_named(copy, name, change, says):
    """Before anything is downloaded."""
    folder = copy(name)
    subprocess.run(["bash", "-euc", change], cwd=folder, check=True)
    line = refusal(name, folder, download=True)
    assert re.search(says, line) and str(folder) in line and "--download" not in line, line


def test_a_flower_of_a_class_that_does_not_exist(copy):
    path = copy("flowers") / "imagelabels.mat"
    scipy.io.savemat(str(path), {"labels": [[1, 103]]})
    assert re.search(f"{path}: .* 1 to 102: .* 1 to 103", refusal("flowers", path.parent))


def test_unofficial_cifar_is_not_unpickled(data, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", check_integrity)
    line = refusal("cifar10", data / "cifar10")
    assert "cifar-10-batches-py" in line and "md5" in line and "delete" in line


@pytest.mark.parametrize("name", ["cifar10", "flowers", "pets", "folder"])
def test_data_one_level_off(copy, name):
    folder = copy(name)
    inside = next(path for path in folder.iterdir() if path.is_dir())
    for passed in (inside, folder.parent):
        assert refusal(name, passed, download=True).endswith(f"--data-path {folder}")


@pytest.mark.parametrize("name", ["flowers", "pets"])
def test_nothing_there(tmp_path, name):
    line = refusal(name, tmp_path / "nowhere")
    assert all(word in line for word in
               [*datasets.DATA_SETS[name].layout, "--download", "https://"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file.tgz").touch()
    assert "is a file" in refusal(name, tmp_path / "file.tgz")


@pytest.fixture
def served(data, tmp_path, monkeypatch):
    """A server of this machine with the files of the data sets; returns the list of downloads."""
    folder, downloads = tmp_path / "served", []
    shutil.copytree(data / "flowers", folder)
    for archive, source in (("102flowers.tgz", "flowers/jpg"), ("images.tar.gz", "pets/images"),
                            ("annotations.tar.gz", "pets/annotations"),
                            ("cifar-10-python.tar.gz", "cifar10/cifar-10-batches-py")):
        with tarfile.open(folder / archive, "w:gz") as tar:
            tar.add(data / source, Path(source).name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            if self.headers.get("Method") != "HEAD":  # newer torchvision asks twice
                downloads.append(os.path.basename(self.path))

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("no_proxy", "*")
        for cls in (Flowers, Pets):
            monkeypatch.setattr(cls, "url", url)
            for name in cls.md5:
                monkeypatch.setitem(cls.md5, name, calculate_md5(folder / name))
        monkeypatch.setattr(CIFAR10, "url", url + CIFAR10.filename)
        monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(folder / CIFAR10.filename))
        yield downloads
        server.shutdown()


def download(name, root):
    for train in (True, False):
        build(name, root, train, download=name != "cifar10")  # which needs no --download


@pytest.mark.parametrize("name", ["cifar10", "flowers", "pets"])
def test_eight_processes_download_once(served, tmp_path, name):
    with FORK.Pool(8) as pool:
        pool.starmap_async(download, [(name, tmp_path / "new")] * 8, chunksize=1).get(60)
    assert sorted(served) == sorted(datasets.DATA_SETS[name].md5)


@pytest.mark.parametrize("name, part, archive", [
    ("flowers", "jpg/*", "102flowers.tgz"), ("pets", "images/dog*", "images.tar.gz"),
    ("cifar10", "*/data_batch_5", "cifar-10-python.tar.gz"),
])
def test_half_a_download_is_gone_on_with(served, copy, name, part, archive):
    folder = copy(name)
    for path in sorted(folder.glob(part))[::2]:  # as if it had been killed while it unpacked
        path.unlink()
    (folder / archive).write_bytes(b"half of it")
    if name != "cifar10":
        found, official = calculate_md5(folder / archive), datasets.DATA_SETS[name].md5[archive]
        line = refusal(name, folder)
        assert "--download" in line and f"{archive} is {found} instead of {official}" in line
        assert served == []
    build(name, folder, download=True)
    assert served == [archive]


def test_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(Pets, "url", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "*")
    line = refusal("pets", tmp_path / "new", download=True)
    for words in ("cannot download", "again", f"{', '.join(Pets.md5)} into {tmp_path}/new"):
        assert words in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share, held_out", [(0.2, 7), (0.22, 14), (0.01, 7), (0.99, 42)])
def test_hold_out_takes_a_share_of_each_class(share, held_out):
    images = Namespace(targets=[number % 7 for number in range(49)], classes=list("abcdefg"),
                       samples=list(range(49)), transform="augment")
    kept, out = split(images, share, "evaluate")
    again, _ = split(images, share, "evaluate")
    assert kept.indices == again.indices
    assert sorted(kept.indices + out.indices) == list(range(49)) and len(out.indices) == held_out
    for part in (kept, out):
        assert part.samples == part.indices
        assert part.targets == [index % 7 for index in part.indices]
        assert numpy.ptp(numpy.bincount(part.targets)) == 0 and set(part.targets) == set(range(7))
    kept.transform = "other"  # as DeiT HEAD does
    assert out.transform == "evaluate"


def test_hold_out_needs_two_images_of_a_class():
    with pytest.raises(UserError, match="class h has only one"):
        split(Namespace(targets=[0, 0, 1], classes=["g", "h"], samples=[]), 0.2, None)


def test_hold_out_of_many_classes_takes_no_time():
    """To read all labels for each class took a minute with 4000 classes and 200,000 images."""
    images = Namespace(targets=[*range(2000)] * 50, classes=[*range(2000)],
                       samples=[*range(100000)], transform=None)
    began = time.process_time()
    split(images, 0.2, None)
    assert time.process_time() - began < 4


def test_the_data_of_a_held_out_run_are_found_as_for_training(served, tmp_path):
    flags, root = {"hold_out": 0.2, "eval": True}, tmp_path / "a" / "b"
    assert len(load(arguments("pets", root, download=True, **flags)).test) == 7 and served
    assert f"pass --data-path {root}" in refusal("pets", root.parent, **flags)
    assert "--hold-out 0 " in refusal("pets", tmp_path / "gone", **flags)


@pytest.mark.parametrize("module", [None, mock.Mock(flock=mock.Mock(side_effect=OSError))],
                         ids=["Windows", "no locks"])
def test_without_a_lock(served, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "fcntl", module)
    with pytest.warns(UserWarning, match="without a lock"):
        build("pets", tmp_path / "new", download=True)
