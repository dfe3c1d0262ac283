"""Top-1 and top-5 accuracy and loss over the test images of all processes, each counted once."""
from typing import Any, Dict, Iterable, Tuple

import torch
import torch.distributed
from torch.nn.functional import cross_entropy


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
             device: Any) -> Dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, over the images of all processes.

    batches: pairs of images (B, 3, H, W) and labels (B,), the share of this process. Counts are
    whole numbers and the loss is summed in float64, so the number of processes only changes how
    images are batched, which a GPU's rounding may depend on.
    """
    model = getattr(model, "module", model)  # processes have unequal numbers of batches
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for batch in batches:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        with torch.cuda.amp.autocast():  # as in DeiT's own evaluation; no effect without a GPU
            logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(labels[:, None])
        sums[0] += len(labels)
        sums[1] += hits[:, 0].sum()
        sums[2] += hits.sum()
        sums[3] += cross_entropy(logits, labels, reduction="none").double().sum()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    images, top1, top5, loss = sums.tolist()
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}
