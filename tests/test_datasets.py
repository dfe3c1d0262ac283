"""The four data sets: what they yield, what they refuse, and many processes building them."""

import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import time
import warnings
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402  found through the path set above
import generate  # noqa: E402
import loopback  # noqa: E402
import oxford_flowers_dataset  # noqa: E402
from loopback import FORK  # noqa: E402
from oxford_flowers_dataset import Flowers, Resource  # noqa: E402
from oxford_pets_dataset import Pets  # noqa: E402

assert Path(datasets.__file__).parent == ROOT
# Small sets are meant to warn about their counts.
pytestmark = pytest.mark.filterwarnings("ignore:.*official")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """One small folder of each data set, and CIFAR-10's archive."""
    folder = tmp_path_factory.mktemp("made")
    generate.flowers(folder / "flowers", train_per_class=2, test_per_class=1, size=(20, 16))
    generate.pets(folder / "pets", train_per_class=2, test_per_class=1, size=(20, 16))
    generate.cifar(folder, "cifar10", 50, 20, archive=folder / "cifar-10-python.tar.gz")
    generate.cifar(folder, "cifar100", 200, 100)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """Copies one of the made folders, to be broken."""

    def copy(name):
        shutil.copytree(str(made / name), str(tmp_path / name))
        return tmp_path / name

    return copy


def arguments(**values):
    return Namespace(**{"input_size": 32, "reprob": 0.0, **values})


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def in_child(function, *args):
    """The exit code of a forked process that runs the function."""
    child = FORK.Process(target=function, args=args)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


# --- transforms ---------------------------------------------------------------------------------


def published_transform(is_train, size, *more):
    resize = [
        transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0)),
        transforms.RandomHorizontalFlip(),
    ] if is_train else [transforms.Resize(int(256 / 224 * size)), transforms.CenterCrop(size)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*resize, transforms.ToTensor(), normalize, *more])


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(transform, image, seed):
    """The transform's output, and the random state it leaves."""
    random.seed(seed)
    torch.manual_seed(seed)
    return transform(image), torch.get_rng_state(), random.getstate()


# Width and height. Crops of the larger ones are made smaller, of the smaller ones larger.
SHAPES = [(32, 32), (75, 50), (50, 75), (333, 500), (501, 334), (256, 300), (300, 256), (1, 9)]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("size", [224, 32, 57])
@pytest.mark.parametrize("reprob", [0.0, 0.7])
def test_transforms_are_bit_for_bit_the_published_ones(is_train, size, reprob):
    erasing = RandomErasing(reprob, mode="pixel", max_count=2, num_splits=0, device="cpu")
    more = [erasing] if is_train and reprob else []
    published = published_transform(is_train, size, *more)
    args = arguments(input_size=size, reprob=reprob, remode="pixel", recount=2)
    ours = datasets.build_transform(is_train, args)
    for seed, shape in enumerate(SHAPES * 4):
        expected = seeded(published, noise(*shape), seed)
        found = seeded(ours, noise(*shape), seed)
        assert torch.equal(expected[0], found[0])
        assert torch.equal(expected[1], found[1]) and expected[2] == found[2]
        assert found[0].dtype == torch.float32 and found[0].is_contiguous()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (256, 3)])
def test_every_pixel_value_is_converted_exactly(shape):
    image = noise(*shape)
    if shape == (256, 3):
        ramp = np.arange(256, dtype=np.uint8)[None, :, None]
        image = Image.fromarray(np.broadcast_to(ramp, (3, 256, 3)).copy())
    published = transforms.Compose(published_transform(True, 8).transforms[2:])
    ours = datasets.ToNormalizedTensor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    ours = pickle.loads(pickle.dumps(ours))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ours(image)
    assert torch.equal(published(image), found)
    assert found.is_contiguous()


@pytest.mark.parametrize("lines", [2, 32, 57, 224, 384])
def test_lines_are_filled_in_exactly_as_pillow_does(lines):
    to_tensor = datasets.ToNormalizedTensor([0.0] * 3, [1.0] * 3, lines)
    for height in range(1, lines + 1):
        image = noise(5, height)
        if height % 3 == 0:  # the largest steps there can be
            image = image.point(lambda value: 255 * (value > 127))
        expected = transforms.ToTensor()(image.resize((5, lines), Image.BILINEAR))
        assert torch.equal(to_tensor(image), expected)


