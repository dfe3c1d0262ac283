"""DeiT's `build_dataset` for CIFAR, Oxford Flowers-102, Oxford-IIIT Pets and folders of images."""

import contextlib
import errno
import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Tuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5, check_md5

from oxford_flowers_dataset import Flowers
from oxford_pets_dataset import Pets


def build_transform(is_train: bool, args: Any) -> Callable:
    """MoCo v3's transforms for fine-tuning, with DeiT's random erasing if `args.reprob` is set.

    Args:
        is_train: for training: a crop of 5 % of the area and up, flip, random erasing. Or else for
            evaluation: the middle, after resizing to 256/224 of the input size.
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

    Data that are complete are used as they are. What is missing is downloaded, by one process of
    a machine while the others wait: CIFAR always, Flowers and Pets if `args.download` is true.

    Args:
        is_train: the train images, or else the test images.
        args: with `data_set`, `data_path`, optionally `download`, and what build_transform reads.

    Returns:
        (dataset, int): items are a tensor as build_transform makes it, and a label as Python int.

    Raises:
        NotImplementedError: the data set is none of DATA_SETS.
        FileNotFoundError, ValueError: a file is missing, or not what it should be.
        OSError: a failed download; or, when asked for an image, that it cannot be decoded.
    """
    if args.data_set not in DATA_SETS:
        raise NotImplementedError(f"--data-set {args.data_set}: the choice is "
                                  f"{', '.join(DATA_SETS)}; ImageNet is a `folder`")
    data_set = DATA_SETS[args.data_set]
    root = os.path.abspath(os.path.expanduser(args.data_path))
    build = functools.partial(data_set.build, root, train=is_train,
                              transform=build_transform(is_train, args))
    try:
        dataset = build(download=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        download = data_set.always_download or (getattr(args, "download", False) and data_set.url)
        advice = _elsewhere(data_set.layout, Path(root), error.filename)
        if advice or not download:
            advice = advice or _how_to_get(data_set, root)
            raise FileNotFoundError(f"{error.filename} is missing; {advice}") from error
        dataset = _download(data_set, root, build)
    if hasattr(dataset, "loader"):  # it reads a file for each image
        dataset.loader = functools.partial(_read_image, dataset.loader)
    return dataset, len(dataset.classes)


def _read_image(loader: Callable, path: str) -> Any:
    """What the loader makes of a file; raises OSError with its path where it cannot be decoded."""
    try:
        return loader(path)
    except Exception as error:  # Pillow's decoders raise all sorts
        raise OSError(f"{path} is not readable as an image ({error!r}): replace it") from error


class DataSet(NamedTuple):
    """A choice of --data-set."""

    build: Callable  # takes root, train, transform and download, like torchvision's classes
    layout: Tuple[str, ...]  # what the root must contain, as patterns of `glob`
    url: str = ""  # of what can be downloaded
    md5: Dict[str, str] = {}  # of the files that are downloaded
    images: Dict[bool, int] = {}  # how many the official data set has for training, or else
    always_download: bool = False
    expected: str = ""  # the layout in words, where the patterns do not say it all


def _cifar(cifar: Any) -> DataSet:
    """torchvision's CIFAR10 or CIFAR100, which loads nothing but the official files."""
    names = [name for name, _ in cifar.train_list + cifar.test_list] + [cifar.meta["filename"]]
    layout = tuple(f"{cifar.base_folder}/{name}" for name in names)

    def build(root, train, transform, download):
        absent = [path for path in layout if not os.path.exists(os.path.join(root, path))]
        try:
            return cifar(root, train, transform, download=bool(download and absent))
        except RuntimeError as error:
            if not download:  # another process may be unpacking it: look again after that
                missing = os.path.join(root, [*absent, cifar.base_folder][0])
                raise FileNotFoundError(errno.ENOENT, "incomplete", missing) from error
            if absent:
                raise
            raise ValueError(f"{root}/{cifar.base_folder} contains other files than the official "
                             "ones (md5 differs): delete it, and they are downloaded") from error

    return DataSet(build, layout, cifar.url, {cifar.filename: cifar.tgz_md5}, always_download=True)


def _image_folder(root: str, train: bool, transform: Callable, download: bool) -> ImageFolder:
    """The images of root/train/CLASS/, or of root/val/CLASS/; root/test/ where there is no val/."""
    present = [part for part in ("val", "test") if os.path.isdir(os.path.join(root, part))]
    test = present[0] if present else "val"
    classes, others = ({path.name for path in os.scandir(os.path.join(root, part)) if path.is_dir()}
                       for part in ("train", test))
    if classes != others or len(classes) < 2:
        unequal = ", ".join(sorted(classes ^ others))
        found = f"only one has {unequal}" if unequal else f"each has {len(classes)}"
        raise ValueError(f"{root}: train/ and {test}/ must have the same class folders, two or "
                         f"more; {found}")
    folder = os.path.join(root, "train" if train else test)
    empty = [name for name in sorted(classes) if not any(
        path.suffix.lower() in IMG_EXTENSIONS for path in Path(folder, name).rglob("*"))]
    if empty:
        raise ValueError(f"{folder}: no images of the classes {', '.join(empty)}")
    return ImageFolder(folder, transform)


DATA_SETS = {
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
    "flowers": DataSet(Flowers, ("jpg/image_*.jpg", "imagelabels.mat", "setid.mat"),
                       Flowers.url, Flowers.md5, {True: 2040, False: 6149}),
    "pets": DataSet(Pets, ("images/*.jpg", "annotations/trainval.txt", "annotations/test.txt"),
                    Pets.url, Pets.md5, {True: 3680, False: 3669}),
    "folder": DataSet(_image_folder, ("train/*/*",),
                      expected="train/CLASS/*.jpg, and val/CLASS/*.jpg or test/CLASS/*.jpg"),
}


def _elsewhere(layout: Tuple[str, ...], root: Path, missing: str) -> str:
    """What to pass or move if the data are a level above `root`, up to two below, or misnamed."""
    if root.is_file():
        return f"{root} is a file: pass a folder"
    absent = [pattern for pattern in layout if not any(root.glob(pattern))]
    here = [root, *filter(Path.is_dir, sorted([*root.glob("*"), *root.glob("*/*")]))]
    above = [root.parent, *sorted(root.parent.glob(_loose(root.name)))]
    for folder in here + above if absent else ():
        if folder != root and all(any(folder.glob(pattern)) for pattern in layout):
            return f"it is in {folder}: pass --data-path {folder}"
    changes = []
    for pattern in absent or [str(Path(missing).relative_to(root))]:
        places = sorted(path for folder in here for path in folder.glob(_loose(pattern)))
        if not places or any(root.glob(pattern)):  # by now: another process downloads
            return ""
        place = places[0].with_name("*" + places[0].suffix) if "*" in pattern else places[0]
        found, wanted = place.relative_to(root).parts[0], Path(pattern).parts[0]
        if found != wanted and found.lower() == wanted.lower():  # the name at the top is wrong
            place, pattern = root / found, wanted
        changes.append(f"{place} to {root / pattern}")
    return f"move or rename {', '.join(changes)}"


def _loose(pattern: str) -> str:
    """The pattern for upper and lower case, and for .jpg also another ending of images."""
    loose = re.sub("[a-zA-Z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return loose.replace(".[jJ][pP][gG]", ".[jJpPwW]*")


def _how_to_get(data_set: DataSet, root: str) -> str:
    advice = f"{root} must contain {data_set.expected or ', '.join(data_set.layout)}"
    for name, md5 in data_set.md5.items():
        path = os.path.join(root, name)
        if name.endswith("gz") and os.path.isfile(path) and not check_md5(path, md5):
            advice = f"the md5 of {path} is {calculate_md5(path)} instead of {md5}"
    return f"{advice}; --download gets it from {data_set.url}" if data_set.url else advice


def _download(data_set: DataSet, root: str, build: Callable) -> Any:
    """The data set, once this process or another one of the machine has downloaded it."""
    with contextlib.ExitStack() as until_done:
        try:
            import fcntl  # not on Windows

            os.makedirs(root, exist_ok=True)
            lock = until_done.enter_context(open(os.path.join(root, ".download.lock"), "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            warnings.warn(f"downloading to {root} without a lock ({error}): let no other process "
                          "do the same", stacklevel=3)
        try:
            return build(download=True)
        except ValueError:  # of a file that is there
            raise
        except Exception as error:  # urllib and tarfile raise all sorts
            raise OSError(f"cannot download {data_set.url}: {error}; launch again, or put "
                          f"{', '.join(data_set.md5)} into {root} by hand before") from error
