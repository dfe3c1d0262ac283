"""DeiT's `build_dataset` for CIFAR, Oxford Flowers-102, Oxford-IIIT Pets and folders of images."""

import contextlib
import functools
import glob
import http.client
import os
import warnings
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Set, Tuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5, download_and_extract_archive

from oxford_flowers_dataset import Flowers, read_image
from oxford_pets_dataset import Pets


def build_transform(is_train: bool, args: Any) -> Callable:
    """MoCo v3's transforms for fine-tuning, with DeiT's random erasing if `args.reprob` is set.

    Training: RandomResizedCrop (5 % of the area and up), flip, ToTensor, Normalize. Evaluation:
    Resize to 256/224 of the input size, CenterCrop, ToTensor, Normalize. Both are bilinear.

    Args:
        is_train: for training, or else for evaluation.
        args: with `input_size` in pixels; for training, where they exist, `reprob` (0 to 1),
            `remode` and `recount`, timm's options of random erasing.

    Returns:
        A callable that takes an RGB PIL image of any size and returns a float32 tensor of shape
        (3, input_size, input_size), normalised by ImageNet's mean and deviation: -2.12 to 2.64.
    """
    size = args.input_size
    to_tensor = [
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    if not is_train:
        resize = [transforms.Resize(int(256 / 224 * size)), transforms.CenterCrop(size)]
        return transforms.Compose(resize + to_tensor)
    crop = transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0))
    steps = [crop, transforms.RandomHorizontalFlip(), *to_tensor]
    if getattr(args, "reprob", 0) > 0:
        mode, count = getattr(args, "remode", "pixel"), getattr(args, "recount", 1)
        steps.append(RandomErasing(args.reprob, mode=mode, max_count=count, device="cpu"))
    return transforms.Compose(steps)


def build_dataset(is_train: bool, args: Any) -> Tuple[Any, int]:
    """The data set `args.data_set` at `args.data_path`, and its number of classes.

    Data that are complete are used as they are. What is missing is downloaded, by one process of
    a machine while the others wait: CIFAR always, Flowers and Pets if `args.download` is true.

    Args:
        is_train: the training images, or else the test images.
        args: with `data_set`, `data_path`, optionally `download`, and what build_transform reads.

    Returns:
        (dataset, int): items are a tensor as build_transform makes it, and a label as Python int.

    Raises, each with one line that says what to do:
        NotImplementedError: the data set is none of DATA_SETS.
        FileNotFoundError, NotADirectoryError: something is missing.
        ValueError: a file is not what it should be.
        OSError: a failed download; or, when asked for an image, that it cannot be decoded.
    """
    if args.data_set not in DATA_SETS:
        raise NotImplementedError(
            f"--data-set {args.data_set}: the choice is {', '.join(DATA_SETS)}; for ImageNet use "
            f"`--data-set folder`, or DeiT without these modules"
        )
    data_set = DATA_SETS[args.data_set]
    root = os.path.abspath(os.path.expanduser(args.data_path))
    transform = build_transform(is_train, args)
    build = functools.partial(data_set.build, root, train=is_train, transform=transform)
    try:
        dataset = build(download=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        _refuse_download(data_set, root, error.filename, getattr(args, "download", False))
        dataset = _download(data_set, root, build)
    return dataset, len(dataset.classes)


class DataSet(NamedTuple):
    """A choice of --data-set."""

    build: Callable  # takes root, train, transform and download, like torchvision's classes
    layout: Tuple[str, ...]  # what the root must contain, as patterns of `glob`
    url: str = ""  # of the folder with the files to download
    md5: Dict[str, str] = {}  # of these files
    always_download: bool = False
    expected: str = ""  # the layout in words, where the patterns do not say it all


def _cifar(cifar: Any) -> DataSet:
    """torchvision's CIFAR10 or CIFAR100, which loads nothing but the official files."""
    listed = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    md5 = {f"{cifar.base_folder}/{name}": checksum for name, checksum in listed}

    def build(root, train, transform, download):
        if download:
            download_and_extract_archive(cifar.url, root, md5=cifar.tgz_md5)
        for name in md5:
            os.stat(os.path.join(root, name))  # raises FileNotFoundError
        try:
            return cifar(root, train=train, transform=transform)
        except RuntimeError as error:
            differ = [name for name in md5 if calculate_md5(os.path.join(root, name)) != md5[name]]
            raise ValueError(
                f"{root}: not the official files (their md5 differs): {', '.join(differ)}; delete "
                f"{os.path.join(root, cifar.base_folder)}, and it is downloaded anew"
            ) from error

    url = os.path.dirname(cifar.url) + "/"
    return DataSet(build, tuple(md5), url, {cifar.filename: cifar.tgz_md5}, always_download=True)


def _image_folder(root: str, train: bool, transform: Callable, download: bool) -> ImageFolder:
    """The images of root/train/CLASS/, or of root/val/CLASS/; root/test/ where there is no val/."""
    train_classes = _folders_in(os.path.join(root, "train"))
    test = next((name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))), None)
    if test is None:
        there = ", ".join(sorted(_folders_in(root)))
        raise ValueError(f"{root} has neither a folder val/ nor test/, only {there}")
    unequal = sorted(train_classes ^ _folders_in(os.path.join(root, test)))
    if unequal:
        raise ValueError(
            f"train/ and {test}/ in {root} must have the same class folders; in only one of them: "
            f"{', '.join(unequal)}"
        )
    folder = os.path.join(root, "train" if train else test)
    try:
        dataset = ImageFolder(folder, transform, loader=read_image)
    except (FileNotFoundError, RuntimeError) as error:
        raise ValueError(f"{folder}: {_one_line(error)}") from error
    empty = sorted(train_classes - {dataset.classes[label] for label in dataset.targets})
    if empty:  # older torchvision takes them
        raise ValueError(f"{folder}: found no images for the classes {', '.join(empty)}")
    return dataset


