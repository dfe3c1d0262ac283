"""DeiT's data loaders, with workers that last and each test image in one process only."""
import time

import torch
from torch.utils.data import DataLoader

from .errors import UserError, die_with_parent
from .options import count

# Seconds. After a collective, a thread of gloo takes and frees Python's locks; a data worker forked
# at that moment inherits one that nobody frees (Python before 3.12; seen once in 1000 launches).
SETTLING = 0.05


class PersistentLoaders:
    """One loader for each of DeiT's, kept with its workers until the run ends.

    DeiT's own start their workers anew for every epoch. Order and augmentation stay as they are:
    the sampler is DeiT's, and a worker's random state goes on from one epoch to the next.
    """

    def __init__(self):
        self._loaders = {}

    def training(self, loader, sampler):
        """DeiT's training loader, with images in the order of ``sampler``."""
        return self._persistent("training", loader, sampler=sampler, drop_last=loader.drop_last)

    def evaluation(self, loader, rank, processes):
        """The share of one process: every image is in exactly one share, none twice.

        Its workers are seeded apart from training, which is thus the same for any --eval-freq.
        """
        share = range(rank, len(loader.dataset), processes)
        return self._persistent("evaluation", loader, sampler=share, generator=torch.Generator())

    def _persistent(self, purpose, loader, **options):
        if purpose not in self._loaders:
            time.sleep(SETTLING)
            self._loaders[purpose] = DataLoader(
                loader.dataset, batch_size=loader.batch_size, num_workers=loader.num_workers,
                pin_memory=loader.pin_memory, collate_fn=loader.collate_fn,
                persistent_workers=loader.num_workers > 0, worker_init_fn=die_with_parent,
                **options)
        return self._loaders[purpose]

    def close(self):
        """End the workers, which live as long as their loader is referred to."""
        self._loaders.clear()


def steps_per_epoch(images, args, processes):
    """Optimizer steps of an epoch. Partial batches are left out, as DeiT does.

    Raises UserError if there is none.
    """
    ranks, whole = processes * args.accum_iter, str(images)
    share = -(-images // ranks)
    if args.repeated_aug:  # samplers.py of DeiT: RASampler
        share, whole = images // 256 * 256 // ranks, f"{images} // 256 * 256"
    if share >= args.batch_size:
        return share // args.batch_size
    by = count(processes, "process") + f" x {args.accum_iter} accumulated" * (args.accum_iter > 1)
    hint = "pass --no-repeated-aug, or " if args.repeated_aug and images >= args.batch_size else ""
    raise UserError(f"no whole step in an epoch: {whole} train images / {by} = {share}, fewer than "
                    f"--batch-size {args.batch_size}; {hint}use a smaller --batch-size or fewer "
                    "processes")
