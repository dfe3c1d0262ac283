"""Meters, processes and checkpoint files."""
import builtins
import os
import statistics
import time
from collections import defaultdict, deque

import torch
import torch.distributed as dist


class SmoothedValue:
    """The latest values of a series, and the mean of all of it."""

    def __init__(self, window_size=20, fmt="{median:.4f} ({global_avg:.4f})"):
        self.fmt = fmt
        self.deque = deque(maxlen=window_size)
        self.count = 0
        self.total = 0.0

    def update(self, value):
        self.deque.append(value)
        self.total += value
        self.count += 1

    def synchronize_between_processes(self):
        if not is_dist_avail_and_initialized():
            return
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device="cuda")
        dist.barrier()
        dist.all_reduce(sums)
        self.count, self.total = int(sums[0].item()), sums[1].item()

    @property
    def global_avg(self):
        return self.total / self.count

    def __str__(self):
        return self.fmt.format(median=statistics.median_low(self.deque),
                               global_avg=self.global_avg, value=self.deque[-1])


class MetricLogger:
    """Meters by name, and a loop that prints them as it goes."""

    def __init__(self, delimiter="\t"):
        self.delimiter = delimiter
        self.meters = defaultdict(SmoothedValue)

    def __str__(self):
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(float(value))

    def averages(self):
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header):
        steps, began = len(iterable), time.time()
        for step, item in enumerate(iterable):
            yield item
            if step % print_freq == 0 or step + 1 == steps:
                print(self.delimiter.join([header, f"[{step}/{steps}]", str(self)]))
        print(f"{header} Total time: {time.time() - began:.1f} s")


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def get_world_size():
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank():
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


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
    args.gpu, args.dist_backend = int(os.environ["LOCAL_RANK"]), "nccl"
    torch.cuda.set_device(args.gpu)
    torch.distributed.init_process_group(
        backend=args.dist_backend, init_method=args.dist_url,
        world_size=args.world_size, rank=args.rank)
    torch.distributed.barrier()
    setup_for_distributed(args.rank == 0)