def _folders_in(path: str) -> Set[str]:
    with os.scandir(path) as entries:
        return {entry.name for entry in entries if entry.is_dir()}


DATA_SETS = {
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
    "flowers": DataSet(
        Flowers, ("jpg/image_*.jpg", "imagelabels.mat", "setid.mat"), Flowers.url, Flowers.md5
    ),
    "pets": DataSet(
        Pets, ("annotations/trainval.txt", "annotations/test.txt", "images/*.jpg"),
        Pets.url, Pets.md5,
    ),
    "folder": DataSet(_image_folder, ("train/*/*",), expected="train/CLASS/*.jpg, val/CLASS/*.jpg"),
}


def _refuse_download(data_set: DataSet, root: str, missing: str, asked: bool) -> None:
    """Raise FileNotFoundError with what to do instead, unless a download is what helps."""
    layout = data_set.expected or ", ".join(data_set.layout)
    if os.path.isfile(root):
        raise NotADirectoryError(f"{root} is a file: pass the folder that contains {layout}")
    allowed = data_set.always_download or (asked and data_set.url)
    found = _elsewhere(data_set.layout, root) or _near_miss(missing, root)
    if found and (os.path.isdir(root) or not allowed):
        raise FileNotFoundError(f"{missing} is missing; {found}")
    if not allowed:
        damaged = _damaged_archive(data_set.md5, root)
        reason = f"; {damaged}" if damaged else f": {root} must contain {layout}"
        advice = f"; --download gets it from {data_set.url}" if data_set.url else ""
        raise FileNotFoundError(f"{missing} is missing{reason}{advice}")


def _elsewhere(layout: Tuple[str, ...], root: str) -> Optional[str]:
    """What to pass or move where the data are a level above `root` or up to two below it."""
    folders = [root, os.path.dirname(root)]
    for depth in ("*", "*/*"):
        below = glob.glob(os.path.join(glob.escape(root), depth, ""))
        folders += sorted(os.path.dirname(folder) for folder in below)

    def contains(folder, pattern):
        return any(glob.iglob(os.path.join(glob.escape(folder), pattern)))

    for folder in folders:
        if all(contains(folder, pattern) for pattern in layout):
            return None if folder == root else f"it is in {folder}: pass --data-path {folder}"
    moves = []
    for pattern in layout:
        places = [folder for folder in folders if contains(folder, pattern)]
        if not places:
            return None
        if places[0] != root:
            target = os.path.dirname(os.path.join(root, pattern))
            moves.append(f"{os.path.join(places[0], pattern)} to {target}")
    return f"to put it there, move {' and '.join(moves)}"


def _near_miss(missing: str, root: str) -> Optional[str]:
    """What is there under a name in other upper or lower case, or an image with another ending."""
    folder, name = os.path.split(missing)
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)

    def key(name):
        stem, ending = os.path.splitext(name.lower())
        return stem if ending in IMG_EXTENSIONS else stem + ending

    for other in sorted(os.listdir(folder)):
        if other != name and key(other) == key(name):
            found, at_root = os.path.join(folder, other), os.path.join(folder, name) == root
            advice = f"pass --data-path {found}" if at_root else f"rename it to {name}"
            return f"{found} is there: {advice}"
    return None


def _damaged_archive(md5: Dict[str, str], root: str) -> Optional[str]:
    """An archive that is there and is not the official one. Other files may be the user's own."""
    for name in md5:
        path = os.path.join(root, name)
        found = calculate_md5(path) if name.endswith("gz") and os.path.isfile(path) else md5[name]
        if found != md5[name]:
            return f"the checksum (md5) of {path} is {found} instead of {md5[name]}"
    return None


def _download(data_set: DataSet, root: str, build: Callable) -> Any:
    """The data set, once this process or another one of the machine has downloaded it."""
    with _one_process_at_a_time(root):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return build(download=False)
        damaged = _damaged_archive(data_set.md5, root)
        if damaged:
            warnings.warn(f"{damaged}; it is downloaded anew", stacklevel=3)
        try:
            return build(download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            raise OSError(
                f"cannot download from {data_set.url}: {_one_line(error)}; the same command again "
                f"goes on, also with files put into {root} by hand: {', '.join(data_set.md5)}"
            ) from error


@contextlib.contextmanager
def _one_process_at_a_time(folder: str) -> Iterator[None]:
    """A lock between the processes of a machine, or a warning where there are none."""
    path = os.path.join(folder, ".download.lock")
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # not on Windows

            os.makedirs(folder, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            warnings.warn(
                f"downloading to {folder} without a lock ({_one_line(error)}): let no other "
                f"process do the same", stacklevel=4,
            )
        yield
        # The data are there, so whoever waits for this lock, or makes a new one, has no use for it.
        with contextlib.suppress(OSError):
            os.remove(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
