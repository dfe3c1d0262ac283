"""The data sets: what they yield, what they refuse and advise, and how they are downloaded."""
import fcntl
import functools
import http.server
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import tarfile
import threading
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
from deit_plugin.data import load
from deit_plugin.errors import UserError
from launches import accept_made_up_cifar
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
    return lambda name: Path(shutil.copytree(str(data / name), str(tmp_path / "a" / "b" / name)))


def build(name, root, train=True, **options):
    args = Namespace(data_set=name, data_path=str(root), input_size=32, reprob=0.0, **options)
    return datasets.build_dataset(train, args)[0]


def refusal(name, root, kind=FileNotFoundError, **options):
    """The one line that says why a data set cannot be built."""
    with pytest.raises(kind) as error:
        build(name, root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def advice(name, root, download=True):
    """The one line that says where missing data are, even if they could be downloaded."""
    args = Namespace(data_set=name, data_path=str(root), input_size=32, reprob=0.0, hold_out=0.0,
                     eval=False, eval_freq=1, download=download)
    with pytest.raises(UserError) as error:
        load(args)
    assert "\n" not in str(error.value) and "--download" not in str(error.value)
    return str(error.value)


def files_in(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name, size, more", [
    *[(name, size, {}) for name in ("cifar10", "cifar100", "flowers", "pets")
      for size in (57, 224)],
    *[("imagenet", size, more) for size in (32, 57, 224)
      for more in ({"eval_crop_ratio": 0.9}, {"aa": None})]])
def test_images_labels_and_transforms_are_the_published_ones(data, name, size, more, is_train):
    args = Namespace(data_set=name, data_path=str(data / name), input_size=size, remode="pixel",
                     reprob=0.25 if name == "imagenet" else 0.0, recount=1, color_jitter=0.3,
                     train_interpolation="bicubic", **{"aa": "rand-m9-mstd0.5-inc1", **more})
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


@pytest.mark.parametrize("name", ["cifar10", "flowers", "pets", "imagenet", "folder"])
def test_a_data_worker_may_be_a_new_process(name, data):
    """In a DeiT without scripts/, Python 3.14 sends the data set to its workers."""
    args = Namespace(data_set=name, data_path=str(data / name), input_size=57, reprob=0.0,
                     color_jitter=0.3, train_interpolation="bicubic", aa=None, remode="pixel",
                     recount=1)
    dataset, _ = datasets.build_dataset(False, args)
    image, label = pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(image, dataset[0][0]) and label == dataset[0][1]
    pickle.dumps(datasets.build_dataset(True, args)[0])


def test_random_erasing_after_normalisation():
    args = Namespace(input_size=57, reprob=1.0, remode="const", recount=1)
    image = Image.effect_noise((60, 60), 50).convert("RGB")
    erased = [(datasets.build_transform(is_train, args)(image) == 0).any()
              for is_train in (True, False)]
    assert erased == [True, False]


@pytest.mark.parametrize("name, file, content, words", [
    ("pets", "annotations/trainval.txt", "cat_1 1 1 1\ncat_2\n", ["'cat_2'"]),
    ("pets", "annotations/trainval.txt", " \n", ["no images"]),
    ("pets", "annotations/trainval.txt", "cat_1 38 1 1\n", ["'cat_1 38 1 1'", "37"]),
    ("flowers", "imagelabels.mat", "<!DOCTYPE html>", ["cannot read"]),
    ("flowers", "imagelabels.mat", {"labels": [[1, 103]]}, ["103", "102"]),
    ("flowers", "setid.mat", {"trnid": [[1]], "valid": [[71]]}, ["71", "70"]),
    ("flowers", "setid.mat", {"trnid": [[1]], "valid": [[]]}, ["empty"]),
])
def test_broken_lists_are_named(copy, name, file, content, words):
    path = copy(name) / file
    if isinstance(content, dict):
        scipy.io.savemat(str(path), content)
    else:
        path.write_text(content)
    text = refusal(name, path.parents[file.count("/")], ValueError)
    assert all(word in text for word in [str(path), *words])


