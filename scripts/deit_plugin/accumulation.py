"""--accum-iter N: one optimizer step for N batches of each process, as if by N times as many.

All of it acts on the arguments of DeiT's ``train_one_epoch``; with N = 1 it changes nothing.
"""
import itertools
from types import SimpleNamespace

from torch.utils.data import BatchSampler, DistributedSampler


class RanksInTurn:
    """Batches of indices: what N ranks of DeiT's sampler would give to one step, for every step."""

    def __init__(self, loader, rank, processes, accum_iter):
        has_ranks = hasattr(loader.sampler, "num_replicas")  # DeiT HEAD's plain one has not
        kind = type(loader.sampler) if has_ranks else DistributedSampler
        self.samplers = [kind(loader.dataset, num_replicas=processes * accum_iter,
                              rank=rank * accum_iter + turn, shuffle=True)
                         for turn in range(accum_iter)]
        self.ranks = [BatchSampler(sampler, loader.batch_size, drop_last=True)
                      for sampler in self.samplers]

    def set_epoch(self, epoch):
        """As DeiT calls it before each epoch."""
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __iter__(self):
        return itertools.chain.from_iterable(zip(*self.ranks))

    def __len__(self):
        return sum(map(len, self.ranks))


class Accumulation:
    """The data loader of an epoch, and stand-ins for what moves only once a step."""

    def __init__(self, loader, model, accum_iter):
        self.loader, self.model, self.accum_iter = loader, model, accum_iter
        self.is_first = self.is_last = True  # the batch, of its step

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for index, batch in enumerate(self.loader):
            self.is_first = index % self.accum_iter == 0
            self.is_last = (index + 1) % self.accum_iter == 0
            # What DistributedDataParallel.no_sync() sets, too; other models ignore it.
            self.model.require_backward_grad_sync = self.is_last
            yield batch

    def optimizer(self, optimizer):
        """What DeiT uses of its optimizer; gradients are zeroed before a step only."""
        return SimpleNamespace(zero_grad=lambda: self.is_first and optimizer.zero_grad(),
                               param_groups=optimizer.param_groups, steps=optimizer,
                               is_second_order=getattr(optimizer, "is_second_order", False))

    def loss_scaler(self, scaler):
        """timm's NativeScaler, which steps after the last batch only."""
        def scale(loss, optimizer, create_graph=False, **options):
            loss = loss / self.accum_iter
            if self.is_last:
                scaler(loss, optimizer.steps, create_graph=create_graph, **options)
            else:  # timm before 0.9 cannot do the first half alone
                scaler._scaler.scale(loss).backward(create_graph=create_graph)
        return scale

    def model_ema(self, model_ema):
        """The weight average, which follows after a step only."""
        return model_ema and SimpleNamespace(
            update=lambda model: self.is_last and model_ema.update(model))
