"""DeiT's `build_dataset` for CIFAR, Oxford Flowers and Pets, ImageNet and folders of images."""

import contextlib
import functools
import operator
import os
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy
import torchvision
from PIL import Image, ImageFile
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.datasets import cifar
from torchvision.datasets.folder import IMG_EXTENSIONS, DatasetFolder, pil_loader
from torchvision.datasets.utils import calculate_md5, check_md5
from torchvision.datasets.vision import VisionDataset

with contextlib.suppress(ImportError):  # photos of iPhones, where this package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

from oxford_flowers_dataset import Flowers
from oxford_pets_dataset import Pets


def build_dataset(is_train: bool, args: Any) -> Tuple[Any, int]:
    """The data set `args.data_set` at `args.data_path`, and its number of classes.

    Complete data are used as they are. Missing data are downloaded, by one process per machine
    while the others wait: CIFAR always, Flowers and Pets if `args.download` is true.

    Args:
        is_train: True for the train images, False for the images to evaluate on: the test images,
            or for folders val/ (or valid/, or test/ if there is neither).
        args: with `data_set`, `data_path`, and what build_transform reads; optionally `download`,
            and `test_split`, which selects test/ of folders that also have a val/.

    Returns:
        (dataset, int): an item is a tensor as build_transform makes it, and a label as Python int.

    Raises:
        NotImplementedError: the data set is not in DATA_SETS.
        FileNotFoundError, ValueError: a file is missing, or not what it should be.
        OSError: a failed download; when indexing, an image that cannot be decoded.
    """
    if args.data_set not in DATA_SETS:
        raise NotImplementedError(f"--data-set {args.data_set}: choose from {', '.join(DATA_SETS)}")
    row = DATA_SETS[args.data_set]
    root, split = os.path.abspath(os.path.expanduser(args.data_path)), split_of(is_train, args)
    missing = row.missing(root, split)
    if missing and row.downloads(args):
        _download(row, root, split)
    elif missing:
        raise FileNotFoundError(f"{missing[0]} is missing; {row.how_to_get(root)}")
    dataset = row.build(root, split, build_transform(is_train, args))
    if hasattr(dataset, "loader"):  # it reads one file per image
        dataset.loader = functools.partial(read_image, row.loader)
    return dataset, len(dataset.classes)


def split_of(is_train: bool, args: Any) -> str:
    """The name of the split: "train", or "test" if `args.test_split` is true, or else "val"."""
    return "train" if is_train else "test" if getattr(args, "test_split", False) else "val"


# Transforms


def build_transform(is_train: bool, args: Any) -> Callable:
    """The transform of `args.data_set`, or MoCo v3's if there is no such argument.

    Args:
        is_train: True for training, with augmentation; False for evaluation.
        args: what `transfer_transform` or `imagenet_transform` reads.

    Returns:
        A callable that takes an RGB PIL image of any size and returns a float32 tensor of shape
        (3, input_size, input_size), normalised by ImageNet's mean and deviation: -2.12 to 2.64.
    """
    row = DATA_SETS.get(getattr(args, "data_set", None))
    return (row.transform if row else transfer_transform)(is_train, args)


