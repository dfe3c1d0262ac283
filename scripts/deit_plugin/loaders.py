"""DeiT's data loaders, with workers that last and each test image in one process only."""
import time

import torch
from torch.utils.data import BatchSampler, DataLoader

from .errors import UserError, die_with_parent

# Seconds. After a collective, a thread of gloo takes and frees Python's locks; a data worker forked
# at that moment inherits one that nobody frees (Python before 3.12; seen once in 1000 launches).
SETTLING = 0.05


def persistent(loader, batches, generator=None):
    """A loader like DeiT's, of the given batches of indices, to be kept until the run ends.

    Its workers live as long as it is referred to, and a worker's random state goes on from one
    epoch to the next; DeiT's own start their workers anew for every epoch.
    """
    time.sleep(SETTLING)
    return DataLoader(
        loader.dataset, batch_sampler=batches, num_workers=loader.num_workers, generator=generator,
        pin_memory=loader.pin_memory, collate_fn=loader.collate_fn,
        persistent_workers=loader.num_workers > 0, worker_init_fn=die_with_parent)


def evaluation(loader, args):
    """The share of one process: every image is in exactly one share, none twice.

    Its workers are seeded apart from training, which is thus the same for any --eval-freq.
    """
    share = range(args.rank, len(loader.dataset), args.world_size)
    return persistent(loader, BatchSampler(share, loader.batch_size, False), torch.Generator())


def steps_per_epoch(images, args):
    """Optimizer steps of an epoch, without partial batches, as in DeiT; UserError if none."""
    ranks = args.world_size * args.accum_iter
    share, whole, advice = -(-images // ranks), images, ""
    if args.repeated_aug:  # samplers.py of DeiT: RASampler
        share, whole = images // 256 * 256 // ranks, f"{images} // 256 * 256"
        advice = ", or pass --no-repeated-aug"
    if share < args.batch_size:
        raise UserError(f"no whole step in an epoch: {whole} train images / {ranks} (processes x "
                        f"--accum-iter) = {share}, fewer than --batch-size {args.batch_size}: "
                        f"lower one of the three{advice}")
    return share // args.batch_size
