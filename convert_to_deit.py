#!/usr/bin/env python3
"""Rewrite a MoCo v3 ViT pre-training checkpoint into the form that DeiT's --resume loads."""

import argparse
import contextlib
import ctypes
import inspect
import math
import os
import pickle
import re
import secrets
import sys
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

try:
    import torch
except ImportError as error:
    torch, torch_import_error = None, error

VIT_SMALL_MODEL = "moco_v3_vit_small_patch16_224"
# (width, depth): name, DeiT's --model, and its heads, whose number no tensor shows.
# Sources: vits.py of MoCo v3, models.py of DeiT.
MODELS = {
    (192, 12): ("ViT-Tiny", "deit_tiny_patch16_224", "3 heads"),
    (384, 12): ("ViT-Small", VIT_SMALL_MODEL, "12 heads, as MoCo v3 trains it; DeiT's own "
                "deit_small_patch16_224 has 6 and would compute something else"),
    (768, 12): ("ViT-Base", "deit_base_patch16_224", "12 heads"),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SAFE_GLOBALS = {("collections", "OrderedDict"), ("torch", "Size"), ("torch", "device"),
                ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}
SAFE_GLOBALS |= {("torch", f"{kind}Storage") for kind in (
    "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")}
WANTED = "pass a checkpoint that MoCo v3's main_moco.py saved"


class ConversionError(ValueError):
    """What cannot be converted, why, and what to do about it, in one line."""


class TensorUnpickler(pickle._Unpickler):
    """Unpickles tensors in plain containers and refuses every other class or function.

    The Python implementation, since the C one allocates gigabytes at a single damaged byte.
    """

    def find_class(self, module, name):
        """The class or function; raises UnpicklingError for any that tensors do not need."""
        if (module, name) not in SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")
        return super().find_class(module, name)


class TensorPickle:
    """What torch.load needs of a pickle module, for torch without a usable weights_only."""

    Unpickler = TensorUnpickler

    @staticmethod
    def load(file, **options):
        """As pickle.load."""
        return TensorUnpickler(file, **options).load()


class StorageScanner(TensorUnpickler):
    """Unpickles a checkpoint, noting each storage's length and bytes; it makes no tensor."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        """As for tensors, but what would make one makes nothing."""
        found = super().find_class(module, name)
        return (lambda *_: None) if name.startswith("_rebuild") else found

    def persistent_load(self, saved_id):
        """Note the storage that torch saved under that id: its numbers and its bytes."""
        _, kind, key, _, length = saved_id[:5]
        self.storages[key] = length, length * kind().element_size()


class PostponingFile:
    """Keeps a write error until `finish`: torch before 2.0 aborts the process if write raises."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        """Write the bytes, unless an earlier write failed; always claims to have done so."""
        try:
            if self.error is None:
                self.file.write(data)
        except BaseException as error:
            self.error = error
        return len(data)

    def flush(self):
        """Nothing to do before `finish`; torch calls it."""

    def finish(self):
        """Hand all to the system, or raise the error of a write that failed."""
        if self.error is not None:
            raise self.error
        self.file.flush()


def convert(state_dict):
    """Take the base encoder without its head out of a MoCo v3 state_dict.

    Args:
        state_dict: dict of tensors of any real dtype named base_encoder.*, momentum_encoder.* and
            predictor.*, all with or all without "module." in front. It is not modified.

    Returns:
        OrderedDict of the same tensors in the same order, without the prefix: 150 for ViT-Base.
        A tensor is copied only if it is a part of a larger storage.

    Raises:
        ConversionError (a ValueError): it is not the state_dict of a MoCo v3 vision transformer.
    """
    _check_tensors(state_dict)
    prefix = _find_prefix(state_dict)
    model = OrderedDict(
        (name[len(prefix):], _without_surplus(tensor)) for name, tensor in state_dict.items()
        if name.startswith(prefix) and not name.startswith(prefix + "head."))
    _check_vision_transformer(model)
    return model


def _check_tensors(state_dict):
    if not isinstance(state_dict, dict):
        raise ConversionError(f"state_dict is no dict but a {type(state_dict).__name__}; {WANTED}")
    if not all(isinstance(name, str) for name in state_dict):
        raise ConversionError(f"state_dict has a name that is not a string; {WANTED}")
    for name, tensor in state_dict.items():
        if not _is_dense(tensor):
            raise ConversionError(f"{name!r:.80} in state_dict is not a dense tensor; {WANTED}")


def _is_dense(tensor):
    return (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
            and tensor.device.type != "meta" and not tensor.is_quantized
            and not tensor.is_complex() and _bytes(tensor) <= _storage_bytes(tensor))


def _bytes(tensor):
    return math.prod(tensor.shape) * tensor.element_size()  # torch 1.7's numel() overflows


def _storage_bytes(tensor):
    untyped = hasattr(tensor, "untyped_storage")  # since torch 2.0, where storage() warns
    storage = tensor.untyped_storage() if untyped else tensor.storage()
    return storage.size() * storage.element_size()


def _find_prefix(state_dict):
    prefixes = {match.group() for match in map(re.compile(r"(module\.)?base_encoder\.").match,
                                               state_dict) if match}
    if len(prefixes) == 1:
        return prefixes.pop()
    if prefixes:
        raise ConversionError(f"only some names in state_dict begin with 'module.'; {WANTED}")
    if any(re.fullmatch(r"(module\.)?(head|fc)\.weight", name) for name in state_dict):
        raise ConversionError("state_dict has no base_encoder but a classifier, as linear probes "
                              f"and supervised models do; {WANTED}")
    raise ConversionError(f"state_dict has no base_encoder; {WANTED}")


def _without_surplus(tensor):
    """The tensor without gradient, copied if saving it would save a larger storage with it."""
    tensor = tensor.detach()
    return tensor.clone() if _storage_bytes(tensor) > _bytes(tensor) else tensor


def _check_vision_transformer(model):
    if "conv1.weight" in model:
        raise ConversionError("base_encoder is a ResNet, and DeiT trains vision transformers "
                              "only; pass a checkpoint of vit_base or vit_small")
    stem = "patch_embed.proj.0" if "patch_embed.proj.0.weight" in model else "patch_embed.proj"
    dimensions = {"cls_token": 3, "pos_embed": 3, f"{stem}.weight": 4, "norm.weight": 1}
    for name, dimension in dimensions.items():
        if name not in model or model[name].dim() != dimension:
            raise ConversionError(f"base_encoder is no vision transformer: it lacks a {name} of "
                                  f"{dimension} dimensions; {WANTED}")


def describe(model):
    """Tell the architecture of a converted state_dict and what it fits.

    Args:
        model: what `convert` returned, with pos_embed (1, tokens, width) and, unless its stem is
            convolutional, patch_embed.proj.weight (width, 3, patch, patch).

    Returns:
        tuple of two str: the architecture, and the advice which DeiT --model to use.
    """
    tokens, width = model["pos_embed"].shape[1:]
    depth = len({name.split(".")[1] for name in model if name.startswith("blocks.")})
    stem = "patch_embed.proj.0.weight" in model  # a convolutional stem stands for one block
    name, fit, heads = MODELS.get((width, depth + stem), ("ViT", None, None))
    size = f"(width {width}, depth {depth})"
    if stem:
        return f"{name} with a convolutional stem {size}", "DeiT has no such model."
    patch = model["patch_embed.proj.weight"].shape[-1]
    side = math.sqrt(max(tokens - 1, 0))
    if fit is None or patch != 16 or side == 0 or not side.is_integer():
        return (f"{name} {size}", f"DeiT has no such model (patch size {patch}, {tokens} tokens).")
    resize = "" if tokens == 197 else f" --input-size {int(side) * patch}"
    return f"{name} {size}", f"Fits DeiT's --model {fit}{resize} ({heads})."


def read_checkpoint(path):
    """Read a checkpoint onto the CPU, mapped into memory if torch can, and run none of its code.

    Raises:
        OSError: the file cannot be read.
        ConversionError: it is no checkpoint, damaged, or holds more than tensors and numbers.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # zip; pickle, as torch saved before 1.6
        raise ConversionError(f"it is no PyTorch checkpoint; {WANTED}")
    try:
        return _load_tensors(path, is_zip=start.startswith(b"PK"))
    except Exception as error:  # hostile bytes make torch.load raise almost anything
        refused = re.search(r"(?:GLOBAL|class) ([\w.]{1,80})", str(error))
        if refused:
            raise ConversionError(f"it holds {refused.group(1)}, which no MoCo v3 checkpoint does "
                                  f"(DeiT's may, and need no conversion); {WANTED}") from error
        raise ConversionError("it is damaged or no PyTorch checkpoint (torch.load raised "
                              f"{type(error).__name__}); copy or download it again") from error


def _load_tensors(path, is_zip):
    as_it_is = is_zip and _check_archive(path)
    if _can_map():
        return torch.load(path, "cpu", weights_only=True, mmap=as_it_is)
    if not is_zip:
        _check_storages(path)
    original = torch.serialization.pickle
    torch.serialization.pickle = TensorPickle  # torch 1.13 ignores the argument pickle_module
    try:
        return torch.load(path, "cpu", pickle_module=TensorPickle)
    finally:
        torch.serialization.pickle = original


def _check_archive(path):
    """Whether a zip file holds every tensor as it is, which torch takes for granted in mapping.

    It and what follows have twins in scripts/harmless_load.py: change both.
    Raises EOFError if a storage is not as long as torch takes for granted in reading it, and
    ValueError if the file unpacks to so much that only malice can have packed it.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for name in members:
            archive.open(name).close()  # compares what is said of it in two places
        if sum(member.file_size for member in members.values()) > 100 * os.path.getsize(path):
            raise ValueError
        pickled, = (name for name in members if name.endswith("/data.pkl"))
        scanner = StorageScanner(archive.open(pickled))
        scanner.load()
    for key, (_, size) in scanner.storages.items():
        if members[f"{pickled[:-len('.pkl')]}/{key}"].file_size != size:
            raise EOFError
    return not any(member.compress_type for member in members.values())


def _check_storages(path):
    """Raise EOFError unless all storages follow; torch before 1.13 corrupts its memory if not."""
    with open(path, "rb") as file:
        for _ in ("magic number", "protocol version", "system"):
            TensorPickle.load(file)
        scanner = StorageScanner(file)
        scanner.load()
        for key in TensorPickle.load(file):
            length, size = scanner.storages[key]
            if int.from_bytes(file.read(8), sys.byteorder) != length:
                raise EOFError
            file.seek(size, os.SEEK_CUR)
        if file.tell() > os.path.getsize(path):
            raise EOFError


def _can_map():
    """Whether torch can map files; if so (2.1), its weights_only reads floats too (1.13: not)."""
    return "mmap" in inspect.signature(torch.load).parameters


def extract(checkpoint):
    """Convert what `read_checkpoint` returned; raise ConversionError for anything but MoCo v3's."""
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"it holds only a {type(checkpoint).__name__}; {WANTED}")
    if "state_dict" in checkpoint:
        return convert(checkpoint["state_dict"])
    model = checkpoint.get("model")
    if not isinstance(model, dict) or "cls_token" not in model:
        raise ConversionError(f"it has no state_dict; {WANTED}")
    if len(checkpoint) > 1 or "head.weight" in model:
        raise ConversionError("it is a DeiT checkpoint, which needs no conversion; pass it to "
                              "DeiT's --resume as it is")
    raise ConversionError("it is converted already; pass it to DeiT's --resume as it is")