def transfer_transform(is_train: bool, args: Any) -> Callable:
    """MoCo v3's transform for fine-tuning, with DeiT's random erasing if `args.reprob` is set.

    Training: a random crop of at least 5 % of the area, a random flip, and random erasing.
    Evaluation: resize to 256/224 of the input size, centre crop. Source: MoCo v3's
    transfer/datasets.py.

    args: with `input_size` in pixels; for training, where they exist, `reprob` (0 to 1), `remode`
    and `recount`, timm's options of random erasing.
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


def imagenet_transform(is_train: bool, args: Any) -> Callable:
    """DeiT's transform for ImageNet, as its commit at hand has it.

    args: DeiT's `input_size`, `color_jitter`, `aa`, `train_interpolation`, `reprob`, `remode`,
    `recount`, and for evaluation `eval_crop_ratio`, which only newer commits have.
    """
    size, is_large = args.input_size, args.input_size > 32
    if is_train:
        transform = create_transform(
            size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
            interpolation=args.train_interpolation, re_prob=args.reprob, re_mode=args.remode,
            re_count=args.recount)
        if not is_large:
            transform.transforms[0] = transforms.RandomCrop(size, padding=4)
        return transform
    ratio = getattr(args, "eval_crop_ratio", None)
    resized = int(256 / 224 * size) if ratio is None else int(size / ratio)
    bicubic = getattr(transforms, "InterpolationMode", Image).BICUBIC  # torchvision before 0.9
    steps = [transforms.Resize(resized, bicubic), transforms.CenterCrop(size)] if is_large else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(
        IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


# Image files


def read_image(loader: Callable, path: str) -> Any:
    """Load an image file; raise OSError with its path if it cannot be decoded."""
    if not os.path.isfile(path) and os.path.exists(path):  # to open a pipe could take forever
        raise OSError(f"{path} is a folder, a pipe or a device: replace it by an image")
    try:
        return loader(path)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise OSError(f"{path} is too large ({int(pixels[0]) / 1e6:.0f} megapixels; Pillow opens "
                      f"{most / 1e6:.0f} at most): scale it down") from error
    except Exception as error:  # Pillow's decoders raise almost anything
        advice = "delete or replace it (fine-tuning with --check names all such images)"
        if is_heic(path) and ".heic" not in Image.registered_extensions():
            advice = HEIC
        is_empty = os.path.exists(path) and not os.path.getsize(path)
        raise OSError(f"{path} is not readable as an image "
                      f"({'it is empty' if is_empty else repr(error)}): {advice}") from error


# EXIF's orientation: how to turn the image. Source: the standard's table of tag 274.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply EXIF's orientation, whatever else is wrong with the metadata."""
    try:
        turn = TURNS.get(image.getexif().get(274))
    except Exception:  # damaged metadata make Pillow raise almost anything
        turn = None
    return image.transpose(getattr(getattr(Image, "Transpose", Image), turn)) if turn else image


def load_photo(path: str) -> Image.Image:
    """An image of any format that Pillow opens, as it is meant to be seen: RGB with 8 bits.

    Its EXIF orientation is applied, transparency becomes white, 16 bits and floats from 0 to 1 are
    scaled to 8 bits, and an animation yields its first frame. Raises ValueError for other numbers.
    """
    with Image.open(path) as file:
        image = _turn_upright(file)
        if image.mode.startswith(("I", "F")):
            image = _scale_to_8_bits(image)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    pixels = numpy.asarray(image)
    highest = 1 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= highest):  # true for nan, too
        raise ValueError(f"its pixels are {pixels.min()} to {pixels.max()}, not 0 to {highest}: "
                         "save it with 8 bits")
    return Image.fromarray((pixels.astype("float64") * (255 / highest)).round().astype("uint8"))


HEIC = "convert HEIC to JPEG, or type pip install pillow-heif"


def is_heic(path: str) -> bool:
    """Whether the file is a photo of an iPhone, by its name, which Pillow alone cannot open."""
    return path.lower().endswith((".heic", ".heif"))


def has_usual_ending(path: str) -> bool:
    """Whether torchvision takes the file for an image, by its name."""
    return path.lower().endswith(IMG_EXTENSIONS)


# Files beside a photo that Pillow can open, and that would be the same photo twice: raw files of
# cameras with a preview, backups, working files, thumbnails, and halves of downloads.
COPIES = (
    "~", ".bak", ".backup", ".old", ".orig", ".tmp", ".temp", ".swp", ".part", ".partial",
    ".crdownload", ".download", ".thm", ".psd", ".xcf", ".dng", ".nef", ".nrw", ".cr2", ".cr3",
    ".crw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw", ".3fr", ".x3f",
    ".erf", ".kdc", ".dcr", ".mos", ".mrw", ".iiq")


def can_open(path: str) -> bool:
    """Whether Pillow can decode the file. A file with a usual ending is not looked at."""
    if has_usual_ending(path):
        return True
    if path.lower().endswith(COPIES):
        return False
    try:
        with Image.open(path) as image:  # for some formats it knows only the header, such as HDF5's
            return not isinstance(image, ImageFile.StubImageFile)
    except Exception:  # Pillow's plug-ins raise almost anything
        return False


# What operating systems and tools leave in folders of photos, besides names that start with a dot.
HIDDEN = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "Thumbs.db"}


