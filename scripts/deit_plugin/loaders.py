"""DeiT's data loaders, with workers that persist and each test image in one process only.

From the second epoch on, all random numbers of training come from --seed, the rank and the epoch,
so that a resumed run draws what one that never stopped draws. The first epoch keeps DeiT's own
order of draws, so that its losses are those of the published procedure.
"""
import itertools
import random
import time
from argparse import Namespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .errors import begin_data_worker

# Seconds. After a collective, a thread of gloo takes and frees Python's GIL; a data worker that is
# forked at that moment inherits a GIL that nobody frees (Python before 3.12; seen once in 1000
# launches, and once more after a pause of 0.05 s, beside other launches on 2 cores).
SETTLING = 0.2


def seed_process(args: Namespace, epoch: int) -> None:
    """Seed mixup, drop path and whatever else draws random numbers in this process."""
    seed = _seed_cpu(args.seed, args.rank, epoch)
    if args.device == "cuda":
        torch.cuda.manual_seed(seed)


def _seed_cpu(*key: int) -> int:
    """Seed torch, NumPy and ``random`` with a number made of ``key``; return it."""
    seed = int(numpy.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class Drawn(NamedTuple):
    """An index, with the key that seeds the augmentation of its image."""

    index: int
    key: Tuple[int, ...]


class Augmented(Dataset):
    """Train images. Indexing with a ``Drawn`` first seeds with its key."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Union[int, Drawn]) -> Tuple[torch.Tensor, int]:
        if isinstance(item, Drawn):
            _seed_cpu(*item.key)
            item = item.index
        return self.dataset[item]


class Batches:
    """The batches of indices of one epoch: for each step, those of the ranks it stands for.

    loader: DeiT's, whose sampler and batch size are used. With --accum-iter N, this process takes
    the batches that N of DeiT's ranks would take.
    """

    def __init__(self, loader: DataLoader, args: Namespace) -> None:
        self.batch_size, self.seed, accum_iter = loader.batch_size, args.seed, args.accum_iter
        sampler, replicas = type(loader.sampler), args.world_size * accum_iter
        self.ranks = range(args.rank * accum_iter, (args.rank + 1) * accum_iter)
        self.samplers = [sampler(loader.dataset, replicas, rank, shuffle=True)
                         for rank in self.ranks]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch."""
        self.epoch = epoch
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(len(sampler) // self.batch_size for sampler in self.samplers)

    def __iter__(self) -> Iterator[List[int]]:
        batches = (BatchSampler(self._draw(rank, sampler), self.batch_size, True)
                   for rank, sampler in zip(self.ranks, self.samplers))
        return itertools.chain.from_iterable(zip(*batches))

    def _draw(self, rank: int, sampler: Any) -> Iterator[Union[int, Drawn]]:
        # From 1, since SeedSequence takes seed_process's shorter key for one that ends in 0.
        for position, index in enumerate(sampler, start=1):
            key = (self.seed, rank, self.epoch, position)
            yield Drawn(index, key) if self.epoch else index


def training(loader: DataLoader, batches: Batches) -> DataLoader:
    """A loader of train images like DeiT's, for the given batches of indices."""
    return _persistent(loader, Augmented(loader.dataset), batches)


def in_workers(number: int) -> Dict[str, Any]:
    """The arguments of a DataLoader for that many data workers; all loaders here take them.

    Since Python 3.14, multiprocessing would start a worker as a new interpreter by default. There,
    ``import datasets`` finds DeiT's, and not all that a loader holds can be pickled.
    """
    return {"num_workers": number, "worker_init_fn": begin_data_worker,
            "multiprocessing_context": "fork" if number else None}


def _persistent(loader: DataLoader, dataset: Any, batches: Any,
                generator: Optional[torch.Generator] = None) -> DataLoader:
    """A loader whose workers live until it is deleted.

    DeiT's own loaders restart their workers in every epoch.
    """
    time.sleep(SETTLING)
    return DataLoader(
        dataset, batch_sampler=batches, generator=generator, pin_memory=loader.pin_memory,
        collate_fn=loader.collate_fn, persistent_workers=loader.num_workers > 0,
        **in_workers(loader.num_workers))


def evaluation(loader: DataLoader, args: Namespace) -> DataLoader:
    """This process's share of the test images: every image is in exactly one share.

    ``evaluation.gather`` puts the shares together again, so it must know how they are made.

    Uses its own generator, so that --eval-freq does not change training.
    """
    share = range(args.rank, len(loader.dataset), args.world_size)
    return _persistent(loader, loader.dataset, BatchSampler(share, loader.batch_size, False),
                       torch.Generator())
