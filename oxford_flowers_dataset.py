"""Oxford Flowers-102."""

import os
import warnings
from typing import Any, Callable, List, Optional, Tuple

import scipy.io
from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import download_and_extract_archive, download_url
from torchvision.datasets.vision import VisionDataset


class Flowers(VisionDataset):
    """`Oxford Flowers-102 <https://www.robots.ox.ac.uk/~vgg/data/flowers/102/>`_.

    Photographs of 102 kinds of flowers. Training takes the official training and validation sets
    together, 1020 + 1020 images; the test set has 6149. These numbers are those of `setid.mat`.
    Items are an RGB PIL image, or what `transform` makes of it, and a label: a Python int, 0 to
    101, one less than in `imagelabels.mat`.

    Args:
        root: folder with `jpg/image_00001.jpg` and so on, `imagelabels.mat` and `setid.mat`.
        train: the training images, or else the test images.
        transform: applied to the image.
        target_transform: applied to the label.
        download: download what is missing (345 MB in all).

    Raises:
        FileNotFoundError: a file, or an image that `setid.mat` lists, is missing.
        ValueError: a .mat file cannot be read, or has a number out of range.
        OSError: when asked for an image that cannot be decoded.
    """

    url = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    md5 = {
        "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
        "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    }
    classes = [str(number) for number in range(1, 103)]  # the data set has no names for them

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
        split, official = ("training", 2040) if train else ("test", 6149)
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
        """Name and label of each image; the ids in `setid.mat` count from 1."""
        labels = self._read_row("imagelabels.mat", "labels", highest=len(self.classes))
        ids = []
        for split in ("trnid", "valid") if self.train else ("tstid",):
            ids += self._read_row("setid.mat", split, highest=len(labels))
        return [f"image_{number:05d}.jpg" for number in ids], [labels[n - 1] - 1 for n in ids]

    def _read_row(self, name: str, variable: str, highest: int) -> List[int]:
        path = os.path.join(self.root, name)
        with open(path, "rb") as file:
            try:
                row = scipy.io.loadmat(file)[variable].ravel().astype(int).tolist()
            except Exception as error:  # SciPy raises all sorts on a damaged file
                text = " ".join(repr(error).split())
                raise ValueError(f"{path}: cannot read {variable!r}: {text}") from error
        wrong = [number for number in row if not 1 <= number <= highest]
        if wrong or not row:
            found = f"found {wrong[0]}" if wrong else "it is empty"
            raise ValueError(f"{path}: {variable!r} must be numbers from 1 to {highest}; {found}")
        return row

    def _load(self) -> None:
        """Read names and labels, and see that every image is there."""
        names, self.targets = self._read_split()
        folder = os.path.join(self.root, "jpg")
        present = set(os.listdir(folder))
        self.paths = [os.path.join(folder, name) for name in names]
        for name, path in zip(names, self.paths):
            if name not in present:
                os.stat(path)  # raises FileNotFoundError

    def _download(self) -> None:
        for name in ("imagelabels.mat", "setid.mat"):
            path = os.path.join(self.root, name)
            if not os.path.exists(path):
                # Other processes may look for it meanwhile: it gets its name when it is whole.
                download_url(self.url + name, self.root, name + ".part", self.md5[name])
                os.replace(path + ".part", path)
        try:
            self._load()
        except FileNotFoundError:
            archive = "102flowers.tgz"
            download_and_extract_archive(self.url + archive, self.root, md5=self.md5[archive])


def read_image(path: str) -> Any:
    """The image as RGB PIL image; raises OSError with its path where it cannot be decoded."""
    try:
        return pil_loader(path)
    except Exception as error:  # Pillow's decoders raise all sorts
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path} cannot be read as an image: {text}") from error