def list_images(folder: str, is_image: Callable) -> Tuple[List[str], Counter]:
    """The paths of all images below a folder, in torchvision's order; the other files' endings.

    Hidden files and folders do not count. Symbolic links are followed; one that leads nowhere is
    taken for a file, which is named when it is read. Pipes, sockets and devices are left out: to
    open one could take forever; and links to a folder that they are in, since that has no end.
    Raises OSError for a folder that cannot be read.
    """
    folders, walked, images, left_out = [(folder, ())], [], [], Counter()
    while folders:
        (where, came_from), files = folders.pop(), []
        with os.scandir(where) as found:  # tells pipes from files without a system call for each
            for entry in sorted(found, key=operator.attrgetter("name")):
                if _is_visible(entry.name) and _is(entry.is_dir):
                    inside = came_from  # real paths of the folders from which links were followed
                    if entry.is_symlink():
                        inside, target = (*came_from, os.path.realpath(where)), os.path.realpath(
                            entry.path)
                        if any(os.path.join(path, "").startswith(os.path.join(target, ""))
                               for path in inside):
                            left_out["link to a folder that it is in"] += 1
                            continue
                    folders.append((entry.path, inside))
                elif _is_visible(entry.name):
                    files.append(entry)
        walked.append((where, files))
    for _, files in sorted(walked, key=operator.itemgetter(0)):
        for entry in files:
            if not _is(entry.is_file) and os.path.exists(entry.path):
                left_out["not a regular file"] += 1
            elif is_image(entry.path):
                images.append(entry.path)
            else:
                left_out[os.path.splitext(entry.name)[1] or "without an ending"] += 1
    return images, left_out


def _is(question: Callable[[], bool]) -> bool:
    try:  # contextlib.suppress would take longer than the question
        return question()
    except OSError:  # a link in a circle, or to where you may not look
        return False


def left_out_in_words(left_out: Counter) -> str:
    """How many files are left out, by ending."""
    endings = ", ".join(f"{number} {ending}" for ending, number in left_out.most_common(5))
    advice = f"; {HEIC}" if any(map(is_heic, left_out)) else ""
    return f"files left out, since they are not usable as images: {endings}{advice}"


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in HIDDEN


class ClassFolders(DatasetFolder):
    """The images below folder/CLASS/ for each class; `left_out` counts other files by ending.

    Args:
        folder: contains a folder for each class.
        classes: names of the classes; a label is an index of this list.
        is_image: takes a path and tells whether to use the file.
        transform: applied to each image.

    Raises ValueError if a class has no images.
    """

    def __init__(self, folder: str, classes: List[str], is_image: Callable, transform: Callable
                 ) -> None:
        # DatasetFolder gives len() and items; its own __init__ would use hidden folders, too.
        VisionDataset.__init__(self, folder, transform=transform)
        self.classes, self.loader = classes, pil_loader
        self.samples, self.left_out, empty = [], Counter(), []
        for label, name in enumerate(classes):
            images, left_out = list_images(os.path.join(folder, name), is_image)
            self.samples += [(path, label) for path in images]
            self.left_out += left_out
            empty += [] if images else [name]
        if empty:
            but = f" ({left_out_in_words(self.left_out)})" if self.left_out else ""
            raise ValueError(f"{folder}: no images of the classes {first_five(empty)}{but}; add "
                             "images, or remove these folders")
        self.targets = [label for _, label in self.samples]


def telling_apart(names: List[str], among: List[str]) -> List[str]:
    """The names; those that look like another one, such as with an accent of its own, as ASCII."""
    def look(name: str) -> str:
        return unicodedata.normalize("NFKC", name).strip().casefold()

    looks = Counter(map(look, set(among)))
    return [ascii(name) if looks[look(name)] > 1 else name for name in names]