def test_erasing_is_optional():
    steps = datasets.build_transform(True, Namespace(input_size=32)).transforms
    assert not any(isinstance(step, RandomErasing) for step in steps)


# --- what the sets yield ------------------------------------------------------------------------


@pytest.mark.parametrize("name, split, length", [
    ("cifar10", True, 50), ("cifar10", False, 20), ("cifar100", True, 200),
    ("cifar100", False, 100), ("flowers", True, 204), ("flowers", False, 102),
    ("pets", True, 74), ("pets", False, 37),
])
def test_build_dataset(made, name, split, length):
    root = made if name.startswith("cifar") else made / name
    args = arguments(data_set=name, data_path=str(root))
    dataset, classes = datasets.build_dataset(is_train=split, args=args)
    assert classes == {"cifar10": 10, "cifar100": 100, "flowers": 102, "pets": 37}[name]
    assert classes == type(dataset).CLASSES
    assert len(dataset) == length
    labels = [dataset[i][1] for i in range(length)]
    assert all(type(label) is int for label in labels)
    assert set(labels) == set(range(classes))
    image = dataset[length - 1][0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    again = pickle.loads(pickle.dumps(dataset))
    torch.manual_seed(0)
    image = dataset[3][0]
    torch.manual_seed(0)
    assert torch.equal(again[3][0], image)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2)
    targets = torch.cat([targets for _, targets in loader])
    assert targets.dtype == torch.int64 and targets.tolist() == labels


def test_unknown_data_set():
    with pytest.raises(NotImplementedError) as error:
        datasets.build_dataset(True, arguments(data_set="IMNET", data_path="."))
    one_line(error, "IMNET", "cifar10, cifar100, flowers, pets", "ImageNet", "untouched")


def same_items(expected, found, start=0):
    for i in range(len(expected)):
        image, label = expected[i]
        assert label == found[start + i][1]
        assert np.array_equal(np.array(image), np.array(found[start + i][0]))


@pytest.mark.skipif(not hasattr(torchvision.datasets, "Flowers102"), reason="older torchvision")
def test_flowers_match_torchvision(made, tmp_path, monkeypatch):
    (tmp_path / "flowers-102").symlink_to(made / "flowers")
    theirs = torchvision.datasets.Flowers102
    monkeypatch.setattr(theirs, "_check_integrity", lambda self: True)
    train, val, test = (theirs(tmp_path, split) for split in ("train", "val", "test"))
    ours = Flowers(made / "flowers", train=True)
    assert len(ours) == len(train) + len(val)
    same_items(train, ours)
    same_items(val, ours, start=len(train))
    same_items(test, Flowers(made / "flowers", train=False))


@pytest.mark.skipif(not hasattr(torchvision.datasets, "OxfordIIITPet"), reason="older torchvision")
def test_pets_match_torchvision(made, tmp_path):
    (tmp_path / "oxford-iiit-pet").symlink_to(made / "pets")
    for split in ("trainval", "test"):
        theirs = torchvision.datasets.OxfordIIITPet(str(tmp_path), split)
        ours = Pets(made / "pets", train=split == "trainval")
        assert len(theirs) == len(ours)
        same_items(theirs, ours)


def test_target_transform_and_repr(made):
    dataset = Pets(str(made / "pets"), target_transform=lambda label: label + 1000)
    assert dataset[0][1] == 1000 and "74" in repr(dataset)


@pytest.mark.filterwarnings("default:.*official")
def test_counts_other_than_the_official_ones_warn(made):
    with pytest.warns(UserWarning, match="204 training images; the official set has 2040"):
        Flowers(made / "flowers")
    with pytest.warns(UserWarning, match="37 test images; the official set has 3669"):
        Pets(made / "pets", train=False)
    with pytest.warns(UserWarning, match=r"20 test images, the official set 10000; .*md5.*test_b"):
        datasets.CIFAR10(made, train=False)


