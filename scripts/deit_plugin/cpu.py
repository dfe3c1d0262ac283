"""What DeiT, which takes a GPU for granted, needs to run with ``--device cpu``.

A run on GPUs is not touched.
"""
import os

import torch
import torch.distributed


def patch(main):
    """Make DeiT run on the CPU, alone and with several processes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else mixed precision wants the GPU that is there
    use_gloo()
    sum_meters_on_cpu(main)
    wait_for_no_gpu()
    wrap_without_device_ids()
    keep_mixup_targets_on_cpu()


def use_gloo():
    """DeiT's ``init_distributed_mode`` knows nccl only, and takes a GPU for each process."""
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **rest: init("gloo", **rest)
    torch.cuda.set_device = lambda device: None


def sum_meters_on_cpu(main):
    """DeiT's ``SmoothedValue`` sums over processes in a tensor on cuda."""
    def sum_over_processes(meter):
        if torch.distributed.is_initialized():
            sums = torch.tensor([meter.count, meter.total], dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            meter.count, meter.total = int(sums[0]), sums[1].item()

    main.utils.SmoothedValue.synchronize_between_processes = sum_over_processes


def wait_for_no_gpu():
    """DeiT's ``engine`` calls ``torch.cuda.synchronize`` after every step."""
    torch.cuda.synchronize = lambda device=None: None


def wrap_without_device_ids():
    """DeiT passes ``device_ids``, which torch refuses for a model on the CPU."""
    class DistributedDataParallelOnCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, **kwargs):
            super().__init__(module, **kwargs)

    torch.nn.parallel.DistributedDataParallel = DistributedDataParallelOnCpu


def keep_mixup_targets_on_cpu():
    """Mixup puts its targets on cuda up to timm 0.4.12; later ones follow the batch."""
    from timm.data import mixup

    *others, device = mixup.mixup_target.__defaults__
    if device == "cuda":
        mixup.mixup_target.__defaults__ = (*others, "cpu")
