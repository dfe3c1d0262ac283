"""DeiT's `build_dataset` for CIFAR-10, CIFAR-100, Oxford Flowers-102 and Oxford-IIIT Pets."""

import contextlib
import functools
import json
import os
import pickle
import warnings

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.vision import VisionDataset

from oxford_flowers_dataset import Flowers, Resource, download_missing, exclusive, one_line
from oxford_pets_dataset import Pets

# All that pickled arrays need, under the names that old and new NumPy give it.
ARRAY_GLOBALS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}


# Stands in a CIFAR folder that was checked, so that each process need not do it again.
MARKER = ".checked"

# Pillow's weights for 8-bit images are whole numbers of 2 ** -22.
FRACTION_BITS = 22


class ResizeAndCentre:
    """Resize to a shorter side, then CenterCrop, in less time: the same pixels.

    Pillow resizes first across, then down. Of the columns, only those kept go on to the second.
    """

    def __init__(self, shorter_side, size):
        self.shorter_side, self.size = shorter_side, size

    def __call__(self, image):
        width, height = image.size
        columns = max(self.shorter_side, int(self.shorter_side * width / height))
        lines = max(self.shorter_side, int(self.shorter_side * height / width))
        left, top = (round((length - self.size) / 2) for length in (columns, lines))
        image = image.resize((columns, height), Image.BILINEAR)
        image = image.crop((left, 0, left + self.size, height))
        image = image.resize((self.size, lines), Image.BILINEAR)
        return image.crop((0, top, self.size, top + self.size))

    def __repr__(self):
        return f"ResizeAndCentre(shorter_side={self.shorter_side}, size={self.size})"


class RandomCropToWidth(transforms.RandomResizedCrop):
    """RandomResizedCrop, but a crop with fewer lines than asked for keeps its lines.

    ToNormalizedTensor fills in the others, which takes it half the time that Pillow needs.
    """

    def forward(self, image):
        """Crop an RGB PIL image: as wide as asked for, and as high or lower."""
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        crop = image.crop((left, top, left + width, top + height))
        lines, columns = self.size
        return crop.resize((columns, min(height, lines)), Image.BILINEAR)


class ToNormalizedTensor:
    """An RGB PIL image as a normalised float tensor, enlarged to `lines` if it has fewer.

    The values are bit for bit those of torchvision's ToTensor and then Normalize, in less time.
    """

    def __init__(self, mean, std, lines=0):
        self.mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self.lines = lines

    def __call__(self, image):
        # Pillow packs "RGB;L" line by line: the reds of a line, its greens, its blues.
        pixels = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)
        planes = pixels.reshape(image.height, 3, image.width).transpose(1, 0, 2)
        planes = _enlarge(planes, self.lines) if image.height < self.lines else planes.copy()
        return torch.from_numpy(planes).float().div_(255).sub_(self.mean).div_(self.std)

    def __repr__(self):
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"ToNormalizedTensor(mean={mean}, std={std}, lines={self.lines})"


def _enlarge(planes, lines):
    """Bilinear interpolation to more lines, in Pillow's fixed-point arithmetic."""
    planes = planes.astype(np.int32)
    (above, weight_above), (below, weight_below) = _neighbours(planes.shape[1], lines)
    enlarged = np.take(planes, above, axis=1)
    enlarged *= weight_above
    second = np.take(planes, below, axis=1)
    second *= weight_below
    enlarged += second
    enlarged += 1 << (FRACTION_BITS - 1)  # to round, not to cut off
    enlarged >>= FRACTION_BITS
    return enlarged


@functools.lru_cache(maxsize=1024)
def _neighbours(height, lines):
    """For each of `lines`, the two of `height` lines it lies between, with their weights."""
    # Line n of the image has its middle at n + 0.5.
    position = np.maximum((np.arange(lines) + 0.5) * (height / lines) - 0.5, 0)
    above = position.astype(np.int64)
    below = np.minimum(above + 1, height - 1)
    share = ((position - above) * (1 << FRACTION_BITS) + 0.5).astype(np.int32)[:, None]
    return (above, (1 << FRACTION_BITS) - share), (below, share)


