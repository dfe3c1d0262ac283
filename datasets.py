"""DeiT's `build_dataset` for CIFAR, Oxford Flowers-102, Oxford-IIIT Pets and folders of images."""

import contextlib
import functools
import os
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets import ImageFolder, cifar
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5, check_md5

from oxford_flowers_dataset import Flowers
from oxford_pets_dataset import Pets


def build_transform(is_train: bool, args: Any) -> Callable:
    """MoCo v3's transforms for fine-tuning, with DeiT's random erasing if `args.reprob` is set.

    Args:
        is_train: True for training: a random crop of at least 5 % of the area, a random flip, and
            random erasing. False for evaluation: resize to 256/224 of the input size, centre crop.
        args: with `input_size` in pixels; for training, where they exist, `reprob` (0 to 1),
            `remode` and `recount`, timm's options of random erasing.

    Returns:
        A callable that takes an RGB PIL image of any size and returns a float32 tensor of shape
        (3, input_size, input_size), normalised by ImageNet's mean and deviation: -2.12 to 2.64.
    """
    size = args.input_size
    steps = [transforms.Resize(int(256 / 224 * size)), transforms.CenterCrop(size)]
    if is_train:
        crop = transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0))
        steps = [crop, transforms.RandomHorizontalFlip()]
    steps.append(transforms.ToTensor())
    steps.append(transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    if is_train and getattr(args, "reprob", 0) > 0:
        mode, count = getattr(args, "remode", "pixel"), getattr(args, "recount", 1)
        steps.append(RandomErasing(args.reprob, mode=mode, max_count=count, device="cpu"))
    return transforms.Compose(steps)


def build_dataset(is_train: bool, args: Any) -> Tuple[Any, int]:
    """The data set `args.data_set` at `args.data_path`, and its number of classes.

    Complete data are used as they are. Missing data are downloaded, by one process per machine
    while the others wait: CIFAR always, Flowers and Pets if `args.download` is true.

    Args:
        is_train: True for the train images, False for the test images.
        args: with `data_set`, `data_path`, optionally `download`, and what build_transform reads.

    Returns:
        (dataset, int): an item is a tensor as build_transform makes it, and a label as Python int.

    Raises:
        NotImplementedError: the data set is not in DATA_SETS.
        FileNotFoundError, ValueError: a file is missing, or not what it should be.
        OSError: a failed download; when indexing, an image that cannot be decoded.
    """
    if args.data_set not in DATA_SETS:
        raise NotImplementedError(f"--data-set {args.data_set}: choose from "
                                  f"{', '.join(DATA_SETS)}; ImageNet is a `folder`")
    row = DATA_SETS[args.data_set]
    root = os.path.abspath(os.path.expanduser(args.data_path))
    missing = row.missing(root, is_train)
    if missing and row.downloads(args):
        _download(row, root, is_train)
    elif missing:
        raise FileNotFoundError(f"{missing[0]} is missing; {row.how_to_get(root)}")
    dataset = row.build(root, is_train, build_transform(is_train, args))
    if hasattr(dataset, "loader"):  # it reads one file per image
        dataset.loader = functools.partial(_read_image, dataset.loader)
    return dataset, len(dataset.classes)


def _read_image(loader: Callable, path: str) -> Any:
    """Load an image file; raise OSError with its path if it cannot be decoded."""
    try:
        return loader(path)
    except Exception as error:  # Pillow's decoders raise almost anything
        raise OSError(f"{path} is not readable as an image ({error!r}): replace it") from error


class DataSet(NamedTuple):
    """A choice of --data-set."""

    build: Callable  # (root, is_train, transform) -> a data set like torchvision's
    missing: Callable  # (root, is_train) -> paths that the split needs and that do not exist
    layout: Tuple[str, ...]  # what the root must contain, as patterns of `glob`
    expected: str = ""  # the layout in words, where the patterns are not enough
    official: Optional[Tuple[int, int]] = None  # numbers of train and test images
    download: Optional[Callable] = None  # (root): download what is missing
    url: str = ""  # where it is downloaded from
    md5: Dict[str, str] = {}  # of the files that are downloaded
    always_download: bool = False  # also without --download
    flags: Tuple[str, ...] = ()  # arguments that only this data set's transforms read

    def downloads(self, args: Any) -> bool:
        """Whether missing data are to be downloaded."""
        return self.always_download or bool(self.download and getattr(args, "download", False))

    def how_to_get(self, root: str) -> str:
        """What the root must contain and how to get it, in words."""
        text = f"{root} must contain {self.expected or ', '.join(self.layout)}"
        for name, md5 in self.md5.items():
            path = os.path.join(root, name)
            if name.endswith("gz") and os.path.isfile(path) and not check_md5(path, md5):
                text = f"the md5 of {path} is {calculate_md5(path)} instead of {md5}"
        return f"{text}; --download gets it from {self.url}" if self.download else text


def _cifar(kind: Any) -> DataSet:
    """torchvision's CIFAR10 or CIFAR100, which loads only the official files."""
    def files(root: str, is_train: bool) -> List[Tuple[str, str]]:
        """Path and md5 of each file that a split needs."""
        listed = (kind.train_list if is_train else kind.test_list) + [
            (kind.meta["filename"], kind.meta["md5"])]
        return [(os.path.join(root, kind.base_folder, name), md5) for name, md5 in listed]

    def missing(root: str, is_train: bool) -> List[str]:
        """Also names what is incomplete: another process may be unpacking it."""
        return [path for path, md5 in files(root, is_train) if not cifar.check_integrity(path, md5)]

    def build(root: str, is_train: bool, transform: Callable) -> Any:
        dataset = kind.__new__(kind)
        # torchvision verifies the files of both splits; those of the other one are not needed.
        setattr(dataset, "test_list" if is_train else "train_list", [])
        dataset.__init__(root, is_train, transform)
        return dataset

    def download(root: str) -> None:
        paths = [path for is_train in (True, False) for path, _ in files(root, is_train)]
        if all(map(os.path.exists, paths)):
            raise ValueError(f"{root}/{kind.base_folder} contains other files than the official "
                             "ones (md5 differs): delete it to have them downloaded")
        kind(root, download=True)

    layout = tuple(f"{kind.base_folder}/{name}" for name, _ in kind.train_list + kind.test_list)
    return DataSet(build, missing, layout, download=download, url=kind.url,
                   md5={kind.filename: kind.tgz_md5}, always_download=True)


def _split_folder(root: str, is_train: bool) -> str:
    """The folder of a split: root/train, or root/val, or root/test where there is no val/."""
    names = ("train",) if is_train else ("val", "test")
    folders = [os.path.join(root, name) for name in names]
    return next(filter(os.path.isdir, folders), folders[0])


def _missing_folders(root: str, is_train: bool) -> List[str]:
    folders = [_split_folder(root, part) for part in (True, False)]
    return [folder for folder in folders if not os.path.isdir(folder)]


def _image_folder(root: str, is_train: bool, transform: Callable) -> ImageFolder:
    """The images of root/train/CLASS/, or of root/val/CLASS/."""
    folders = [_split_folder(root, part) for part in (True, False)]
    train, test = ({entry.name for entry in os.scandir(folder) if entry.is_dir()}
                   for folder in folders)
    if train != test or len(train) < 2:
        unequal = ", ".join(sorted(train ^ test))
        found = f"only one has {unequal}" if unequal else f"each has {len(train)}"
        names = " and ".join(f"{os.path.basename(folder)}/" for folder in folders)
        raise ValueError(f"{root}: {names} must have the same class folders, two or more; {found}")
    folder = _split_folder(root, is_train)
    empty = [name for name in sorted(train) if not any(
        path.suffix.lower() in IMG_EXTENSIONS for path in Path(folder, name).rglob("*"))]
    if empty:
        raise ValueError(f"{folder}: no images of the classes {', '.join(empty)}")
    return ImageFolder(folder, transform)


DATA_SETS = {
    "cifar10": _cifar(cifar.CIFAR10),
    "cifar100": _cifar(cifar.CIFAR100),
    "flowers": DataSet(
        Flowers, Flowers.missing, ("jpg/image_*.jpg", "imagelabels.mat", "setid.mat"),
        official=(2040, 6149), download=Flowers.download, url=Flowers.url, md5=Flowers.md5),
    "pets": DataSet(
        Pets, Pets.missing, ("images/*.jpg", "annotations/trainval.txt", "annotations/test.txt"),
        official=(3680, 3669), download=Pets.download, url=Pets.url, md5=Pets.md5),
    "folder": DataSet(_image_folder, _missing_folders, ("train/*/*",),
                      "train/CLASS/*.jpg, and val/CLASS/*.jpg or test/CLASS/*.jpg"),
}


def _download(row: DataSet, root: str, is_train: bool) -> None:
    """Download what is missing, unless another process of this machine has done so meanwhile."""
    with contextlib.ExitStack() as until_done:
        try:
            import fcntl  # not on Windows

            os.makedirs(root, exist_ok=True)
            lock = until_done.enter_context(open(os.path.join(root, ".download.lock"), "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            warnings.warn(f"downloading to {root} without a lock ({error}): let no other process "
                          "do the same", stacklevel=3)
        if not row.missing(root, is_train):
            return
        try:
            row.download(root)
        except ValueError:  # a file that is there is wrong
            raise
        except Exception as error:  # urllib and tarfile raise almost anything
            raise OSError(f"cannot download {row.url}: {error}; launch again, or first put "
                          f"{', '.join(row.md5)} into {root} by hand") from error
