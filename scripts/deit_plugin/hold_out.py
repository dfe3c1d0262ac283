"""--hold-out: evaluate on a part of the train images, so that test images choose nothing."""
import copy
from typing import Any, Callable, List, Tuple

import numpy
from torch.utils.data import Subset

from .errors import UserError


class Part(Subset):
    """Some images of a data set, with the attributes of torchvision's that a run reads."""

    def __init__(self, dataset: Any, indices: List[int]) -> None:
        super().__init__(dataset, indices)
        self.classes = dataset.classes
        self.targets = [dataset.targets[index] for index in indices]

    @property
    def samples(self) -> List[Tuple[str, int]]:
        """Paths and labels; as the data set, CIFAR's parts have none."""
        return [self.dataset.samples[index] for index in self.indices]

    @property
    def transform(self) -> Callable:
        """The data set's; DeiT HEAD sets it under --ThreeAugment."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable) -> None:
        self.dataset.transform = transform


def split(dataset: Any, share: float, transform: Callable) -> Tuple[Part, Part]:
    """Divide train images into those to train on and ``share`` of each class to evaluate on.

    Both parts have at least one image of each class. The division depends only on the labels and
    the share. ``transform`` is for evaluation. Raises UserError if a class has a single image.
    """
    random, kept, held_out = numpy.random.RandomState(0), [], []
    for label, name in enumerate(dataset.classes):
        indices = numpy.flatnonzero(numpy.equal(dataset.targets, label))
        if len(indices) == 1:
            raise UserError(f"--hold-out {share}: class {name} has only one train image; add "
                            "another one or remove the class")
        number = min(max(1, round(share * len(indices))), len(indices) - 1)
        shuffled = random.permutation(indices).tolist()
        held_out += shuffled[:max(number, 0)]
        kept += shuffled[max(number, 0):]
    evaluated = copy.copy(dataset)
    evaluated.transform = transform
    return Part(dataset, sorted(kept)), Part(evaluated, sorted(held_out))