@pytest.mark.parametrize("form, mode", [
    ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "I;16"), ("PNG", "1"), ("PNG", "RGB"),
    ("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"),
    ("PPM", "RGB"), ("JPEG", "RGB"),
])
def test_images_of_every_kind_are_rgb(tmp_path, form, mode):
    path = tmp_path / "image.jpg"
    if mode == "I;16":
        image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900)
    else:
        image = noise(9, 7).convert(mode)
    frames = {"save_all": True, "append_images": [noise(9, 7, 1)]} if form == "GIF" else {}
    image.save(path, format=form, **frames)
    expected = np.array(Image.open(path).convert("RGB"))
    found = oxford_flowers_dataset.read_image(str(path))
    assert found.mode == "RGB"
    assert np.array_equal(expected, np.array(found))
    assert np.array_equal(expected[1:5, 1:4], np.array(found.crop((1, 1, 4, 5))))


def test_files_are_closed(made):
    dataset = Flowers(made / "flowers")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        kept = [dataset[i] for i in range(20)]
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before
    assert len(kept) == 20


# --- Flowers and Pets: broken folders -----------------------------------------------------------


def save_mat(path, **variables):
    scipy.io.savemat(str(path), variables)


def labels_with(value, dtype=np.float64):
    labels = np.ones((1, 306), dtype)
    labels[0, 7] = value
    return labels


BAD_LABELS = {
    "zero, in uint8": labels_with(0, np.uint8),
    "too high": labels_with(103, np.uint8),
    "negative": labels_with(-1),
    "not a number": labels_with(np.nan),
    "a fraction": labels_with(1.5),
    "complex": labels_with(1j, np.complex128),
    "text": np.array(["labels"]),
    "a cell": np.array([[1, "a"]], object),
    "a column": np.ones((306, 1), np.uint8),
    "empty": np.ones((1, 0), np.uint8),
    "a struct": {"labels": 1},
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_flower_labels(copy, kind):
    folder = copy("flowers")
    save_mat(folder / "imagelabels.mat", labels=BAD_LABELS[kind])
    with pytest.raises(ValueError) as error:
        Flowers(folder)
    one_line(error, folder / "imagelabels.mat", "labels")


@pytest.mark.parametrize("content", [
    b"", b"junk", b"\0" * 500, b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\0\2IM" + b"\x89HDF\r\n",
    b"x" * 300_000,
], ids=["empty", "text", "zeros", "v7.3", "large"])
def test_mat_file_that_is_none(copy, content):
    folder = copy("flowers")
    (folder / "setid.mat").write_bytes(content)
    with pytest.raises(ValueError) as error:
        Flowers(folder)
    one_line(error, folder / "setid.mat")


def test_flower_ids_beyond_the_labels(copy):
    folder = copy("flowers")
    save_mat(folder / "setid.mat", trnid=[[1, 307]], valid=[[2]], tstid=[[3]])
    with pytest.raises(ValueError) as error:
        Flowers(folder)
    one_line(error, folder / "setid.mat", "trnid", "307", "306")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32,
                                   np.int64, np.uint64, np.float32, np.float64])
@pytest.mark.parametrize("compressed", [True, False])
def test_rows_are_those_that_scipy_reads(tmp_path, dtype, compressed):
    path, others = tmp_path / "row.mat", {"text": "labels", "cell": np.array([[1, "a"]], object)}
    for length in (1, 2, 3, 4, 5, 8, 100):  # up to 4 bytes stand within a header
        row = np.arange(1, length + 1).astype(dtype)[None]
        contents = {"a": np.ones((3, 3)), "labels": row, **others}
        scipy.io.savemat(str(path), contents, do_compression=compressed)
        expected = scipy.io.loadmat(str(path))["labels"][0]
        found = oxford_flowers_dataset.read_row(path, "labels", 100)
        assert found.dtype == np.int64 and np.array_equal(found, expected)
        for other in (*others, "a", "none"):
            with pytest.raises(ValueError) as error:
                oxford_flowers_dataset.read_row(path, other, 100)
            one_line(error, path, other)


def element(kind, content):
    """A data element of a MATLAB 5 file: kind, length, content padded to 8 bytes."""
    padding = b"\0" * (-len(content) % 8)
    return kind.to_bytes(4, "little") + len(content).to_bytes(4, "little") + content + padding