def first_five(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class ListedImages(DatasetFolder):
    """The images of a data set of torchvision's that lists them, for one or more of its splits.

    Args:
        listed: torchvision's data sets, which all have the same classes.
        root: their folder.
        transform: applied to each image.
    """

    def __init__(self, listed: List[Any], root: str, transform: Callable) -> None:
        VisionDataset.__init__(self, root, transform=transform)
        self.classes, self.loader = list(listed[0].classes), pil_loader
        # These names are torchvision's own, in all versions so far (0.12 to 0.29).
        self.samples = [(str(path), int(label)) for each in listed for path, label in
                        (each._samples if hasattr(each, "_samples")
                         else zip(each._image_files, each._labels))]
        self.targets = [label for _, label in self.samples]


# The choices of --data-set


class DataSet(NamedTuple):
    """A choice of --data-set. A split is "train", "val" or "test", as `split_of` says."""

    build: Callable  # (root, split, transform) -> a data set like torchvision's
    missing: Callable  # (root, split) -> paths that the split needs and that do not exist
    layout: Tuple[str, ...]  # what the root must contain, as patterns of `glob`
    expected: str = ""  # the layout in words, where the patterns are not enough
    official: Optional[Tuple[int, int]] = None  # numbers of train and test images
    transform: Callable = transfer_transform  # (is_train, args) -> transform
    loader: Callable = pil_loader  # (path) -> image
    flags: Tuple[str, ...] = ()  # arguments that only this data set and some others read
    download: Optional[Callable] = None  # (root): download what is missing
    url: str = ""  # where it is downloaded from
    md5: Dict[str, str] = {}  # of the files that are downloaded
    always_download: bool = False  # also without --download

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
    def files(root: str, split: str) -> List[Tuple[str, str]]:
        """Path and md5 of each file that a split needs."""
        listed = (kind.train_list if split == "train" else kind.test_list) + [
            (kind.meta["filename"], kind.meta["md5"])]
        return [(os.path.join(root, kind.base_folder, name), md5) for name, md5 in listed]

    def missing(root: str, split: str) -> List[str]:
        """Also names what is incomplete: another process may be unpacking it."""
        return [path for path, md5 in files(root, split) if not cifar.check_integrity(path, md5)]

    def build(root: str, split: str, transform: Callable) -> Any:
        dataset = kind.__new__(kind)
        # torchvision verifies the files of both splits; those of the other one are not needed.
        setattr(dataset, "test_list" if split == "train" else "train_list", [])
        dataset.__init__(root, split == "train", transform)
        return dataset

    def download(root: str) -> None:
        paths = [path for split in ("train", "val") for path, _ in files(root, split)]
        if all(map(os.path.exists, paths)):
            raise ValueError(f"{root}/{kind.base_folder} contains other files than the official "
                             "ones (md5 differs): delete it to have them downloaded")
        kind(root, download=True)

    layout = tuple(f"{kind.base_folder}/{name}" for name, _ in kind.train_list + kind.test_list)
    return DataSet(build, missing, layout, official=(50000, 10000), download=download, url=kind.url,
                   md5={kind.filename: kind.tgz_md5}, always_download=True)


def _oxford(kind: Any, official: Tuple[int, int], *layout: str) -> DataSet:
    """Flowers or Pets."""
    return DataSet(lambda root, split, transform: kind(root, split == "train", transform),
                   lambda root, split: kind.missing(root, split == "train"), layout,
                   official=official, download=kind.download, url=kind.url, md5=kind.md5)


def _torchvision(name: str, train: Tuple[str, ...], layout: Tuple[str, ...], can_download: bool
                 ) -> DataSet:
    """A data set of torchvision's with official splits; `train` names those to train on."""
    kind = getattr(torchvision.datasets, name, None)

    def missing(root: str, split: str) -> List[str]:
        if kind is None:
            raise ValueError(f"{name} needs torchvision 0.12 or newer: this is "
                             f"{torchvision.__version__}; update it")
        return [os.path.join(root, pattern) for pattern in layout
                if not any(Path(root).glob(pattern))]

    def build(root: str, split: str, transform: Callable) -> Any:
        parts = train if split == "train" else ("test",)
        return ListedImages([kind(root, part) for part in parts], root, transform)

    download = (lambda root: kind(root, "test", download=True)) if can_download else None
    return DataSet(build, missing, layout, download=download, url=getattr(kind, "_URL", ""))


def _split_folder(root: str, split: str) -> str:
    """The folder of a split. "val" is also called valid/, or test/ where there is neither."""
    names = ("val", "valid", "test") if split == "val" else (split,)
    folders = [os.path.join(root, name) for name in names]
    return next(filter(os.path.isdir, folders), folders[0])


def _missing_folder(root: str, split: str) -> List[str]:
    folder = _split_folder(root, split)
    return [] if os.path.isdir(folder) else [folder]


def _class_names(folder: str) -> List[str]:
    """The class folders. Raises ValueError if there are fewer than two."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if _is_visible(entry.name)]
    names = sorted(entry.name for entry in visible if _is(entry.is_dir))
    if len(names) < 2:
        raise ValueError(
            f"{folder} must have two or more class folders; it has {len(names)}, and "
            f"{len(visible) - len(names)} files: move each class's images into a folder of its own "
            f"(ImageNet's val/: with {SORTS_IMAGENET})")
    return names


# What the PyTorch examples recommend for val/ as the archive of ImageNet unpacks it.
SORTS_IMAGENET = ("https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/"
                  "valprep.sh")


def _class_folders(root: str, split: str, transform: Callable, is_image: Callable) -> ClassFolders:
    """The images of root/train/CLASS/, root/val/CLASS/ or root/test/CLASS/."""
    folder, train = _split_folder(root, split), _split_folder(root, "train")
    classes = _class_names(folder)
    if split != "train" and os.path.isdir(train):
        others = _class_names(train)
        for path, names in ((folder, set(classes) - set(others)),
                            (train, set(others) - set(classes))):
            if names:
                only = first_five(telling_apart(sorted(names), classes + others))
                raise ValueError(f"{root}: both splits must have the same class folders; only "
                                 f"{os.path.basename(path)}/ has {only}; rename or remove them, or "
                                 "add them to the other split")
    return ClassFolders(folder, classes, is_image, transform)


DATA_SETS = {
    "cifar10": _cifar(cifar.CIFAR10),
    "cifar100": _cifar(cifar.CIFAR100),
    "flowers": _oxford(Flowers, (2040, 6149), "jpg/image_*.jpg", "imagelabels.mat", "setid.mat"),
    "pets": _oxford(Pets, (3680, 3669), "images/*.jpg", "annotations/trainval.txt",
                    "annotations/test.txt"),
    # For these, MoCo v3 has published no recipe and no figure.
    "food101": _torchvision("Food101", ("train",), (
        "food-101/meta/train.json", "food-101/meta/test.json", "food-101/images/*/*.jpg"), True),
    "aircraft": _torchvision("FGVCAircraft", ("trainval",), tuple(
        f"fgvc-aircraft-2013b/data/{name}" for name in (
            "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt",
            "images/*.jpg")), True),
    "dtd": _torchvision("DTD", ("train", "val"), tuple(f"dtd/dtd/{name}" for name in (
        "labels/train1.txt", "labels/val1.txt", "labels/test1.txt", "images/*/*.jpg")), True),
    "cars": _torchvision("StanfordCars", ("train",), tuple(f"stanford_cars/{name}" for name in (
        "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat",
        "cars_train/*.jpg", "cars_test/*.jpg")), False),
    "imagenet": DataSet(
        functools.partial(_class_folders, is_image=has_usual_ending), _missing_folder,
        ("train/*/*",), "train/CLASS/*.JPEG and val/CLASS/*.JPEG",
        official=(1281167, 50000), transform=imagenet_transform,
        flags=("aa", "color_jitter", "train_interpolation", "eval_crop_ratio", "test_split")),
    "folder": DataSet(
        functools.partial(_class_folders, is_image=can_open), _missing_folder, ("train/*/*",),
        "train/CLASS/*.jpg and, without --hold-out, val/CLASS/*.jpg or test/CLASS/*.jpg (if there "
        "is only CLASS/*.jpg, move it into train/)", loader=load_photo,
        flags=("test_split",)),
}


LOCK = ".download.lock"


def _download(row: DataSet, root: str, split: str) -> None:
    """Download what is missing, unless another process of this machine has done so meanwhile."""
    with contextlib.ExitStack() as until_done:
        try:
            import fcntl  # not on Windows

            os.makedirs(root, exist_ok=True)
            lock = until_done.enter_context(open(os.path.join(root, LOCK), "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            warnings.warn(f"downloading to {root} without a lock ({error}): let no other process "
                          "do the same", stacklevel=3)
        if not row.missing(root, split):
            return
        try:
            row.download(root)
        except ValueError:  # a file that is there is wrong
            raise
        except Exception as error:  # urllib and tarfile raise almost anything
            if os.path.isdir(root) and os.listdir(root) == [LOCK]:  # leave nothing behind
                shutil.rmtree(root, ignore_errors=True)
            raise OSError(f"cannot download {row.url}: {error}; launch again, or first put "
                          f"{', '.join(row.md5) or 'it'} into {root} by hand") from error
