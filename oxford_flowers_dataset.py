"""Oxford Flowers-102, and what the data sets of this bundle share: images, checks, downloads.

The shared part stands here because the bundle drops into DeiT as exactly three modules, and the
one named `datasets` may be shadowed by an installed package of that name.
"""

import contextlib
import fcntl
import http.client
import os
import shutil
import struct
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.datasets.vision import VisionDataset

# The real files have 502 bytes and 15 kB.
MAT_FILE_LIMIT = 256 * 1024
# What an element of a MATLAB 5 file is: a variable, a compressed one, or numbers (NumPy's names).
VARIABLE, COMPRESSED = 14, 15
NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
           12: "<i8", 13: "<u8"}
NUMERIC_CLASSES = range(6, 16)
COMPLEX_OR_LOGICAL = 0b1010


class Resource(NamedTuple):
    """A file to download, its md5, and the file or folder that it puts into the data folder."""

    file: str
    md5: str
    yields: str


def one_line(error):
    """The error's text on one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path):
    """The image in RGB, whatever format its name claims; EXIF orientation is not applied."""
    try:
        with Image.open(path) as image:
            image.load()
            # An image that is RGB already needs no copy.
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise all sorts on a broken file
        raise OSError(f"{path} cannot be read as an image: {one_line(error)}") from error


@contextlib.contextmanager
def exclusive(folder):
    """Let one process of all at a time in. The kernel frees the lock of one that was killed.

    The folder must exist. Raises OSError where no file can be made in it.
    """
    with open(os.path.join(folder, ".download.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download_missing(root, base_url, resources):
    """Download, check and unpack what `root` lacks: in one process, while others wait for it.

    Each resource appears under its name in one step, so what is there is whole. A run that was
    killed leaves only the folder `download.part`, which the next one uses and removes.
    """
    missing = [item for item in resources if not _is_there(os.path.join(root, item.yields))]
    part = os.path.join(root, "download.part")
    if not missing:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed with all installed
        return
    item = missing[0]
    try:
        os.makedirs(root, exist_ok=True)
        with exclusive(root):
            for item in missing:
                if not _is_there(os.path.join(root, item.yields)):
                    _install(root, part, base_url, item)
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {base_url}{item.file} into {root}: {one_line(error)}; run again, "
            f"or download that file to {os.path.join(root, item.file)} yourself"
        ) from error


def _is_there(path):
    return os.path.isfile(path) or (os.path.isdir(path) and bool(os.listdir(path)))


def _install(root, part, base_url, item):
    download = os.path.join(root, item.file)
    if not check_integrity(download, item.md5):
        download = os.path.join(part, item.file)
        download_url(base_url + item.file, part, md5=item.md5)
    if item.file == item.yields:
        os.rename(download, os.path.join(root, item.yields))
        return
    unpacked = os.path.join(part, "unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    extract_archive(download, unpacked)
    os.rename(os.path.join(unpacked, item.yields), os.path.join(root, item.yields))


class LabelledImages(VisionDataset):
    """Images of one folder, each with a label. A subclass sets the upper-case facts and read_split.

    LAYOUT says in an error what the folder must hold; without BASE_URL and RESOURCES there is
    nothing to download.

    Attributes: `train` (bool), `image_folder` (str), `names` (file name of each image, NumPy
    str) and `targets` (its label, NumPy int64). Both are arrays, not lists: worker processes
    then share them, where counting references to Python objects would copy them.
    """

    LAYOUT = IMAGE_FOLDER = BASE_URL = ""
    RESOURCES = ()
    TRAINING_IMAGES = TEST_IMAGES = CLASSES = 0

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        root = os.path.expanduser(os.fspath(root))
        super().__init__(root, transform=transform, target_transform=target_transform)
        self.train = train
        self.image_folder = os.path.join(root, self.IMAGE_FOLDER)
        if download:
            download_missing(root, self.BASE_URL, self.RESOURCES)
        names, targets = self.read_split()
        self._check_labels(targets)
        self._check_images(names)
        self.names, self.targets = np.array(names), np.array(targets, np.int64)

    def read_split(self):
        """File names in the image folder, and labels, of the split that `self.train` tells."""
        raise NotImplementedError

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = read_image(os.path.join(self.image_folder, self.names[index]))
        target = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def path_of(self, *parts):
        """The path of a file that the layout asks for; raises FileNotFoundError without it."""
        path = os.path.join(self.root, *parts)
        if not os.path.isfile(path):
            raise self._missing(path)
        return path

    def _missing(self, path):
        source = f" (from {self.BASE_URL}, or by --download)" if self.BASE_URL else ""
        return FileNotFoundError(
            f"{path} is missing: {self.root} must hold {self.LAYOUT}{source}"
        )

    def _check_labels(self, targets):
        if len(targets) and not 0 <= min(targets) <= max(targets) < self.CLASSES:
            raise ValueError(f"{self.root}: the labels are {min(targets)} to {max(targets)}, "
                             f"they must be 0 to {self.CLASSES - 1}")

    def _check_images(self, names):
        """Every image is there; a number other than the official one is worth a warning."""
        if not os.path.isdir(self.image_folder):
            raise self._missing(self.image_folder)
        with os.scandir(self.image_folder) as entries:
            present = {entry.name for entry in entries if entry.is_file()}
        for name in names:
            if name not in present:
                raise self._missing(os.path.join(self.image_folder, name))
        official = self.TRAINING_IMAGES if self.train else self.TEST_IMAGES
        if len(names) != official:
            split = "training" if self.train else "test"
            warnings.warn(
                f"{self.root} has {len(names)} {split} images; the official set has {official}",
                stacklevel=2,
            )


class Flowers(LabelledImages):
    """`Oxford Flowers-102 <https://www.robots.ox.ac.uk/~vgg/data/flowers/102/>`_.

    Photographs of 102 kinds of flowers. Training takes the official training and validation
    sets together, 1020 + 1020 images; evaluation takes the official test set, 6149 images. The
    numbers are those of `setid.mat`. Items are an RGB PIL image, or what `transform` makes of
    it, and a label as Python int, 0 to 101: one less than in `imagelabels.mat`.

    Raises, when built: FileNotFoundError for a missing file, folder or image; ValueError for a
    file that is not what it should be; OSError for a failed download. An image that cannot be
    read raises OSError when it is asked for. Each names the path in one line.

    Args:
        root: folder that holds `jpg/image_00001.jpg` and on, `imagelabels.mat` and `setid.mat`.
        train: the training images, or else the test images.
        transform: applied to the image.
        target_transform: applied to the label.
        download: download from the data set's page what is missing (345 MB in all).
    """

    LAYOUT = "jpg/image_00001.jpg and on, imagelabels.mat, setid.mat"
    IMAGE_FOLDER = "jpg"
    BASE_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    RESOURCES = (
        Resource("102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "jpg"),
        Resource("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "imagelabels.mat"),
        Resource("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "setid.mat"),
    )
    TRAINING_IMAGES, TEST_IMAGES, CLASSES = 2040, 6149, 102

    def read_split(self):
        """By the ids of setid.mat, which count from 1."""
        labels = read_row(self.path_of("imagelabels.mat"), "labels", self.CLASSES)
        splits = ("trnid", "valid") if self.train else ("tstid",)
        setid = self.path_of("setid.mat")
        ids = np.concatenate([read_row(setid, split, len(labels)) for split in splits])
        return [f"image_{number:05d}.jpg" for number in ids], labels[ids - 1] - 1


def read_row(path, variable, highest):
    """The 1 x N variable of a MATLAB 5 file: whole numbers from 1 to `highest`, as int64.

    Read without SciPy, which a damaged file can crash, and a small one can have fill the memory.
    """
    if os.path.getsize(path) > MAT_FILE_LIMIT:
        raise ValueError(f"{path} is larger than {MAT_FILE_LIMIT} bytes: not the official file")
    try:
        with open(path, "rb") as file:
            row = _find_row(file.read(), variable)
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: cannot read {variable!r}: {one_line(error)}") from error
    # In float64, NaN and 8-bit numbers compare as they should.
    values = row.astype(np.float64)
    valid = (values >= 1) & (values <= highest) & (values == np.floor(values))
    if not len(values) or not valid.all():
        wrong = f"it has {values[~valid][0]:g}" if len(values) else "it is empty"
        raise ValueError(f"{path}: {variable!r} must hold numbers from 1 to {highest}; {wrong}")
    return values.astype(np.int64)


def _find_row(content, variable):
    if content[124:128] != b"\0\1IM":
        raise ValueError("it is no MATLAB 5 file")
    found = []
    for kind, element in _elements(memoryview(content)[128:]):
        if kind == COMPRESSED:
            [(kind, element)] = _elements(_decompress(element))
        parts = list(_elements(element)) if kind == VARIABLE else []
        if len(parts) > 2 and parts[2][1] == variable.encode():
            found.append(parts)
    if len(found) != 1:
        raise ValueError(f"expected one variable of that name, found {len(found)}")
    return _row(*found[0])


def _elements(content):
    """Kind and content of each element, one after the other."""
    while content:
        kind, size = struct.unpack_from("<II", content)
        start = 8
        if kind >> 16:  # up to four bytes stand in the place of the size
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        if start + size > len(content):
            raise ValueError("it is cut off")
        yield kind, content[start:start + size]
        padding = 0 if kind == COMPRESSED else -(start + size) % 8
        content = content[start + size + padding:]


def _decompress(element):
    decompressor = zlib.decompressobj()
    content = decompressor.decompress(element, MAT_FILE_LIMIT)
    if not decompressor.eof:
        raise ValueError(f"it is cut off, or has more than {MAT_FILE_LIMIT} bytes when unpacked")
    return memoryview(content)


def _row(flags, shape, name, *numbers):
    """The numbers of a variable's elements, each a kind and a content."""
    shape = np.frombuffer(shape[1], "<i4")
    if (flags[1][0] not in NUMERIC_CLASSES or flags[1][1] & COMPLEX_OR_LOGICAL or len(shape) != 2
            or shape[0] != 1 or len(numbers) != 1 or numbers[0][0] not in NUMBERS):
        raise ValueError("expected a 1 x N row of numbers")
    row = np.frombuffer(numbers[0][1], NUMBERS[numbers[0][0]])
    if len(row) != shape[1]:
        raise ValueError(f"{len(row)} numbers instead of {shape[1]}")
    return row
