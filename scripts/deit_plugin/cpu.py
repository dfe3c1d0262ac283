"""What DeiT, which expects a GPU, needs to run with ``--device cpu``.

Runs on GPUs are not affected.
"""
import os
from typing import Any

import torch
import torch.distributed


def patch(main: Any) -> None:
    """Make DeiT run on the CPU, with one or several processes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mixed precision would use a GPU that is there
    use_gloo()
    sum_meters_on_cpu(main)
    wait_for_no_gpu()
    wrap_without_device_ids()
    keep_mixup_targets_on_cpu()


def use_gloo() -> None:
    """DeiT's ``init_distributed_mode`` knows only nccl, and selects a GPU for each process."""
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **rest: init("gloo", **rest)
    torch.cuda.set_device = lambda device: None


def sum_meters_on_cpu(main: Any) -> None:
    """DeiT's ``SmoothedValue`` sums over processes in a tensor on cuda."""
    def sum_over_processes(meter):
        if torch.distributed.is_initialized():
            sums = torch.tensor([meter.count, meter.total], dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            meter.count, meter.total = int(sums[0]), sums[1].item()

    main.utils.SmoothedValue.synchronize_between_processes = sum_over_processes


def wait_for_no_gpu() -> None:
    """DeiT's ``engine`` calls ``torch.cuda.synchronize`` after every step."""
    torch.cuda.synchronize = lambda device=None: None


def wrap_without_device_ids() -> None:
    """DeiT passes ``device_ids``, which torch refuses for a model on the CPU."""
    class DistributedDataParallelOnCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, **kwargs):
            super().__init__(module, **kwargs)

    torch.nn.parallel.DistributedDataParallel = DistributedDataParallelOnCpu


def keep_mixup_targets_on_cpu() -> None:
    """Mixup puts its targets on cuda up to timm 0.4.12; later ones follow the batch."""
    from timm.data import mixup

    *others, device = mixup.mixup_target.__defaults__
    if device == "cuda":
        mixup.mixup_target.__defaults__ = (*others, "cpu")
