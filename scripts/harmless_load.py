"""torch.load for files from elsewhere: tensors and plain values are read, no pickled code runs.

The checks have twins in convert_to_deit.py, which stands alone: change both.
"""
import argparse
import collections
import os
import pickle
import sys
import warnings
import zipfile

import torch


def load(path):
    """Read a checkpoint to the CPU; memory-mapped from torch 2.4 on, in zip format.

    Raises whatever torch raises on a file that is damaged, no checkpoint, or holds more than
    tensors and plain values.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # as torch tells
    packed = zipped and _check_archive(path)
    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4 on
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and not packed)
    if not zipped:
        _check_storages(path)
    original = torch.serialization.pickle
    torch.serialization.pickle = _Module  # torch 1.13 does not heed its own pickle_module
    try:
        return torch.load(path, map_location="cpu", pickle_module=_Module)
    finally:
        torch.serialization.pickle = original


def _check_archive(path):
    """Whether a zip file is compressed. Raises if it lacks what torch takes for granted.

    That is a member of its size for each storage: torch 1.7 reads on in memory beyond a short one.
    """
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        for name in members:
            archive.open(name).close()  # compares what is said of it in two places
        if sum(member.file_size for member in members.values()) > 100 * os.path.getsize(path):
            raise ValueError("it unpacks to more than a hundred times its size")
        pickled, = (name for name in members if name.endswith("/data.pkl"))
        storages = _Scanner(archive.open(pickled)).scan()
    for key, (_, size) in storages.items():
        if members[f"{pickled[:-len('.pkl')]}/{key}"].file_size != size:
            raise ValueError(f"storage {key} is not as long as it should be")
    return any(member.compress_type for member in members.values())


def _check_storages(path):
    """Raise unless all storages follow in a file of torch before 1.6; it may crash without."""
    with open(path, "rb") as file:
        for _ in ("magic number", "protocol version", "system"):
            _Module.load(file)
        storages = _Scanner(file).scan()
        for key in _Module.load(file):
            length, size = storages[key]
            if int.from_bytes(file.read(8), sys.byteorder) != length:
                raise ValueError(f"storage {key} is not as long as it should be")
            file.seek(size, os.SEEK_CUR)
        if file.tell() > os.path.getsize(path):
            raise EOFError("it ends too early")


_ALLOWED = {("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): argparse.Namespace}
_ALLOWED_IN_TORCH = {"torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
                     "torch": ("Size", "device", "dtype")}


class _Unpickler(pickle._Unpickler):  # the one in C takes gigabytes at a single damaged byte
    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if is_storage or name in _ALLOWED_IN_TORCH.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {f'{module}.{name}'!r:.80}")


class _Scanner(_Unpickler):
    """Notes each storage's length and bytes; makes no tensor."""

    def scan(self):
        """The length and bytes of each storage, by its key."""
        self.storages = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2 has other storages; these make no tensor
            self.load()
        return self.storages

    def find_class(self, module, name):
        found = super().find_class(module, name)
        return (lambda *_: None) if name.startswith("_rebuild") else found

    def persistent_load(self, saved_id):
        _, kind, key, _, length = saved_id[:5]
        self.storages[key] = length, length * kind().element_size()


class _Module:
    """What torch.load takes as ``pickle_module``."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file, **kwargs):
        return _Unpickler(file, **kwargs).load()
