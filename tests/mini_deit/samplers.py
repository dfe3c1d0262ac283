"""Repeated augmentation: three augmented versions of an image go to different ranks."""
import torch
from torch.utils.data import Sampler

REPEATS, WHOLE = 3, 256  # DeiT counts an epoch in whole groups of 256 images


class RASampler(Sampler):
    """Of the shuffled images, each three times in a row, every ``num_replicas``-th."""

    def __init__(self, dataset, num_replicas=None, rank=None, shuffle=True):
        self.images, self.num_replicas, self.rank = len(dataset), num_replicas, rank

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.images // WHOLE * WHOLE // self.num_replicas

    def __iter__(self):
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.epoch))
        repeated = order.repeat_interleave(REPEATS).tolist()
        return iter(repeated[self.rank::self.num_replicas][:len(self)])