def nested_cell(levels):
    """`labels`, a cell in a cell in a cell, to exhaust the stack of who follows it down."""
    array = element(6, b"\1" + b"\0" * 7) + element(5, b"\1\0\0\0" * 2) + element(1, b"labels")
    heads = [
        b"\16\0\0\0" + (level * (len(array) + 8) + len(array)).to_bytes(4, "little") + array
        for level in reversed(range(levels))
    ]
    cells = zlib.compress(b"".join(heads), 9)
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM\17\0\0\0" + len(cells).to_bytes(4, "little") + cells


def refuse_flowers(folder):
    with pytest.raises(ValueError) as error:
        Flowers(folder)
    one_line(error, folder / "imagelabels.mat")


def test_deeply_nested_mat_file(copy):
    folder = copy("flowers")
    content = nested_cell(100_000)
    assert len(content) < oxford_flowers_dataset.MAT_FILE_LIMIT
    (folder / "imagelabels.mat").write_bytes(content)
    # In a process of its own, which SciPy would crash if it followed.
    assert in_child(refuse_flowers, folder) == 0


@pytest.mark.parametrize("name, path", [
    ("flowers", "."), ("flowers", "jpg"), ("flowers", "setid.mat"), ("flowers", "imagelabels.mat"),
    ("flowers", "jpg/image_00003.jpg"), ("pets", "."), ("pets", "images"), ("pets", "annotations"),
    ("pets", "annotations/trainval.txt"), ("pets", "images/dog_breed5_2.jpg"),
])
def test_missing_file(copy, name, path):
    folder = copy(name)
    path = folder / path
    (shutil.rmtree if path.is_dir() else os.remove)(str(path))
    dataset_class = {"flowers": Flowers, "pets": Pets}[name]
    with pytest.raises(FileNotFoundError) as error:
        for split in (True, False):
            dataset_class(folder, train=split)
    one_line(error, path, "must hold", dataset_class.LAYOUT)


