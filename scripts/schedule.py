"""When to evaluate, how evaluation is shared out, and loaders that keep their workers."""
import contextlib
import time

import torch
import torch.distributed
from torch.utils.data import DataLoader

import failures

# Seconds. After a collective, a thread of gloo takes and frees Python's locks; a data worker forked
# at that moment inherits one that nobody frees (Python before 3.12; seen once in 1000 launches).
SETTLING = 0.05


def is_distributed():
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_due(epoch, every, epochs):
    """Whether what is done every ``every`` epochs, and after the last, is due after ``epoch``.

    ``epoch`` counts from 0.
    """
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


class NotEvaluated(dict):
    """What DeiT gets as the statistics of an epoch without evaluation.

    It can be asked for ``acc1``, which beats no best, and adds nothing to ``log.txt``.
    """

    def __init__(self):
        super().__init__(acc1=float("-inf"))

    def items(self):
        """No item at all: DeiT copies these into ``log.txt``."""
        return ()


class LastingLoaders:
    """One loader for each of DeiT's, kept with its workers until the run ends.

    DeiT's own start their workers anew for every epoch. Order and augmentation stay as they are:
    the sampler is DeiT's, and a worker's random state goes on from one epoch to the next.
    """

    def __init__(self):
        self._loaders = {}

    def training(self, loader):
        """DeiT's training loader with workers that last."""
        return self._lasting("training", loader, sampler=loader.sampler,
                             drop_last=loader.drop_last)

    def evaluation(self, loader, rank, processes):
        """The share of one process: every image is in exactly one share, none twice.

        Its workers are seeded apart from training, which is thus the same for any --eval-freq.
        """
        share = range(rank, len(loader.dataset), processes)
        return self._lasting("evaluation", loader, sampler=share, generator=torch.Generator())

    def _lasting(self, purpose, loader, **options):
        if purpose not in self._loaders:
            time.sleep(SETTLING)
            self._loaders[purpose] = DataLoader(
                loader.dataset, batch_size=loader.batch_size, num_workers=loader.num_workers,
                pin_memory=loader.pin_memory, collate_fn=loader.collate_fn,
                persistent_workers=loader.num_workers > 0,
                worker_init_fn=failures.die_with_parent, **options)
        return self._loaders[purpose]

    def close(self):
        """End the workers, which live as long as their loader is referred to."""
        self._loaders.clear()


@torch.no_grad()
def evaluate(model, batches, device):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, over the images of all processes.

    batches: pairs of images (B, 3, H, W) and labels (B,), the share of this process. Counts are
    whole numbers and the loss is summed in float64, so that the accuracy is the same, to the last
    digit, for any number of processes.
    """
    model = getattr(model, "module", model)  # processes have unequal numbers of batches
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with _autocast(device):
            logits = model(images)
        sums += _sums(logits.float(), labels)
    if is_distributed():
        torch.distributed.all_reduce(sums)
    images, top1, top5, loss = sums.tolist()
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}


def _sums(logits, labels):
    """(4,) float64: images, top-1 and top-5 hits, summed cross-entropy of one batch."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses.eq(labels[:, None])
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
    return torch.stack([hits.new_tensor(len(labels), dtype=torch.float64),
                        hits[:, 0].sum().double(), hits.sum().double(), loss])


def _autocast(device):
    """Mixed precision as in DeiT's own evaluation, which is for GPUs."""
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    if hasattr(torch, "autocast"):  # torch 1.10 on
        return torch.autocast("cuda")
    return torch.cuda.amp.autocast()
