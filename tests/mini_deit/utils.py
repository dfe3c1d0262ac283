"""Meters, processes and checkpoint files."""
import builtins
import io
import os
import statistics
import time
from collections import defaultdict, deque
from datetime import timedelta

import torch
import torch.distributed as dist

from era import HEAD


class SmoothedValue:
    """The latest values of a series, and the mean of all of it."""

    def __init__(self, window_size=20, fmt=None):
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.deque = deque(maxlen=window_size)
        self.count = 0
        self.total = 0.0

    def update(self, value, n=1):
        self.deque.append(value)
        self.total += n * value
        self.count += n

    def synchronize_between_processes(self):
        if not is_dist_avail_and_initialized():
            return
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device="cuda")
        dist.barrier()
        dist.all_reduce(sums)
        self.count, self.total = int(sums[0].item()), sums[1].item()

    median = property(lambda self: statistics.median_low(self.deque))
    avg = property(lambda self: statistics.mean(self.deque))
    global_avg = property(lambda self: self.total / self.count)
    max = property(lambda self: max(self.deque))
    value = property(lambda self: self.deque[-1])

    def __str__(self):
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Meters by name, and a loop that prints them as it goes."""

    def __init__(self, delimiter="\t"):
        self.delimiter = delimiter
        self.meters = defaultdict(SmoothedValue)

    def __getattr__(self, name):
        if name == "meters" or name not in self.meters:
            raise AttributeError(name)
        return self.meters[name]

    def __str__(self):
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(float(value))

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header=None):
        header, steps, began = header or "", len(iterable), time.time()
        for step, item in enumerate(iterable):
            yield item
            if step % print_freq == 0 or step + 1 == steps:
                print(self.delimiter.join([header, f"[{step}/{steps}]", str(self)]))
        spent = time.time() - began
        each = spent / steps  # no batch at all is a ZeroDivisionError here, as in DeiT
        print(f"{header} Total time: {timedelta(seconds=int(spent))} ({each:.4f} s / it)")


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def get_world_size():
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank():
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process():
    return get_rank() == 0


def save_on_master(*args, **kwargs):
    if is_main_process():
        torch.save(*args, **kwargs)


def _load_checkpoint_for_ema(model_ema, checkpoint):
    """timm's loader wants a file. Before HEAD the weights lack its key, so it loads nothing."""
    stream = io.BytesIO()
    torch.save({"state_dict_ema": checkpoint} if HEAD else checkpoint, stream)
    stream.seek(0)
    model_ema._load_checkpoint(stream)


def setup_for_distributed(is_master):
    """Only one process prints, unless another insists with force=True."""
    loud = builtins.print

    def print_here(*args, force=False, **kwargs):
        if force or is_master:
            loud(*args, **kwargs)

    builtins.print = print_here


def init_distributed_mode(args):
    env = os.environ
    if {"RANK", "WORLD_SIZE"} <= set(env):
        args.rank, args.world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        args.gpu = int(env["LOCAL_RANK"])
    elif "SLURM_PROCID" in env:
        args.rank = int(env["SLURM_PROCID"])
        args.gpu = args.rank % torch.cuda.device_count()
    else:
        print("Not using distributed mode")
        args.distributed = False
        return
    args.distributed = True
    args.dist_backend = "nccl"
    torch.cuda.set_device(args.gpu)
    torch.distributed.init_process_group(
        backend=args.dist_backend, init_method=args.dist_url,
        world_size=args.world_size, rank=args.rank)
    torch.distributed.barrier()
    setup_for_distributed(args.rank == 0)
