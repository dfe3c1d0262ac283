"""Oxford Flowers-102."""

import errno
import os
from typing import Callable, List, Optional, Tuple

import scipy.io
from torchvision.datasets.folder import DatasetFolder, pil_loader
from torchvision.datasets.utils import download_and_extract_archive, download_url
from torchvision.datasets.vision import VisionDataset


class Flowers(DatasetFolder):
    """`Oxford Flowers-102 <https://www.robots.ox.ac.uk/~vgg/data/flowers/102/>`_.

    There are 2040 train images, which are the official train and validation sets together
    (1020 + 1020), and 6149 test images, as `setid.mat` lists them. An item is an RGB PIL image, or
    what `transform` makes of it, and a label: an int from 0 to 101, one less than in
    `imagelabels.mat`.

    Args:
        root: folder with `jpg/image_00001.jpg` and so on, `imagelabels.mat` and `setid.mat`.
        train: True for the train images, False for the test images.
        transform: applied to each image.
        download: download what is missing (345 MB in all).

    Raises FileNotFoundError for a missing file or listed image, and ValueError for a .mat file that
    cannot be read or has a number out of range. Indexing raises whatever Pillow raises for a broken
    image.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    md5 = {
        "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
        "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    }
    classes = [str(number) for number in range(1, 103)]  # the data set has no names for them

    def __init__(self, root: str, train: bool = True, transform: Optional[Callable] = None,
                 download: bool = False) -> None:
        # DatasetFolder gives len() and items; its own __init__ would search the folder for classes.
        VisionDataset.__init__(self, root, transform=transform)
        self.loader = pil_loader
        if download:
            self.download(self.root)
        for path in self.missing(self.root, train):
            raise FileNotFoundError(errno.ENOENT, "missing from Oxford Flowers-102", path)
        self.samples = self._list_images(self.root, train)
        self.targets = [label for _, label in self.samples]
        if train:  # the images of the official val set, which are the last ones, by index
            official = self._read(self.root, "setid.mat", "trnid", highest=len(self.samples) * 99)
            self.validation = range(len(official), len(self.samples))

    @classmethod
    def missing(cls, root: str, train: bool) -> List[str]:
        """Paths that this split needs and that do not exist: .mat files, else images."""
        lists = [os.path.join(root, name) for name in cls.md5 if name.endswith(".mat")]
        absent = [path for path in lists if not os.path.isfile(path)]
        if absent:
            return absent
        folder = os.path.join(root, "jpg")
        present = set(os.listdir(folder)) if os.path.isdir(folder) else ()  # quick, also over NFS
        return sorted(path for path, _ in cls._list_images(root, train)
                      if os.path.basename(path) not in present)

    @classmethod
    def download(cls, root: str) -> None:
        """Download what is missing. Only one process at a time may do this."""
        for name in cls.md5:
            path = os.path.join(root, name)
            if name.endswith(".mat") and not os.path.isfile(path):
                # Other processes must not see the file under its name before it is complete.
                download_url(cls.url + name, root, name + ".part", cls.md5[name])
                os.replace(path + ".part", path)
        if cls.missing(root, True) + cls.missing(root, False):
            name = "102flowers.tgz"
            download_and_extract_archive(cls.url + name, root, md5=cls.md5[name])

    @classmethod
    def _list_images(cls, root: str, train: bool) -> List[Tuple[str, int]]:
        """Path and label of each image of a split."""
        labels = cls._read(root, "imagelabels.mat", "labels", highest=len(cls.classes))
        splits = ("trnid", "valid") if train else ("tstid",)
        indices = [i for name in splits for i in cls._read(root, "setid.mat", name, len(labels))]
        return [(os.path.join(root, "jpg", f"image_{i + 1:05d}.jpg"), labels[i]) for i in indices]

    @staticmethod
    def _read(root: str, name: str, variable: str, highest: int) -> List[int]:
        """The numbers of a variable: 1 to `highest` in the file, 0 to `highest` - 1 here."""
        path = os.path.join(root, name)
        try:
            with open(path, "rb") as file:
                numbers = scipy.io.loadmat(file)[variable].ravel().astype(int).tolist()
            if not numbers:
                raise ValueError("it is empty")
            if min(numbers) < 1 or max(numbers) > highest:
                raise ValueError(f"it has {min(numbers)} to {max(numbers)}")
            return [number - 1 for number in numbers]
        except Exception as error:  # SciPy raises almost anything for a damaged file
            raise ValueError(f"{path}: cannot read {variable!r}, numbers from 1 to {highest}: "
                             f"{error!r}") from error
