"""Meters, processes and checkpoint files."""
import builtins
import os
from collections import defaultdict

import torch
import torch.distributed as dist


class SmoothedValue:
    """The mean of a series."""

    count, total = 0, 0.0

    def synchronize_between_processes(self):
        if dist.is_initialized():
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


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def save_on_master(*args, **kwargs):
    if get_rank() == 0:
        torch.save(*args, **kwargs)


def setup_for_distributed(is_master):
    """Only one process prints, unless another insists with force=True."""
    loud = builtins.print

    def print_here(*args, force=False, **kwargs):
        if force or is_master:
            loud(*args, **kwargs)

    builtins.print = print_here


def init_distributed_mode(args):
    args.distributed = {"RANK", "WORLD_SIZE"} <= set(os.environ)
    if not args.distributed:
        print("Not using distributed mode")
        return
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args.gpu = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(args.gpu)
    dist.init_process_group(backend="nccl", init_method=args.dist_url,
                            world_size=args.world_size, rank=args.rank)
    dist.barrier()
    setup_for_distributed(args.rank == 0)
