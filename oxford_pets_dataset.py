"""Oxford-IIIT Pets."""

import os
import re

from oxford_flowers_dataset import LabelledImages, Resource

# The real files have about 100 kB.
SPLIT_FILE_LIMIT = 4 * 1024 * 1024
# Image, class, species, breed. A name without a separator stays inside the image folder; a short
# one of printable characters can be shown.
SPLIT_LINE = re.compile(r"([!-.0-\[\]-~]{1,200})\s+(\d{1,2})\s+\d+\s+\d+\s*", re.ASCII)


class Pets(LabelledImages):
    """`Oxford-IIIT Pets <https://www.robots.ox.ac.uk/~vgg/data/pets/>`_.

    Photographs of 37 breeds of cats and dogs: 3680 for training (`trainval.txt`) and 3669 for
    evaluation (`test.txt`). The numbers are those of the two lists. Items are an RGB PIL image,
    or what `transform` makes of it, and a label as Python int, 0 to 36: one less than in the
    lists. Some of the files named .jpg are PNG or GIF images; they are read all the same.

    Raises, when built: FileNotFoundError for a missing file, folder or image; ValueError for a
    malformed list; OSError for a failed download. An image that cannot be read raises OSError
    when it is asked for. Each names the path in one line.

    Args:
        root: folder that holds `images/` and `annotations/`.
        train: the training images, or else the test images.
        transform: applied to the image.
        target_transform: applied to the label.
        download: download from the data set's page what is missing (811 MB in all).
    """

    LAYOUT = "images/Abyssinian_1.jpg and on, annotations/trainval.txt, annotations/test.txt"
    IMAGE_FOLDER = "images"
    BASE_URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
    RESOURCES = (
        Resource("images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "images"),
        Resource("annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "annotations"),
    )
    TRAINING_IMAGES, TEST_IMAGES, CLASSES = 3680, 3669, 37

    def read_split(self):
        """In the order of the list."""
        path = self.path_of("annotations", "trainval.txt" if self.train else "test.txt")
        names, targets = [], []
        for number, line in enumerate(_read_lines(path), start=1):
            match = SPLIT_LINE.fullmatch(line)
            if match is None or not 1 <= int(match.group(2)) <= self.CLASSES:
                raise ValueError(
                    f"{path}, line {number}: expected an image's name, its class (1 to "
                    f"{self.CLASSES}), species and breed, found {line[:80]!r}"
                )
            names.append(f"{match.group(1)}.jpg")
            targets.append(int(match.group(2)) - 1)
        return names, targets


def _read_lines(path):
    if os.path.getsize(path) > SPLIT_FILE_LIMIT:
        raise ValueError(f"{path} is larger than {SPLIT_FILE_LIMIT} bytes: not the official file")
    try:
        with open(path, encoding="ascii") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not plain text: {error.reason}") from error
    if not lines:
        raise ValueError(f"{path} is empty: expected a line for each image")
    return lines
