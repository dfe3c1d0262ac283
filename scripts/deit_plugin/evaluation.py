"""Top-1 and top-5 accuracy and loss over the test images of all processes, each counted once."""
import torch
import torch.distributed


def is_distributed():
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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
        with torch.cuda.amp.autocast():  # as DeiT's own evaluation; without a GPU it does nothing
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


class NotEvaluated(dict):
    """What DeiT gets as the statistics of an epoch without evaluation.

    It can be asked for ``acc1``, which beats no best, and adds nothing to ``log.txt``.
    """

    def __init__(self):
        super().__init__(acc1=float("-inf"))

    def items(self):
        """No item at all: DeiT copies these into ``log.txt``."""
        return ()