def test_unofficial_cifar_is_not_unpickled(data, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", check_integrity)
    text = refusal("cifar10", data / "cifar10", ValueError)
    assert "cifar-10-batches-py" in text and "md5" in text and "delete" in text


@pytest.mark.parametrize("train, removed, words", [
    (False, "val", ["val is missing", "val/", "test/"]), (True, "train", ["train is missing"]),
    (False, "val/bee", ["same class", "only train/ has bee"]),
    (False, "train/cow", ["same class", "only val/ has cow"]),
    (True, "*/[ab]*", ["two or more", "it has 1"]),
    (True, "train/bee/*", ["train", "classes bee"]), (True, "train/*/*", ["classes ant, bee, cow"]),
])
def test_unequal_folders(copy, train, removed, words):
    folder = copy("folder")
    for path in folder.glob(removed):
        shutil.move(str(path), str(folder.parents[2] / path.parent.name))
    text = refusal("folder", folder, (ValueError, FileNotFoundError), train=train, download=True)
    assert all(word in text for word in [str(folder), *words]) and "--download" not in text


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers", "pets", "folder"])
def test_data_one_level_off(copy, tmp_path, name):
    folder = copy(name)
    inside = next(path for path in folder.iterdir() if path.is_dir())
    before = files_in(tmp_path)
    for passed in (inside, folder.parent):
        for download in (False, True):
            text = advice(name, passed, download)
            assert text.endswith(f"--data-path {folder}"), text
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name, changes, says", [
    ("flowers", {"setid.mat": "setid.MAT"}, "{0}/setid.MAT to {0}/setid.mat"),
    ("flowers", {"jpg": "JPG"}, "{0}/JPG to {0}/jpg"),
    ("folder", {"train": "Train"}, "{0}/Train to {0}/train"),
    ("pets", {"images/dog_breed2_1.jpg": "images/dog_breed2_1.PNG"},
     "{0}/images/dog_breed2_1.PNG to {0}/images/dog_breed2_1.jpg"),
    ("pets", {"images": "images/images", "annotations": "annotations/annotations"},  # Kaggle's
     "{0}/images/images/*.jpg to {0}/images/*.jpg, "
     "{0}/annotations/annotations/trainval.txt to {0}/annotations/trainval.txt"),
])
def test_near_misses_are_named(copy, name, changes, says):
    folder = copy(name)
    for old, new in changes.items():
        (folder / old).rename(folder / "moved")
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / "moved").rename(folder / new)
    before = files_in(folder)
    assert f"move or rename {says.format(folder)}" in advice(name, folder)
    assert files_in(folder) == before


@pytest.mark.parametrize("name", ["flowers", "pets"])
def test_nothing_there(tmp_path, name):
    text = refusal(name, tmp_path / "nowhere")
    layout = datasets.DATA_SETS[name].layout
    assert all(word in text for word in [*layout, "--download", "https://"])
    assert files_in(tmp_path) == []
    (tmp_path / "file.tgz").touch()
    assert "is a file" in advice(name, tmp_path / "file.tgz")


@pytest.fixture
def served(data, tmp_path, monkeypatch):
    """A server of this machine with the files of the data sets; returns the list of downloads."""
    folder, downloads = tmp_path / "served", []
    shutil.copytree(str(data / "flowers"), str(folder))
    for archive, source in (("102flowers.tgz", "flowers/jpg"), ("images.tar.gz", "pets/images"),
                            ("annotations.tar.gz", "pets/annotations"),
                            ("cifar-10-python.tar.gz", "cifar10/cifar-10-batches-py")):
        with tarfile.open(str(folder / archive), "w:gz") as tar:
            tar.add(str(data / source), Path(source).name)

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


