"""Oxford-IIIT Pets."""

import os
from typing import Any, Callable, List, Optional, Tuple

from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.vision import VisionDataset


class Pets(VisionDataset):
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
    line of a list; an item, OSError where it cannot be decoded.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
    md5 = {
        "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
        "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    }
    classes = [str(number) for number in range(1, 38)]  # the lists have numbers, not names

    def __init__(self, root: str, train: bool = True, transform: Optional[Callable] = None,
                 download: bool = False) -> None:
        super().__init__(root, transform=transform)
        self.list = os.path.join(self.root, "annotations", "trainval.txt" if train else "test.txt")
        if download:
            self._download()
        self.paths, self.targets = self._find_images()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        image = read_image(self.paths[index])
        return self.transform(image) if self.transform else image, self.targets[index]

    def _find_images(self) -> Tuple[List[str], List[int]]:
        """Path and label of each image, which must be there, from lines of name, class and more."""
        with open(self.list, encoding="utf-8-sig", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        paths, targets = [], []
        for line in lines:
            try:
                name, label = line.split()[:2]
                targets.append(self.classes.index(label))
            except ValueError as error:
                raise ValueError(f"{self.list}: expected a name and a class from 1 to "
                                 f"{len(self.classes)}, found {line[:80]!r}") from error
            paths.append(os.path.join(self.root, "images", name + ".jpg"))
        if not paths:
            raise ValueError(f"{self.list} lists no images")
        present = set(os.listdir(os.path.join(self.root, "images")))  # one look, also over NFS
        for path in paths:
            if os.path.basename(path) not in present:
                os.stat(path)  # raises FileNotFoundError
        return paths, targets

    def _download(self) -> None:
        # The list before images: another process that sees half a list misses images, too.
        if not os.path.exists(self.list):
            self._download_archive("annotations.tar.gz")
        try:
            self._find_images()
        except FileNotFoundError:
            self._download_archive("images.tar.gz")

    def _download_archive(self, name: str) -> None:
        download_and_extract_archive(self.url + name, self.root, md5=self.md5[name])


def read_image(path: str) -> Any:
    """The image as RGB PIL image; raises OSError with its path where it cannot be decoded."""
    try:
        return pil_loader(path)
    except Exception as error:  # Pillow's decoders raise all sorts
        raise OSError(f"{path} is not readable as an image: {error!r}") from error
