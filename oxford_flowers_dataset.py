"""Oxford Flowers-102."""

import os
from typing import Any, Callable, List, Optional, Tuple

import scipy.io
from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import download_and_extract_archive, download_url
from torchvision.datasets.vision import VisionDataset


class Flowers(VisionDataset):
    """`Oxford Flowers-102 <https://www.robots.ox.ac.uk/~vgg/data/flowers/102/>`_.

    2040 train images, the official train and validation sets together (1020 + 1020), and 6149 test
    images, all by `setid.mat`. Items are an RGB PIL image, or what `transform` makes of it, and a
    label: an int, 0 to 101, one less than in `imagelabels.mat`.

    Args:
        root: folder with `jpg/image_00001.jpg` and so on, `imagelabels.mat` and `setid.mat`.
        train: the train images, or else the test images.
        transform: applied to the image.
        download: download what is missing (345 MB in all).

    Raises FileNotFoundError for a file or listed image that is missing, ValueError for a .mat file
    that cannot be read or has a number out of range; an item, OSError where it cannot be decoded.
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
        super().__init__(root, transform=transform)
        self.train = train
        if download:
            self._download()
        self.paths, self.targets = self._find_images()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        image = read_image(self.paths[index])
        return self.transform(image) if self.transform else image, self.targets[index]

    def _find_images(self) -> Tuple[List[str], List[int]]:
        """Path and label of each image, which must be there; numbers in the files start at 1."""
        labels = self._read("imagelabels.mat", "labels", highest=len(self.classes))
        splits = ("trnid", "valid") if self.train else ("tstid",)
        ids = [i for split in splits for i in self._read("setid.mat", split, highest=len(labels))]
        paths = [os.path.join(self.root, "jpg", f"image_{i:05d}.jpg") for i in ids]
        present = set(os.listdir(os.path.join(self.root, "jpg")))  # one look, also over NFS
        for path in paths:
            if os.path.basename(path) not in present:
                os.stat(path)  # raises FileNotFoundError
        return paths, [labels[i - 1] - 1 for i in ids]

    def _read(self, name: str, variable: str, highest: int) -> List[int]:
        path = os.path.join(self.root, name)
        with open(path, "rb") as file:
            try:
                numbers = scipy.io.loadmat(file)[variable].ravel().astype(int).tolist()
            except Exception as error:  # SciPy raises all sorts on a damaged file
                text = " ".join(repr(error).split())
                raise ValueError(f"{path}: cannot read {variable!r}: {text}") from error
        wrong = [number for number in numbers if not 1 <= number <= highest]
        if wrong or not numbers:
            raise ValueError(f"{path}: {variable!r} must be numbers from 1 to {highest}, found "
                             f"{wrong[0] if wrong else 'none'}")
        return numbers

    def _download(self) -> None:
        for name in ("imagelabels.mat", "setid.mat"):
            path = os.path.join(self.root, name)
            if not os.path.exists(path):
                # Other processes may look for it meanwhile: it gets its name when it is whole.
                download_url(self.url + name, self.root, name + ".part", self.md5[name])
                os.replace(path + ".part", path)
        try:
            self._find_images()
        except FileNotFoundError:
            name = "102flowers.tgz"
            download_and_extract_archive(self.url + name, self.root, md5=self.md5[name])


def read_image(path: str) -> Any:
    """The image as RGB PIL image; raises OSError with its path where it cannot be decoded."""
    try:
        return pil_loader(path)
    except Exception as error:  # Pillow's decoders raise all sorts
        raise OSError(f"{path} is not readable as an image: {error!r}") from error