def build_transform(is_train, args):
    """MoCo v3's transforms for fine-tuning, with DeiT's random erasing if `args.reprob` is set.

    Training: RandomResizedCrop (5 % of the area and up), flip, ToTensor, Normalize. Evaluation:
    Resize to 256/224 of the input size, CenterCrop, ToTensor, Normalize. All of it bilinear.

    Args:
        is_train: for training, or else for evaluation.
        args: with `input_size` in pixels; and for training, where they exist, `reprob` (0 to 1),
            `remode` and `recount`, timm's options of random erasing.

    Returns:
        A callable that takes an RGB PIL image of any size and returns a float32 tensor of shape
        (3, input_size, input_size): 0 to 1, less ImageNet's mean, by its deviation (timm's
        constants), so -2.12 to 2.64.
    """
    size = args.input_size
    to_tensor = ToNormalizedTensor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, lines=size)
    if not is_train:
        return transforms.Compose([ResizeAndCentre(int(256 / 224 * size), size), to_tensor])
    crop = RandomCropToWidth((size, size), scale=(0.05, 1.0))
    steps = [crop, transforms.RandomHorizontalFlip(), to_tensor]
    if getattr(args, "reprob", 0) > 0:
        mode, count = getattr(args, "remode", "pixel"), getattr(args, "recount", 1)
        steps.append(RandomErasing(args.reprob, mode=mode, max_count=count, device="cpu"))
    return transforms.Compose(steps)


class CheckedCIFAR:
    """Makes torchvision's CIFAR classes safe to build in many processes at once.

    An absent folder is downloaded, and checksums are taken, by one process while the others
    wait. That is so whatever `download` says, which is there for the signature that all data
    sets share. Files other than the official ones are used, with a warning, if they hold the
    arrays they should and nothing else. Raises FileNotFoundError for a missing file, ValueError
    for a broken one and OSError for a failed download, each in one line.
    """

    def __init__(self, root, train=True, transform=None, target_transform=None, download=True):
        root = os.path.expanduser(os.fspath(root))
        archive = Resource(self.filename, self.tgz_md5, self.base_folder)
        download_missing(root, self.url[: -len(self.filename)], [archive])
        unofficial = _unofficial_files(type(self), root)
        VisionDataset.__init__(self, root, transform=transform, target_transform=target_transform)
        self.train = train
        self._read(os.path.join(root, self.base_folder))
        if unofficial:
            split, official = ("training", 50000) if train else ("test", 10000)
            warnings.warn(
                f"{os.path.join(root, self.base_folder)} has {len(self)} {split} images, the "
                f"official set {official}; not the official files (md5): {', '.join(unofficial)}",
                stacklevel=2,
            )

    def _read(self, folder):
        """What torchvision's __init__ does, which unpickles whatever it finds."""
        files = self.train_list if self.train else self.test_list
        parts = [_read_arrays(os.path.join(folder, name)) for name, _ in files]
        images = np.concatenate([part["data"] for part in parts])
        self.data = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets = [label for part in parts for label in _labels(part)]
        self.classes = _read_arrays(os.path.join(folder, self.meta["filename"]))[self.meta["key"]]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}


class CIFAR10(CheckedCIFAR, torchvision.datasets.CIFAR10):
    """`CIFAR-10 <https://www.cs.toronto.edu/~kriz/cifar.html>`_: 50000 and 10000 images.

    Items are a 32 x 32 RGB PIL image, or what `transform` makes of it, and a label, 0 to 9.
    """

    CLASSES = 10


class CIFAR100(CheckedCIFAR, torchvision.datasets.CIFAR100):
    """`CIFAR-100 <https://www.cs.toronto.edu/~kriz/cifar.html>`_: 50000 and 10000 images.

    Items are a 32 x 32 RGB PIL image, or what `transform` makes of it, and a label, 0 to 99.
    """

    CLASSES = 100


def _unofficial_files(cifar, root):
    """Names of the files whose md5 is not the official one; an earlier check left a marker."""
    folder = os.path.join(root, cifar.base_folder)
    stamps = tuple(_stamps(cifar, folder))
    unofficial = _read_marker(folder, stamps)
    if unofficial is None:
        with contextlib.ExitStack() as stack:
            # Where nothing can be written, each process checks for itself.
            with contextlib.suppress(OSError):
                stack.enter_context(exclusive(root))
            unofficial = _read_marker(folder, stamps)
            if unofficial is None:
                unofficial = _check_files(cifar, folder, stamps)
                _write_marker(folder, stamps, unofficial)
    return unofficial


