"""Oxford Flowers-102."""

import os
from typing import Callable, List, Optional, Tuple

import scipy.io
from torchvision.datasets.folder import DatasetFolder, pil_loader
from torchvision.datasets.utils import download_and_extract_archive, download_url
from torchvision.datasets.vision import VisionDataset


class Flowers(DatasetFolder):
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
    that cannot be read or has a number out of range; an item, what Pillow raises for a broken one.
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
        self.train, self.loader = train, pil_loader
        for _ in self.md5 if download else ():  # at most each file
            try:
                self._find_images()
            except FileNotFoundError as error:
                name = os.path.basename(error.filename)
                if name in self.md5:  # it gets this name, for other processes, when it is whole
                    download_url(self.url + name, self.root, name + ".part", self.md5[name])
                    os.replace(error.filename + ".part", error.filename)
                else:
                    name = "102flowers.tgz"
                    download_and_extract_archive(self.url + name, self.root, md5=self.md5[name])
        self.samples = self._find_images()
        self.targets = [label for _, label in self.samples]

    def _find_images(self) -> List[Tuple[str, int]]:
        """Path and label of each image, which must be there."""
        labels = self._read("imagelabels.mat", "labels", highest=len(self.classes))
        splits = ("trnid", "valid") if self.train else ("tstid",)
        indices = [i for name in splits for i in self._read("setid.mat", name, len(labels))]
        folder = os.path.join(self.root, "jpg")
        samples = [(os.path.join(folder, f"image_{i + 1:05d}.jpg"), labels[i]) for i in indices]
        present = {os.path.join(folder, name) for name in os.listdir(folder)}
        for path in sorted(dict(samples).keys() - present):  # one look, also over NFS
            os.stat(path)  # raises FileNotFoundError
        return samples

    def _read(self, name: str, variable: str, highest: int) -> List[int]:
        """The numbers of a variable, from 1 to `highest` in the file, from 0 here."""
        path = os.path.join(self.root, name)
        with open(path, "rb") as file:
            try:
                numbers = scipy.io.loadmat(file)[variable].ravel().astype(int).tolist()
                if not numbers:
                    raise ValueError("it is empty")
                return [range(1, highest + 1).index(number) for number in numbers]
            except Exception as error:  # SciPy raises all sorts on a damaged file
                raise ValueError(f"{path}: cannot read {variable!r}, numbers from 1 to {highest}: "
                                 f"{error!r}") from error
