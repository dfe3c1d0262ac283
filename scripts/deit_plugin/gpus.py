"""Counts this machine's GPUs."""
import torch

from .errors import UserError


def describe(device: str, processes: int, is_launch: bool = True) -> str:
    """Describe the GPUs that ``processes`` of this machine would use.

    Raises UserError if there are too few. With ``is_launch=False`` a machine without any GPU is
    accepted, since --check may run on the login node of a cluster.
    """
    if device == "cpu":
        return f"none needed: --device cpu, NPROC_PER_NODE={processes}"
    # device_count() alone would count GPUs that an old driver makes unusable.
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found and not is_launch:
        return f"not checked: no GPU on this machine; the launch needs {processes}"
    if found < processes:
        advice = f"set NPROC_PER_NODE={found}, or " if found else ""
        raise UserError(f"NPROC_PER_NODE={processes}, but torch can use {found} GPUs of this "
                        f"machine: {advice}pass --device cpu for a smoke test")
    return f"{found} found, {processes} needed"