def _stamps(cifar, folder):
    """What tells each file as the one that was checked. Nobody can choose a file's ctime."""
    meta = (cifar.meta["filename"], cifar.meta["md5"])
    for name, md5 in [*cifar.train_list, *cifar.test_list, meta]:
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{path} is missing; add it, or delete {folder} to have it downloaded anew"
            ) from None
        yield name, md5, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_marker(folder, stamps):
    """The outcome of an earlier check, or None if there was none of these very files."""
    try:
        with open(os.path.join(folder, MARKER)) as file:
            marker = json.load(file)
        same = marker["files"] == [list(stamp) for stamp in stamps]
        return marker["unofficial"] if same else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write_marker(folder, stamps, unofficial):
    marker = os.path.join(folder, MARKER)
    with contextlib.suppress(OSError):
        with open(marker + ".part", "w") as file:
            json.dump({"files": stamps, "unofficial": unofficial}, file)
        os.replace(marker + ".part", marker)


@functools.lru_cache(maxsize=None)
def _check_files(cifar, folder, stamps):
    """Names of the files that are not the official ones, once their contents are known good."""
    checksums = {name: md5 for name, md5, *_ in stamps}
    unofficial = []
    for name, md5 in checksums.items():
        path = os.path.join(folder, name)
        if check_integrity(path, md5):
            continue
        try:
            _check_contents(cifar, name, _read_arrays(path))
        except Exception as error:  # a broken pickle raises all sorts
            raise ValueError(
                f"{path} is no file of {cifar.__name__}: {one_line(error)}; mend it, or delete "
                f"{folder} to have it downloaded anew"
            ) from error
        unofficial.append(name)
    return unofficial


def _read_arrays(path):
    """Unpickle a file of unknown origin, which might otherwise run code of its own."""
    with open(path, "rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()


class ArrayUnpickler(pickle._Unpickler):
    """Unpickles NumPy arrays of bytes and plain values; refuses all else.

    The Python implementation, since the C one allocates gigabytes at a single damaged byte. And
    nothing that could be called makes an array of any size from nothing.
    """

    def find_class(self, module, name):
        """What stands in for a name in the pickle; raises UnpicklingError for all others."""
        if (module, name) not in ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r:.80}")
        stand_ins = {"ndarray": None, "_reconstruct": _no_bytes, "dtype": _byte_type}
        return stand_ins[name] if name in stand_ins else super().find_class(module, name)


def _no_bytes(*_):
    """The array whose contents the pickle then sets."""
    return np.empty(0, np.uint8)


def _byte_type(kind, *_):
    if kind != "u1":
        raise pickle.UnpicklingError("it has an array of other numbers than bytes")
    return np.dtype(kind)


def _check_contents(cifar, name, contents):
    if name == cifar.meta["filename"]:
        classes = contents[cifar.meta["key"]]
        if type(classes) is not list or not all(type(name) is str for name in classes):
            raise ValueError(f"{cifar.meta['key']!r} must be a list of names")
        return
    images = contents["data"]
    labels = _labels(contents)
    if type(images) is not np.ndarray or images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise ValueError("'data' must be a uint8 array of shape (N, 3072)")
    if type(labels) is not list or len(labels) != len(images):
        raise ValueError(f"labels must be a list of {len(images)}, as there are images")
    if not all(type(label) is int and 0 <= label < cifar.CLASSES for label in labels):
        raise ValueError(f"labels must be whole numbers from 0 to {cifar.CLASSES - 1}")


def _labels(contents):
    return contents["labels" if "labels" in contents else "fine_labels"]


# The choice of --data-set. Each class has a number of CLASSES.
DATA_SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "flowers": Flowers, "pets": Pets}


def build_dataset(is_train, args):
    """The data set `args.data_set` at `args.data_path`, and its number of classes.

    Args:
        is_train: the training images, or else the test images.
        args: with `data_set`, `data_path`, optionally `download`, and what build_transform reads.

    Returns:
        (dataset, int): items are a tensor as build_transform makes it, and a label as Python int.

    Raises:
        NotImplementedError: another data set than the four.
        FileNotFoundError, ValueError, OSError: as the data set's class says, in one line.
    """
    if args.data_set not in DATA_SETS:
        raise NotImplementedError(
            f"--data-set {args.data_set}: the choice is {', '.join(DATA_SETS)}; for ImageNet use "
            f"DeiT's own datasets.py, in an untouched checkout"
        )
    dataset_class = DATA_SETS[args.data_set]
    dataset = dataset_class(
        args.data_path,
        train=is_train,
        transform=build_transform(is_train, args),
        download=getattr(args, "download", False),
    )
    return dataset, dataset_class.CLASSES
