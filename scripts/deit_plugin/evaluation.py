"""Accuracy and loss over the test images of all processes, each counted once; predictions."""
import contextlib
import csv
import io
from argparse import Namespace
from typing import Any, Dict, Iterable, List, NamedTuple, Tuple

import torch
import torch.distributed
from torch.nn.functional import cross_entropy

import convert_to_deit

from .data import Data, names_of
from .errors import UserError

# Of a table of predictions: the image, its class, the class that the model takes it for, and the
# probabilities of the latter and of the former.
COLUMNS = ["image", "label", "predicted", "probability", "label_probability"]


class Evaluation(NamedTuple):
    """The results over all processes, except for ``predictions``, which cover this process only."""

    stats: Dict[str, float]  # loss, and in percent acc1, acc5, acc_per_class
    correct: List[int]  # images per class that were classified correctly
    images: List[int]  # images per class
    predictions: torch.Tensor  # of this process's images, (n, 3), float64: the class with the
    # highest probability, that probability, and that of the image's own class


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
             device: Any, classes: int) -> Evaluation:
    """Evaluate the images of all processes.

    batches: pairs of images (B, 3, H, W) and labels (B,), the share of this process; classes: their
    number. acc_per_class is the mean of the accuracies of all classes that have images. Counts are
    whole numbers and the loss is summed in float64, so the number of processes only changes how
    images are batched, which a GPU's rounding may depend on.
    """
    # Without the DDP wrapper, since ranks can have unequal numbers of batches.
    model = getattr(model, "module", model)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # top-5 hits, loss
    per_class = torch.zeros(2, classes, dtype=torch.float64, device=device)  # top-1 hits, images
    predictions = []
    for batch in batches:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        logits = forward(model, images)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top.eq(labels[:, None])
        sums[0] += hits.sum()
        sums[1] += cross_entropy(logits, labels, reduction="none").double().sum()
        per_class[0] += torch.bincount(labels[hits[:, 0]], minlength=classes)
        per_class[1] += torch.bincount(labels, minlength=classes)
        best = top[:, :1]
        probabilities = logits.softmax(dim=1).gather(1, torch.cat([best, labels[:, None]], dim=1))
        predictions.append(torch.cat([best.double(), probabilities.double()], dim=1))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(per_class)
    correct, images = per_class
    present, total = images > 0, images.sum()
    stats = {"loss": sums[1] / total, "acc1": 100 * correct.sum() / total,
             "acc5": 100 * sums[0] / total,
             "acc_per_class": 100 * (correct[present] / images[present]).mean()}
    return Evaluation({name: value.item() for name, value in stats.items()},
                      correct.long().tolist(), images.long().tolist(),
                      torch.cat([per_class.new_zeros(0, 3), *predictions]))


def forward(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits (B, classes), float32; in mixed precision on a GPU, as DeiT evaluates."""
    with torch.no_grad(), torch.cuda.amp.autocast():  # which has no effect without a GPU
        return model(images).float()


def worst_classes(found: Evaluation, classes: List[str]) -> str:
    """The five classes with the lowest accuracy, of those below 100 %, in words."""
    rows = sorted((100 * correct / images, name, images) for correct, images, name
                  in zip(found.correct, found.images, classes) if correct < images)
    return ", ".join(f"{name}: {accuracy:.2f} % of {images}"
                     for accuracy, name, images in rows[:5]) or "none is below 100 %"


def gather(predictions: torch.Tensor, images: int, world_size: int) -> List[List[float]]:
    """The predictions of all ranks, a row for each image, in the order of the data set.

    Rank r has evaluated the images r, r + world_size, r + 2 * world_size and so on: the shares of
    ``loaders.evaluation``.
    """
    length = -(-images // world_size)
    own = predictions.new_zeros(length, predictions.shape[1])
    own[:len(predictions)] = predictions
    everyone = [torch.zeros_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(everyone, own)
    return torch.stack(everyone, dim=1).flatten(0, 1)[:images].tolist()


def check_predictions(path: str, checkpoint: str) -> None:
    """Raise UserError if ``path`` cannot become a CSV file, or is a file of another kind."""
    try:
        convert_to_deit.check_output(path, "--resume", checkpoint)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            # Earlier versions wrote fewer columns.
            start = file.read(len(",".join(COLUMNS[:4])))
            if start and start != ",".join(COLUMNS[:4]).encode():
                raise OSError("it is not what --predictions writes; pass another path, or delete "
                              "that file")
    except OSError as error:
        raise UserError(f"--predictions {path}: {error.strerror or error}") from error


def write_predictions(path: str, predictions: List[List[float]], data: Data, args: Namespace
                      ) -> None:
    """Write a CSV file with a row for each test image, complete or not at all.

    predictions: what ``gather`` returns.
    """
    with convert_to_deit.atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(COLUMNS)
        for name, label, (predicted, *probabilities) in zip(
                names_of(data.test, args.data_path), data.test.targets, predictions):
            rows.writerow([name, data.classes[label], data.classes[int(predicted)],
                           *(f"{probability:.6f}" for probability in probabilities)])
        text.flush()
        text.detach()  # atomic_write still needs the file