def write_checkpoint(model, path):
    """Write {'model': model} to path, whole and checked or not at all, and return its bytes.

    Raises:
        OSError, RuntimeError: it could not be written, or differed when read back.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".convert-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file, ThreadPoolExecutor(1) as other_thread:
            postponing = PostponingFile(file)
            torch.save({"model": model}, postponing)
            postponing.finish()
            on_disk = other_thread.submit(os.fsync, file.fileno())
            check_written(model, temporary)
            on_disk.result()
        size = os.path.getsize(temporary)
        os.replace(temporary, path)
        return size
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def check_written(model, path):
    """Raise OSError unless path holds exactly model: names, order, dtypes, shapes and bits."""
    names = list(model)
    # Mapped pages count as memory while the file is mapped, so map it anew every four blocks.
    step = 48 if _can_map() else len(names)
    for start in range(0, len(names), step):
        written = read_checkpoint(path)
        if list(written) != ["model"] or list(written["model"]) != names:
            raise OSError("other names were read back than were to be written")
        for name in names[start:start + step]:
            if not _is_same(model[name], written["model"][name]):
                raise OSError(f"{name} was read back with other values than were to be written")


def _is_same(one, other):
    one, other = one.contiguous(), other.contiguous()  # names, so that they outlive their buffers
    return (one.dtype == other.dtype and one.shape == other.shape
            and bytearray(_memory(one)) == _memory(other))


def _memory(tensor):
    """The bytes of a contiguous tensor: in them NaN equals itself, and -0.0 is not 0.0."""
    return (ctypes.c_char * _bytes(tensor)).from_address(tensor.data_ptr())


def check_paths(source, target):
    """Raise ConversionError unless source is a file and target a place for another one."""
    if not os.path.exists(source):
        raise ConversionError(f"--input {source!r}: no such file; check the path")
    if not os.path.isfile(source):
        raise ConversionError(f"--input {source!r}: not a regular file; {WANTED}")
    if os.path.isdir(target) or not os.path.basename(target):
        raise ConversionError(f"--output {target!r}: a folder; name a file in it")
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise ConversionError(f"--output {target!r}: not a regular file; name another")
        if os.path.samefile(source, target):
            raise ConversionError(f"--output {target!r}: the same file as --input; name another")


def convert_file(source, target):
    """Convert the file source into the file target; return the summary or raise ConversionError."""
    check_paths(source, target)
    if torch is None:
        raise ConversionError(f"torch cannot be imported ({torch_import_error}); install PyTorch")
    try:
        checkpoint = read_checkpoint(source)
        model = extract(checkpoint)
    except (ConversionError, OSError) as error:
        raise ConversionError(f"--input {source!r}: {error}") from error
    try:
        size = write_checkpoint(model, os.path.realpath(target))
    except (ConversionError, OSError, RuntimeError) as error:
        raise ConversionError(f"--output {target!r}: not written: {error}; "
                              "check its folder and the space left there") from error
    return summarize(model, checkpoint.get("epoch"), size)


def summarize(model, epoch, size):
    """Two lines on a converted state_dict, the epoch it is from (int) and its size in bytes."""
    architecture, advice = describe(model)
    epoch = epoch if isinstance(epoch, int) and 0 <= epoch < 10**9 else "unknown"
    parameters = sum(tensor.numel() for name, tensor in model.items() if not name.endswith(BUFFERS))
    return (f"{architecture}, epoch {epoch}: {len(model)} tensors, {parameters:,} parameters, "
            f"{size / 1e6:.1f} MB\n{advice}")


def main(argv=None):
    """The command line; returns the exit status: 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, metavar="PATH", help="checkpoint of MoCo v3")
    parser.add_argument("--output", required=True, metavar="PATH", help="checkpoint for DeiT")
    args = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(convert_file(args.input, args.output))
    except ConversionError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)  # torch would take half a second to take itself down
