"""torch.load for files from elsewhere: tensors and plain values are read, no pickled code runs."""
import argparse
import collections
import pickle
import zipfile

import torch


def load(path):
    """Read a checkpoint to the CPU; memory-mapped from torch 2.4 on, in zip format.

    Raises whatever torch raises on a file that is damaged, no checkpoint, or holds more than
    tensors and plain values.
    """
    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4 on
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    original = torch.serialization.pickle
    torch.serialization.pickle = _Module  # torch 1.13 does not heed its own pickle_module
    try:
        return torch.load(path, map_location="cpu", pickle_module=_Module)
    finally:
        torch.serialization.pickle = original


_ALLOWED = {("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): argparse.Namespace}
_ALLOWED_IN_TORCH = {"torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
                     "torch": ("Size", "device", "dtype")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if is_storage or name in _ALLOWED_IN_TORCH.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


class _Module:
    """What torch.load takes as ``pickle_module``."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file, **kwargs):
        return _Unpickler(file, **kwargs).load()
