"""Oxford-IIIT Pets."""

import os
from typing import Callable, List, Optional, Tuple

from torchvision.datasets.folder import DatasetFolder, pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.vision import VisionDataset


class Pets(DatasetFolder):
    """`Oxford-IIIT Pets <https://www.robots.ox.ac.uk/~vgg/data/pets/>`_.

    37 breeds of cats and dogs: 3680 train images (`trainval.txt`) and 3669 test images
    (`test.txt`). Items are an RGB PIL image, or what `transform` makes of it, and a label: an int,
    0 to 36, one less than in the lists. Some files named .jpg are PNG or GIF images.

    Args:
        root: folder with `images/`, `annotations/trainval.txt` and `annotations/test.txt`.
        train: the train images, or else the test images.
        transform: applied to the image.
        download: download what is missing (811 MB in all).

    Raises FileNotFoundError for a list or listed image that is missing, ValueError for a malformed
    line of a list; an item, what Pillow raises where it cannot be decoded.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
    md5 = {
        "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
        "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    }
    classes = [str(number) for number in range(1, 38)]  # the lists have numbers, not names

    def __init__(self, root: str, train: bool = True, transform: Optional[Callable] = None,
                 download: bool = False) -> None:
        # DatasetFolder gives len() and items; its own __init__ would search the folder for classes.
        VisionDataset.__init__(self, root, transform=transform)
        self.list = os.path.join(self.root, "annotations", "trainval.txt" if train else "test.txt")
        self.loader = pil_loader
        for _ in self.md5 if download else ():  # at most each archive, the one with lists first
            try:
                self._find_images()
            except FileNotFoundError as error:
                name = "annotations.tar.gz" if error.filename == self.list else "images.tar.gz"
                download_and_extract_archive(self.url + name, self.root, md5=self.md5[name])
        self.samples = self._find_images()
        self.targets = [label for _, label in self.samples]

    def _find_images(self) -> List[Tuple[str, int]]:
        """Path and label of each image, which must be there, from lines of name, class and more."""
        folder, samples = os.path.join(self.root, "images"), []
        with open(self.list, encoding="utf-8-sig", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    name, label = line.split()[:2]
                    samples.append((os.path.join(folder, name + ".jpg"), self.classes.index(label)))
                except ValueError as error:
                    raise ValueError(f"{self.list}: expected a name and a class from 1 to "
                                     f"{len(self.classes)}, found {line.strip()[:80]!r}") from error
        if not samples:
            raise ValueError(f"{self.list} lists no images")
        present = {os.path.join(folder, name) for name in os.listdir(folder)}
        for path in sorted(dict(samples).keys() - present):  # one look, also over NFS
            os.stat(path)  # raises FileNotFoundError
        return samples
