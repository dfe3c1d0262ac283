"""DeiT's data loaders, with workers that persist and each test image in one process only."""
import itertools
import time
from argparse import Namespace
from typing import Any, Iterator, List, Optional

import torch
from torch.utils.data import BatchSampler, DataLoader

from .errors import UserError, die_with_parent

# Seconds. After a collective, a thread of gloo takes and frees Python's GIL; a data worker that is
# forked at that moment inherits a GIL that nobody frees (Python before 3.12; seen once in 1000
# launches).
SETTLING = 0.05


class Batches:
    """The batches of indices of one epoch: for each step, those of the ranks it stands for.

    loader: DeiT's, whose sampler and batch size are used; accum_iter: with N, this process takes
    the batches that N of DeiT's ranks would take.
    """

    def __init__(self, loader: DataLoader, args: Namespace, accum_iter: int) -> None:
        self.batch_size = loader.batch_size
        sampler, replicas = type(loader.sampler), args.world_size * accum_iter
        self.samplers = [sampler(loader.dataset, replicas, rank, shuffle=True) for rank in
                         range(args.rank * accum_iter, (args.rank + 1) * accum_iter)]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch."""
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(len(sampler) // self.batch_size for sampler in self.samplers)

    def __iter__(self) -> Iterator[List[int]]:
        batches = (BatchSampler(sampler, self.batch_size, True) for sampler in self.samplers)
        return itertools.chain.from_iterable(zip(*batches))


def persistent(loader: DataLoader, batches: Any, generator: Optional[torch.Generator] = None
               ) -> DataLoader:
    """A loader like DeiT's for the given batches of indices. Keep it until the run ends.

    Its workers live as long as it is referenced, and a worker's random state continues from one
    epoch to the next; DeiT's own loaders restart their workers in every epoch.
    """
    time.sleep(SETTLING)
    return DataLoader(
        loader.dataset, batch_sampler=batches, num_workers=loader.num_workers, generator=generator,
        pin_memory=loader.pin_memory, collate_fn=loader.collate_fn,
        persistent_workers=loader.num_workers > 0, worker_init_fn=die_with_parent)


def evaluation(loader: DataLoader, args: Namespace) -> DataLoader:
    """This process's share of the test images: every image is in exactly one share.

    Uses its own generator, so that --eval-freq does not change training.
    """
    share = range(args.rank, len(loader.dataset), args.world_size)
    return persistent(loader, BatchSampler(share, loader.batch_size, False), torch.Generator())


def steps_per_epoch(images: int, args: Namespace, accum_iter: int) -> int:
    """Optimizer steps of an epoch, without partial batches, as in DeiT; UserError if none."""
    ranks = args.world_size * accum_iter
    share, whole, advice = -(-images // ranks), images, ""
    if args.repeated_aug:  # RASampler in DeiT's samplers.py
        share, whole = images // 256 * 256 // ranks, f"{images} // 256 * 256"
        advice = ", or pass --no-repeated-aug"
    if share < args.batch_size:
        raise UserError(f"no whole step in an epoch: {whole} train images / {ranks} (processes x "
                        f"--accum-iter) = {share}, fewer than --batch-size {args.batch_size}: "
                        f"lower one of the three{advice}")
    return share // args.batch_size
