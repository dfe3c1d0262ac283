"""Oxford-IIIT Pets."""

import errno
import os
from typing import Callable, List, Optional, Tuple

from torchvision.datasets.folder import DatasetFolder, pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.vision import VisionDataset


class Pets(DatasetFolder):
    """`Oxford-IIIT Pets <https://www.robots.ox.ac.uk/~vgg/data/pets/>`_.

    37 breeds of cats and dogs: 3680 train images (`trainval.txt`) and 3669 test images
    (`test.txt`). An item is an RGB PIL image, or what `transform` makes of it, and a label: an int
    from 0 to 36, one less than in the lists; `classes` has the breeds' names. Some files named .jpg
    are PNG or GIF images.

    Args:
        root: folder with `images/`, `annotations/trainval.txt` and `annotations/test.txt`.
        train: True for the train images, False for the test images.
        transform: applied to each image.
        download: download what is missing (811 MB in all).

    Raises FileNotFoundError for a missing list or listed image, and ValueError for a malformed line
    of a list. Indexing raises whatever Pillow raises for a broken image.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
    md5 = {
        "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
        "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    }
    breeds = 37

    def __init__(self, root: str, train: bool = True, transform: Optional[Callable] = None,
                 download: bool = False) -> None:
        # DatasetFolder gives len() and items; its own __init__ would search the folder for classes.
        VisionDataset.__init__(self, root, transform=transform)
        self.loader = pil_loader
        if download:
            self.download(self.root)
        for path in self.missing(self.root, train):
            raise FileNotFoundError(errno.ENOENT, "missing from Oxford-IIIT Pets", path)
        self.classes = self._class_names(self.root)
        self.samples = self._list_images(self.root, train)
        self.targets = [label for _, label in self.samples]

    @classmethod
    def missing(cls, root: str, train: bool) -> List[str]:
        """Paths that this split needs and that do not exist: its list, else images."""
        path = cls._list_path(root, train)
        if not os.path.isfile(path):
            return [path]
        folder = os.path.join(root, "images")
        present = set(os.listdir(folder)) if os.path.isdir(folder) else ()  # quick, also over NFS
        return sorted(path for path, _ in cls._list_images(root, train)
                      if os.path.basename(path) not in present)

    @classmethod
    def download(cls, root: str) -> None:
        """Download what is missing. Only one process at a time may do this."""
        if not all(os.path.isfile(cls._list_path(root, train)) for train in (True, False)):
            name = "annotations.tar.gz"
            download_and_extract_archive(cls.url + name, root, md5=cls.md5[name])
        if cls.missing(root, True) + cls.missing(root, False):
            name = "images.tar.gz"
            download_and_extract_archive(cls.url + name, root, md5=cls.md5[name])

    @classmethod
    def _class_names(cls, root: str) -> List[str]:
        """The breeds by label: "Abyssinian_100" in the lists is one; a number for any other."""
        names = [str(number) for number in range(1, cls.breeds + 1)]
        for train in (True, False):
            if os.path.isfile(cls._list_path(root, train)):
                for path, label in cls._list_images(root, train):
                    names[label] = os.path.basename(path).rpartition("_")[0] or names[label]
        return names

    @staticmethod
    def _list_path(root: str, train: bool) -> str:
        return os.path.join(root, "annotations", "trainval.txt" if train else "test.txt")

    @classmethod
    def _list_images(cls, root: str, train: bool) -> List[Tuple[str, int]]:
        """Path and label of each image of a split, from lines of name, class and more."""
        path, samples = cls._list_path(root, train), []
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    name, number = line.split()[:2]
                    label = range(1, cls.breeds + 1).index(int(number))
                except ValueError as error:
                    raise ValueError(f"{path}: expected a name and a class from 1 to "
                                     f"{cls.breeds}, found {line.strip()[:80]!r}") from error
                samples.append((os.path.join(root, "images", name + ".jpg"), label))
        if not samples:
            raise ValueError(f"{path} lists no images")
        return samples
