"""Oxford-IIIT Pets."""

import os
import warnings
from typing import Any, Callable, List, Optional, Tuple

from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.vision import VisionDataset


class Pets(VisionDataset):
    """`Oxford-IIIT Pets <https://www.robots.ox.ac.uk/~vgg/data/pets/>`_.

    Photographs of 37 breeds of cats and dogs: 3680 for training (`trainval.txt`) and 3669 for the
    test (`test.txt`). Items are an RGB PIL image, or what `transform` makes of it, and a label: a
    Python int, 0 to 36, one less than in the lists. Some of the files named .jpg are PNG or GIF
    images; they are read all the same.

    Args:
        root: folder with `images/`, `annotations/trainval.txt` and `annotations/test.txt`.
        train: the training images, or else the test images.
        transform: applied to the image.
        target_transform: applied to the label.
        download: download what is missing (811 MB in all).

    Raises:
        FileNotFoundError: a list, or an image that it names, is missing.
        ValueError: a line of a list is malformed.
        OSError: when asked for an image that cannot be decoded.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
    md5 = {
        "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
        "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    }
    classes = [str(number) for number in range(1, 38)]  # the lists have numbers, not names

    def __init__(
        self,
        root: str,
        train: bool = True,
        transform: Optional[Callable] = None,
        target_transform: Optional[Callable] = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform=transform, target_transform=target_transform)
        self.train = train
        if download:
            self._download()
        self._load()
        split, official = ("training", 3680) if train else ("test", 3669)
        if len(self) != official:
            text = f"contains {len(self)} {split} images; the official data set has {official}"
            warnings.warn(f"{self.root} {text}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        image, target = read_image(self.paths[index]), self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _read_split(self) -> Tuple[List[str], List[int]]:
        """Name and label of each image, from lines of name, class, species and breed."""
        path = os.path.join(self.root, "annotations", "trainval.txt" if self.train else "test.txt")
        names, targets = [], []
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                words = line.split()
                if not words or words[0].startswith("#"):
                    continue
                label = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
                if not 1 <= label <= len(self.classes):
                    raise ValueError(f"{path}, line {number}: expected a name and a class from 1 "
                                     f"to {len(self.classes)}, found {line.strip()[:80]!r}")
                names.append(words[0] + ".jpg")
                targets.append(label - 1)
        if not names:
            raise ValueError(f"{path} lists no images")
        return names, targets

    def _load(self) -> None:
        """Read names and labels, and see that every image is there."""
        names, self.targets = self._read_split()
        folder = os.path.join(self.root, "images")
        present = set(os.listdir(folder))
        self.paths = [os.path.join(folder, name) for name in names]
        for name, path in zip(names, self.paths):
            if name not in present:
                os.stat(path)  # raises FileNotFoundError

    def _download(self) -> None:
        # Lists before images: another process that sees half a list misses images, too.
        folder = os.path.join(self.root, "annotations")
        lists = [os.path.join(folder, name) for name in ("trainval.txt", "test.txt")]
        if not all(os.path.exists(path) for path in lists):
            self._download_archive("annotations.tar.gz")
        try:
            self._load()
        except FileNotFoundError:
            self._download_archive("images.tar.gz")

    def _download_archive(self, name: str) -> None:
        download_and_extract_archive(self.url + name, self.root, md5=self.md5[name])


def read_image(path: str) -> Any:
    """The image as RGB PIL image; raises OSError with its path where it cannot be decoded."""
    try:
        return pil_loader(path)
    except Exception as error:  # Pillow's decoders raise all sorts
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path} cannot be read as an image: {text}") from error