@pytest.mark.parametrize("name", ["cifar10", "flowers", "pets"])
def test_eight_processes_download_once(served, tmp_path, name):
    fork = multiprocessing.get_context("fork")
    start, root = fork.Barrier(8), tmp_path / "new" / name

    def run():
        start.wait(60)
        for train in (True, False):
            build(name, root, train, download=name != "cifar10")

    processes = [fork.Process(target=run) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == 8 * [0]
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
    (folder / ".download.lock").touch()
    if name != "cifar10":
        text = refusal(name, folder)
        official = datasets.DATA_SETS[name].md5[archive]
        for word in ("--download", archive, calculate_md5(folder / archive), official):
            assert word in text
        assert served == []
    build(name, folder, download=True)
    assert served == [archive]
    shutil.rmtree(str(next(folder.glob(part)).parent))
    build(name, folder, download=True)  # unpacks the archive that is there
    assert served == [archive]


@pytest.mark.parametrize("name", ["cifar10", "flowers", "pets"])
def test_failed_download(tmp_path, monkeypatch, name):
    for target in (CIFAR10, Flowers, Pets):
        monkeypatch.setattr(target, "url", "http://127.0.0.1:9/" + getattr(target, "filename", ""))
    monkeypatch.setenv("no_proxy", "*")
    text = refusal(name, tmp_path, OSError, download=True)
    files = datasets.DATA_SETS[name].md5
    assert all(word in text for word in ["cannot download", str(tmp_path), "again", *files])


def test_the_data_of_a_held_out_run_are_found_as_for_training(served, tmp_path):
    args = Namespace(data_set="pets", data_path=str(tmp_path / "a" / "b"), input_size=32,
                     reprob=0.0, hold_out=0.2, eval=True, eval_freq=1,
                     download=True)
    assert len(load(args).test) == 7 and served
    for folder, says in (("a", f"pass --data-path {tmp_path}/a/b"), ("gone", "--hold-out 0 ")):
        args.data_path, args.download = str(tmp_path / folder), False
        with pytest.raises(UserError) as error:
            load(args)
        assert says in str(error.value)


@pytest.mark.parametrize("module, is_ours", [
    (None, True), (mock.Mock(flock=mock.Mock(side_effect=OSError("no locks"))), True),
    (fcntl, False)], ids=["Windows", "no locks", "lock of someone else"])
def test_without_a_lock(served, tmp_path, monkeypatch, module, is_ours):
    monkeypatch.setitem(sys.modules, "fcntl", module)
    if not is_ours:
        (tmp_path / ".download.lock").mkdir()  # cannot be opened either
    with pytest.warns(UserWarning) as warned:
        build("pets", tmp_path / "", download=True)
    assert len([one for one in warned if "without a lock" in str(one.message)]) == 1
    assert sorted(served) == sorted(Pets.md5)


# Folders of photos


def shown(path, image, **options):
    """Save the image, or array, and load it as a photo."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(str(path), **options)
    return datasets.read_image(datasets.load_photo, str(path))


RAMP = numpy.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize("name, pixels", [
    ("grey.png", (RAMP * 65535).round().astype("uint16")),
    ("grey.tif", (RAMP * 65535).round().astype("uint16")),
    ("float.tif", RAMP.astype("float32")),
    ("grey8.png", (RAMP * 255).round().astype("uint8")),
])
def test_16_bits_and_floats_are_scaled(tmp_path, name, pixels):
    image = shown(tmp_path / name, pixels)
    pixels = numpy.asarray(image)
    assert image.mode == "RGB" and (pixels[..., :1] == pixels).all()
    assert abs(pixels[..., 0].astype(float) - RAMP * 255).max() <= 0.51


@pytest.mark.parametrize("pixels", [RAMP * 2, RAMP - 1, RAMP * numpy.nan])
def test_numbers_that_cannot_be_shown_are_refused(tmp_path, pixels):
    with pytest.raises(OSError) as error:
        shown(tmp_path / "odd.tif", pixels.astype("float32"))
    assert f"{tmp_path}/odd.tif" in str(error.value) and "not 0 to 1" in str(error.value)


@pytest.mark.parametrize("mode, form", [("RGBA", "png"), ("LA", "png"), ("P", "png"),
                                        ("P", "gif"), ("RGBA", "webp")])
def test_transparency_is_white(tmp_path, mode, form):
    pixels = numpy.zeros((8, 8, 4), "uint8")
    pixels[:, :4] = 40, 40, 40, 255
    image, options = Image.fromarray(pixels).convert("RGB" if mode == "P" else mode), {}
    if mode == "P":
        image = image.quantize(4)
        options = {"transparency": image.getpixel((7, 7))}
    found = numpy.asarray(shown(tmp_path / f"a.{form}", image, lossless=True, **options))
    assert abs(found[:, :4].astype(int) - 40).max() <= 4 and (found[:, 4:] == 255).all()


def test_an_animation_yields_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    first = shown(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert first.getpixel((0, 0)) == (255, 0, 0)


def test_a_pipe_among_listed_photos_is_named(copy):
    """To open it would take forever."""
    pets = copy("pets")
    image = Path(build("pets", pets).samples[3][0])
    image.unlink()
    os.mkfifo(str(image))
    with pytest.raises(OSError, match=f"{image} is .*pipe"):
        build("pets", pets)[3]


def test_whatever_pillow_opens_is_used_but_hidden_files_and_copies_are_not(copy, tmp_path):
    folder = copy("folder")
    before = [len(build("folder", folder, train)) for train in (True, False)]
    bee, picture = folder / "train" / "bee", Image.new("RGB", (9, 9))
    (bee / "link").symlink_to(tmp_path / "outside")
    used = ("a.jfif", "b.gif", "c", "deep/d.JPG", "link/j.png")
    hidden = (".e.jpg", "._f.jpg", "@eaDir/g.jpg", ".ipynb_checkpoints/h.jpg", "__MACOSX/i.jpg")
    copies = ("a.png~", "a.bak", "a.NEF", "a.dng", "a.THM", "a.psd", "a.jpg.part", "a.crdownload")
    for name in (*used, *hidden, *copies):
        form = {".gif": "GIF", ".png": "PNG"}.get(Path(name).suffix, "JPEG")
        shown(tmp_path / "outside" / "j.png" if "link" in name else bee / name, picture,
              format=form)
    for name, content in (("movie.mp4", b"\0" * 99), ("notes", b"none"),  # not opened by Pillow,
                          ("features.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)),  # or only in part
                          ("a.grib", b"GRIB" + bytes(3) + b"\x01" + bytes(100))):
        (bee / name).write_bytes(content)
    for name in ("k.jpg", "pipe"):  # to open a pipe would take forever
        os.mkfifo(str(bee / name))
    (bee / "circle").symlink_to("circle")
    for split in ("train", "val"):
        (folder / split / ".ipynb_checkpoints").mkdir()
        (folder / split / "__MACOSX").mkdir()
    dataset = build("folder", folder)
    assert dataset.classes == ["ant", "bee", "cow"] and len(dataset) == before[0] + len(used)
    assert {Path(name).name for name in used} < {Path(path).name for path, _ in dataset.samples}
    assert dataset.left_out == {
        "without an ending": 2, "not a regular file": 2, **dict.fromkeys(
            [".mp4", ".h5", ".grib", *(Path(name).suffix for name in copies)], 1)}
    assert "2 without an ending" in datasets.left_out_in_words(dataset.left_out)
    assert len(build("folder", folder, False)) == before[1]


def test_many_classes_are_named_in_short_and_unsorted_images_say_how_to_sort_them(copy):
    assert datasets.first_five(map(str, range(300))) == "0, 1, 2, 3, 4 and 295 more"
    val = copy("folder") / "val"
    shutil.rmtree(str(val))
    val.mkdir()
    (val / "ILSVRC2012_val_1.JPEG").touch()
    text = refusal("imagenet", val.parent, ValueError, train=False)
    assert "it has 0, and 1 files" in text and "valprep.sh" in text
