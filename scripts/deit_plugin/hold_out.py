"""--hold-out: evaluates on a part of the train images, so that test images choose nothing."""
import copy
from typing import Any, Callable, List, Tuple

import numpy

from .errors import UserError


def split(dataset: Any, share: float, transform: Callable) -> Tuple[Any, Any]:
    """Divide train images into those to train on and ``share`` of each class to evaluate on.

    Both parts are copies of the data set with fewer images, and have at least one image of each
    class. The division depends only on the labels and the share. ``transform`` is for evaluation.
    Raises UserError if a class has a single image, or for a data set that cannot be divided.
    """
    if not hasattr(dataset, "samples") and not hasattr(dataset, "data"):
        raise UserError(f"--hold-out {share}: cannot divide a data set that has neither samples "
                        "nor data; leave --hold-out out")
    random, kept, held_out = numpy.random.RandomState(0), [], []
    targets = numpy.asarray(dataset.targets)  # once, since a list takes long to compare
    for label, name in enumerate(dataset.classes):
        indices = random.permutation(numpy.flatnonzero(targets == label))
        if len(indices) == 1:
            raise UserError(f"--hold-out {share}: class {name} has only one train image; add "
                            "another one or remove the class")
        number = max(1, round(share * len(indices)))
        number = min(number, len(indices) - 1) if len(indices) else 0
        held_out += indices[:number].tolist()
        kept += indices[number:].tolist()
    return (_part(dataset, sorted(kept), dataset.transform),
            _part(dataset, sorted(held_out), transform))


def _part(dataset: Any, indices: List[int], transform: Callable) -> Any:
    part = copy.copy(dataset)
    part.transform, part.indices = transform, indices
    for name in ("samples", "targets"):
        if hasattr(dataset, name):
            setattr(part, name, [getattr(dataset, name)[index] for index in indices])
    if hasattr(dataset, "data"):  # CIFAR's pixels
        part.data = dataset.data[indices]
    return part