def test_dangling_link_counts_as_missing(copy):
    folder = copy("pets")
    image = folder / "images" / "dog_breed5_1.jpg"
    image.unlink()
    image.symlink_to(folder / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        Pets(folder)
    one_line(error, image)


@pytest.mark.parametrize("line", [
    "../../secret 1 1 1", "/etc/passwd 1 1 1", "a\\b 1 1 1", "dog_breed2_1 0 1 1", "dog 38 1 1",
    "dog -1 1 1", "dog 1", "dog 1 1 1 1", "#Image CLASS-ID SPECIES", "", "dog 1.5 1 1",
    "dog " + "9" * 5000 + " 1 1", "d\u00f6g 1 1 1", "dog \uff11 1 1",
], ids=range(14))
def test_bad_pets_line(copy, line):
    folder = copy("pets")
    path = folder / "annotations" / "trainval.txt"
    path.write_text("dog_breed2_1 2 2 2\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        Pets(folder)
    assert len(one_line(error, path)) < 500


@pytest.mark.parametrize("content", [b"", b"x" * 5_000_000], ids=["empty", "large"])
def test_bad_pets_list(copy, content):
    path = copy("pets") / "annotations" / "test.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Pets(path.parent.parent, train=False)
    one_line(error, path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "junk", "bomb", "gone"])
def test_broken_image(copy, damage, monkeypatch):
    folder = copy("pets")
    dataset = Pets(folder)
    path = folder / "images" / dataset.names[2]
    content = path.read_bytes()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    elif damage == "gone":
        path.unlink()
    else:
        half = content[: len(content) // 2]
        path.write_bytes({"truncated": half, "empty": b"", "junk": b"junk" * 99}[damage])
    with pytest.raises(OSError) as error:
        dataset[2]
    one_line(error, path)


def damaged(content, rng):
    """The bytes with some changed, cut off or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(content))
        action = rng.randrange(3)
        if action == 0:
            content[at] = rng.randrange(256)
        elif action == 1:
            del content[at: at + rng.randint(1, 40)]
        else:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        content = content or bytearray(b"\0")
    return bytes(content)


@pytest.mark.parametrize("name, file", [
    ("flowers", "setid.mat"), ("flowers", "imagelabels.mat"), ("pets", "annotations/trainval.txt"),
])
def test_damaged_files_are_read_right_or_refused_in_one_line(copy, name, file):
    folder = copy(name)
    if name == "flowers":  # uncompressed, so that damage reaches beyond the checksum
        contents = scipy.io.loadmat(str(folder / file))
        save_mat(folder / file, **{key: contents[key] for key in contents if key[0] != "_"})
    content, rng = (folder / file).read_bytes(), random.Random(0)
    dataset_class, refused = {"flowers": Flowers, "pets": Pets}[name], 0
    for _ in range(150):
        (folder / file).write_bytes(damaged(content, rng))
        try:
            dataset = dataset_class(folder)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
        else:
            assert 0 <= dataset.targets.min() <= dataset.targets.max() < dataset.CLASSES
    assert refused > 20


# --- CIFAR: files that are not the official ones ------------------------------------------------


def without_hashing(monkeypatch):
    def fail(*args):
        raise AssertionError("hashed again")

    monkeypatch.setattr(datasets, "check_integrity", fail)
    datasets._check_files.cache_clear()


@pytest.mark.filterwarnings("error")
def test_official_files_do_not_warn(copy, monkeypatch):
    folder = copy("cifar-10-batches-py")
    for fact, value in loopback.official(datasets.CIFAR10, folder).items():
        monkeypatch.setattr(datasets.CIFAR10, fact, value)
    dataset = datasets.CIFAR10(folder.parent)
    assert dataset.classes[0] == "class 0"
    without_hashing(monkeypatch)
    datasets.CIFAR10(folder.parent, train=False)


def test_cifar_images_are_those_of_the_files(made):
    with open(str(made / "cifar-100-python" / "test"), "rb") as file:
        batch = pickle.load(file, encoding="latin1")
    dataset = datasets.CIFAR100(str(made), train=False)
    for i in (0, 99):
        expected = batch["data"][i].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(np.array(dataset[i][0]), expected)
        assert dataset[i][1] == batch["fine_labels"][i]


def test_a_changed_file_is_checked_again(copy):
    folder = copy("cifar-10-batches-py")
    datasets.CIFAR10(folder.parent)
    (folder / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(ValueError) as error:
        datasets.CIFAR10(folder.parent)
    one_line(error, folder / "data_batch_3")


def test_a_marker_that_came_with_the_files_is_not_believed(copy, monkeypatch):
    folder = copy("cifar-10-batches-py")
    datasets.CIFAR10(folder.parent)
    other = folder.parent / "other"
    shutil.copytree(str(folder), str(other / folder.name))  # keeps sizes and times of the files
    without_hashing(monkeypatch)
    with pytest.raises(AssertionError, match="hashed again"):
        datasets.CIFAR10(other)


@pytest.mark.parametrize("marker", [b"", b"\xff", b"[]", b"7", b'{"files": 3}', b"[" * 100000],
                         ids=["empty", "binary", "list", "number", "wrong", "deep"])
def test_broken_marker(copy, marker):
    folder = copy("cifar-10-batches-py")
    (folder / datasets.MARKER).write_bytes(marker)
    assert len(datasets.CIFAR10(folder.parent)) == 50


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def good_batch(**changes):
    return {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 9], **changes}


BAD_BATCHES = {
    "no data": {"labels": [1]},
    "a list": [1, 2],
    "labels too high": good_batch(labels=[0, 1, 10]),
    "labels negative": good_batch(labels=[0, 1, -1]),
    "labels too few": good_batch(labels=[0, 1]),
    "labels not numbers": good_batch(labels=[0, 1, "2"]),
    "labels no list": good_batch(labels=np.array([0, 1, 2])),
    "floats": good_batch(data=np.zeros((3, 3072))),
    "wrong shape": good_batch(data=np.zeros((3, 32, 32, 3), np.uint8)),
    "objects": good_batch(data=np.full((3, 3072), None, object)),
}


@pytest.mark.parametrize("kind", [*BAD_BATCHES, "hostile", "truncated", "empty"])
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_bad_cifar_file(copy, tmp_path, file, kind):
    folder = copy("cifar-10-batches-py")
    if kind == "hostile":
        content = pickle.dumps(good_batch(extra=Hostile(tmp_path / "hacked")))
    elif kind == "truncated":
        content = (folder / file).read_bytes()[:-9]
    else:
        content = pickle.dumps(BAD_BATCHES[kind]) if kind != "empty" else b""
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        datasets.CIFAR10(folder.parent)
    one_line(error, folder / file, "CIFAR10", "delete")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_pickled_by_python_3_are_accepted(copy, protocol):
    folder = copy("cifar-10-batches-py")
    (folder / "test_batch").write_bytes(pickle.dumps(good_batch(), protocol))
    assert len(datasets.CIFAR10(folder.parent, train=False)) == 3


@pytest.mark.parametrize("file", ["data_batch_5", "test_batch", "batches.meta"])
def test_missing_cifar_file_is_named_and_not_downloaded_over(copy, file):
    folder = copy("cifar-10-batches-py")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        datasets.CIFAR10(folder.parent)
    one_line(error, folder / file)


def build_as_nobody(folder):
    if os.geteuid() == 0:
        os.setuid(65534)
    with pytest.raises(OSError):
        (folder / "file").write_text("")
    assert len(datasets.CIFAR10(folder)) == 50


def test_read_only_folder(copy):
    folder = copy("cifar-10-batches-py").parent
    # What others may not enter cannot be read as nobody.
    parents = [parent for parent in folder.parents if parent.stat().st_uid == os.geteuid()]
    modes = {path: path.stat().st_mode for path in parents}
    try:
        for path in parents:
            path.chmod(modes[path] | 0o055)
        folder.chmod(0o555)
        assert in_child(build_as_nobody, folder) == 0
    finally:
        folder.chmod(0o755)
        for path, mode in modes.items():
            path.chmod(mode)
    assert not (folder / ".download.lock").exists()


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with loopback.serving(folder) as server:
        yield server


@pytest.fixture
def served_cifar(made, server):
    """The server offers CIFAR-10, with the made files as the official ones."""
    archive, folder = made / "cifar-10-python.tar.gz", made / "cifar-10-batches-py"
    with loopback.offer(server, archive, datasets.CIFAR10, folder):
        yield server


@pytest.fixture(params=["flowers", "pets"])
def served_oxford(request, made, server, monkeypatch):
    """The server offers Flowers or Pets; yields the class."""
    dataset_class = {"flowers": Flowers, "pets": Pets}[request.param]
    resources = []
    for file, _, yields in dataset_class.RESOURCES:
        source, target = made / request.param / yields, server.folder / file
        if file == yields:
            shutil.copy(str(source), str(target))
        else:
            with tarfile.open(str(target), "w:gz") as tar:
                tar.add(str(source), arcname=yields)
        resources.append(Resource(file, hashlib.md5(target.read_bytes()).hexdigest(), yields))
    monkeypatch.setattr(dataset_class, "RESOURCES", resources)
    monkeypatch.setattr(dataset_class, "BASE_URL", server.url)
    return dataset_class


def build_both(dataset_class, root):
    """What DeiT does in each process; here, the number of images is checked too."""
    expected = {"CIFAR10": (50, 20), "Flowers": (204, 102), "Pets": (74, 37)}
    for train, length in zip((True, False), expected[dataset_class.__name__]):
        dataset = dataset_class(root, train=train, download=True)
        assert len(dataset) == length
        assert all(dataset[i][1] in range(dataset.CLASSES) for i in range(length))


def build_at_once(processes, dataset_class, root):
    build = functools.partial(build_both, dataset_class, root)
    assert loopback.exit_codes(loopback.start([build] * processes)) == [0] * processes


def no_traces(root):
    return not [name for name in os.listdir(str(root)) if "part" in name or "tar" in name]


def test_eight_processes_download_cifar_once(served_cifar, tmp_path, monkeypatch):
    root = tmp_path / "not" / "there"
    build_at_once(8, datasets.CIFAR10, root)
    assert served_cifar.downloads == ["/cifar-10-python.tar.gz"]
    assert no_traces(root)
    assert json.loads((root / "cifar-10-batches-py" / datasets.MARKER).read_text())
    without_hashing(monkeypatch)
    build_both(datasets.CIFAR10, root)


def test_eight_processes_download_oxford_once(served_oxford, server, tmp_path):
    build_at_once(8, served_oxford, tmp_path / "data")
    assert sorted(server.downloads) == sorted("/" + item.file for item in served_oxford.RESOURCES)
    assert no_traces(tmp_path / "data")


def test_what_is_there_is_not_downloaded(served_oxford, server, tmp_path):
    build_both(served_oxford, tmp_path)
    last = served_oxford.RESOURCES[-1].yields
    del server.downloads[:]
    build_both(served_oxford, tmp_path)
    assert server.downloads == []
    path = tmp_path / last
    (shutil.rmtree if path.is_dir() else os.remove)(str(path))
    build_both(served_oxford, tmp_path)
    assert server.downloads == ["/" + served_oxford.RESOURCES[-1].file]


def test_an_archive_that_is_there_is_used(served_cifar, tmp_path):
    archive = served_cifar.folder / "cifar-10-python.tar.gz"
    shutil.move(str(archive), str(tmp_path / archive.name))
    build_both(datasets.CIFAR10, tmp_path)
    assert served_cifar.downloads == []
    assert (tmp_path / archive.name).exists()


def killed_while(dataset_class, root, reached):
    """Starts a build and kills it, with no chance to clean up, once `reached` is set."""
    child = FORK.Process(target=build_both, args=(dataset_class, root))
    child.start()
    assert reached.wait(60)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_killed_while_downloading(served_cifar, tmp_path):
    root = tmp_path / "data"
    served_cifar.stall = True
    killed_while(datasets.CIFAR10, root, served_cifar.stalled)
    assert not (root / "cifar-10-batches-py").exists()
    assert os.listdir(str(root / "download.part"))
    served_cifar.stall = False
    build_at_once(2, datasets.CIFAR10, root)
    assert no_traces(root)


def test_killed_once_all_is_installed(served_cifar, tmp_path):
    build_both(datasets.CIFAR10, tmp_path)
    (tmp_path / "download.part").mkdir()
    (tmp_path / "download.part" / "cifar-10-python.tar.gz").write_bytes(b"left over")
    build_both(datasets.CIFAR10, tmp_path)
    assert no_traces(tmp_path)


def test_killed_while_unpacking(served_oxford, server, tmp_path, monkeypatch):
    root, reached = tmp_path / "data", FORK.Event()
    extract = oxford_flowers_dataset.extract_archive

    def unpack_half(archive, folder):
        extract(archive, folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        for path in files[::2]:
            path.unlink()
        reached.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(oxford_flowers_dataset, "extract_archive", unpack_half)
        killed_while(served_oxford, root, reached)
    assert not (root / served_oxford.RESOURCES[0].yields).exists()
    build_at_once(2, served_oxford, root)
    assert no_traces(root)
    # The archive was whole: it is not downloaded a second time.
    assert server.downloads.count("/" + served_oxford.RESOURCES[0].file) == 1


@pytest.mark.parametrize("fault", ["no server", "not found", "wrong file", "no folder"])
def test_failed_download(served_cifar, tmp_path, fault, monkeypatch):
    root = tmp_path / "data"
    archive = served_cifar.folder / "cifar-10-python.tar.gz"
    if fault == "no server":
        monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    elif fault == "not found":
        archive.unlink()
    elif fault == "wrong file":
        archive.write_bytes(b"wrong")
    else:
        root.write_text("a file")
    with pytest.raises(OSError) as error:
        datasets.CIFAR10(root)
    one_line(error, datasets.CIFAR10.url, root, "cannot download")


def test_no_download_unless_asked(served_oxford, server, tmp_path):
    with pytest.raises(FileNotFoundError):
        served_oxford(tmp_path)
    assert server.downloads == []


def test_build_dataset_hands_download_on(served_oxford, tmp_path):
    name = served_oxford.__name__.lower()
    args = arguments(data_set=name, data_path=str(tmp_path / "data"), download=True)
    dataset, _ = datasets.build_dataset(True, args)
    assert len(dataset) in (204, 74)
