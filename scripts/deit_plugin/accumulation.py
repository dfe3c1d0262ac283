"""--accum-iter N: one optimizer step for N batches of each process, as if by N times as many.

All of it acts on the arguments of DeiT's ``train_one_epoch``; with N = 1 it changes nothing.
"""
import itertools

from torch.utils.data import BatchSampler, DistributedSampler


def batches(loader, args, epoch):
    """Of indices, for an epoch: what N ranks of DeiT's sampler would give to each step."""
    has_ranks = hasattr(loader.sampler, "num_replicas")  # DeiT HEAD's plain one has not
    kind = type(loader.sampler) if has_ranks else DistributedSampler
    ranks = []
    for turn in range(args.accum_iter):
        sampler = kind(loader.dataset, num_replicas=args.world_size * args.accum_iter,
                       rank=args.rank * args.accum_iter + turn, shuffle=True)
        sampler.set_epoch(epoch)
        ranks.append(BatchSampler(sampler, loader.batch_size, True))
    return itertools.chain.from_iterable(zip(*ranks))


class Accumulation:
    """Stands in, for an epoch, for data loader, optimizer, loss scaler and weight average."""

    def __init__(self, loader, model, optimizer, scaler, model_ema, accum_iter):
        self.loader, self.model, self.accum_iter = loader, model, accum_iter
        self.optimizer, self.scaler, self.model_ema = optimizer, scaler, model_ema
        self.param_groups = optimizer.param_groups
        self.is_second_order = getattr(optimizer, "is_second_order", False)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for index, batch in enumerate(self.loader):
            self.is_last = (index + 1) % self.accum_iter == 0
            # What DistributedDataParallel.no_sync() sets, too; other models ignore it.
            self.model.require_backward_grad_sync = self.is_last
            yield batch

    def zero_grad(self):
        """Of the optimizer: done after each step, not before each batch."""

    def __call__(self, loss, optimizer, create_graph=False, **options):
        """Of timm's NativeScaler: it steps after the last batch only."""
        loss = loss / self.accum_iter
        if self.is_last:
            self.scaler(loss, self.optimizer, create_graph=create_graph, **options)
            self.optimizer.zero_grad()
        else:  # timm before 0.9 cannot do the first half alone
            self.scaler._scaler.scale(loss).backward(create_graph=create_graph)

    def update(self, model):
        """Of the weight average, which follows after a step only."""
        if self.is_last:
            self.model_ema.update(model)
