"""Meters and processes."""
import builtins
import os
from collections import defaultdict

import torch
import torch.distributed as dist


class SmoothedValue:
    """The mean of a series."""

    count, total = 0, 0.0

    def synchronize_between_processes(self):
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device="cuda")
        dist.all_reduce(sums)
        self.count, self.total = int(sums[0].item()), sums[1].item()


class MetricLogger:
    """Meters by name, and a loop that prints them as it goes."""

    def __init__(self):
        self.meters = defaultdict(SmoothedValue)

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].count += 1
            self.meters[name].total += float(value)

    def averages(self):
        return {name: meter.total / meter.count for name, meter in self.meters.items()}

    def log_every(self, iterable, print_freq, header):
        for step, item in enumerate(iterable):
            yield item
            if step % print_freq == 0 or step + 1 == len(iterable):
                print(header, f"[{step}/{len(iterable)}]", self.averages())


def init_distributed_mode(args):
    args.rank, args.world_size, args.gpu = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch.cuda.set_device(args.gpu)
    dist.init_process_group(backend="nccl", init_method=args.dist_url,
                            world_size=args.world_size, rank=args.rank)
    dist.barrier()
    if args.rank > 0:
        builtins.print = lambda *values, **options: None
