#!/usr/bin/env python3
"""Rewrite a MoCo v3 ViT checkpoint into the form that DeiT's --resume loads."""

import argparse
import contextlib
import errno
import inspect
import io
import math
import os
import re
import shlex
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

try:
    import numpy
    import torch
except ImportError as error:
    sys.exit(f"error: {error}; install PyTorch: https://pytorch.org/get-started/locally")

# Since torch 2.1 a file can be mapped into memory and read without running code that is in it.
SAFE_AND_MAPPED = "mmap" in inspect.signature(torch.load).parameters
# Width: depth, name, --model of DeiT or timm. Sources: MoCo v3's vits.py, DeiT's models.py.
MODELS = {
    192: (12, "ViT-Tiny", "deit_tiny_patch16_224"),
    384: (12, "ViT-Small", "moco_v3_vit_small_patch16_224"),
    768: (12, "ViT-Base", "deit_base_patch16_224"),
    1024: (24, "ViT-Large", "vit_large_patch16_224"),
}
# Layers that have a wrong name in the public ViT-L file of MoCo v3's authors.
MISNAMED = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
            "blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}
WANTED = "pass a ViT checkpoint of MoCo v3"
ENCODER = re.compile(r"(module\.)?base_encoder\.")  # in front of the names in MoCo v3's own files
# Safe loading takes DeiT's arguments and NumPy's numbers, too, by the names of NumPy 1 and 2.
if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # since torch 2.6
    scalar = numpy.float64().__reduce__()[0]
    torch.serialization.add_safe_globals([
        argparse.Namespace, numpy.dtype, *{type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"},
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))])


class CheckpointError(ValueError):
    """What is wrong with a checkpoint and what to do about it, in one line, without its path."""


def load(path: str) -> Any:
    """Read a checkpoint of torch or safetensors onto the CPU.

    Since torch 2.1 tensors are mapped into memory, and nothing in the file is run. An older torch
    reads in its own way, which runs whatever code the file contains.

    Raises CheckpointError if it cannot be read, is damaged or contains more than safe types.
    """
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(30)
        if start[8:9] == b"{":  # after 8 bytes of length a header in JSON
            from safetensors.torch import load_file

            return load_file(path)
        stored = [False]  # a file of torch before 1.6, a mere pickle, is not mapped either
        if start.startswith(b"PK"):
            with ThreadPoolExecutor(2) as pool:  # 1.73 GB: 0.5 s by two threads, 0.9 s by one
                stored = list(pool.map(_check_half, [path] * 2, (0, 1)))
        safe = {"weights_only": True, "mmap": all(stored)} if SAFE_AND_MAPPED else {}
        return torch.load(path, map_location="cpu", **safe)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise CheckpointError(_reason(error, path, start)) from error


def _check_half(path: str, turn: int) -> bool:
    """Compare the checksums of every second member by size, from `turn` on.

    Returns whether they are uncompressed: torch would map others, too, and give wrong numbers
    without a word. Raises zipfile.BadZipFile.
    """
    with zipfile.ZipFile(path) as archive:
        archive.filelist.sort(key=lambda member: member.file_size)
        del archive.filelist[1 - turn::2]
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.filelist)


def _reason(error: Exception, path: str, start: bytes) -> str:
    """Why a reader failed, and what to type next."""
    text = str(error).strip()
    if isinstance(error, OSError):
        return f"{error.strerror or text}; check the path"
    if isinstance(error, ImportError) and "safetensors" in text:
        return "a safetensors file; pip install safetensors"
    if not start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
        # Their first bytes tell a web page and a Git LFS pointer.
        what = f"no PyTorch checkpoint, it starts with {start!r}" if start else "an empty file"
        return f"{what}; download it again"
    refused = re.search(r"(?:GLOBAL |class '?|Unsupported (?=operand))([\w.]+(?: \d+)?)", text)
    if not refused:
        detail = f"{type(error).__name__}: {text[:100]}".splitlines()[0]
        return f"damaged, cut short or no PyTorch checkpoint ({detail}); download it again"
    resave = ('import sys, torch; old = torch.load(sys.argv[1], "cpu", weights_only=False); '
              'old = old.state_dict() if hasattr(old, "state_dict") else old; '
              'torch.save({k: v for k, v in old.items() if torch.is_tensor(v) or '
              'k in ("state_dict", "model", "epoch")}, sys.argv[2])')
    old, new = shlex.quote(path), shlex.quote(f"{path}.weights")
    return (f"contains {refused[1]}, which could run code; if you trust the file, type: "
            f"python -c {shlex.quote(resave)} {old} {new} and pass {path}.weights, which it makes")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that replaces the one at `path` when the block ends, if it is whole.

    It is written beside `path`, flushed to disk and renamed. If the block or the disk fails,
    nothing of it stays, and `path` is as before. The folder is made where it is missing.
    Raises OSError with `path` as its `filename`.
    """
    path = os.path.realpath(path)  # replace what a symbolic link points to, not the link
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(aside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = path
        raise
    finally:
        with contextlib.suppress(OSError):  # once renamed, it is not there
            os.unlink(aside)


def save(content: Dict[str, Any], path: str) -> int:
    """Write a checkpoint to `path`, whole and checked or not at all; return its size in bytes.

    Raises OSError if it could not be written; `path` is as before.
    """
    with whole_file(path) as file:
        if SAFE_AND_MAPPED:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # what torch makes of a full disk, or of Ctrl-C
                raise (error.__context__ or error) from None
        else:  # an old torch (before 2.0) aborts the process when a write fails
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
        with zipfile.ZipFile(file) as written:
            if written.testzip():
                raise OSError(errno.EIO, "the disk gave back other bytes than were written", path)
        return file.seek(0, os.SEEK_END)


def recognise(weights: Dict[str, torch.Tensor]) -> Tuple[str, Optional[str], str]:
    """Tell which ViT the tensors are of, from names and shapes alone.

    A classifier, `head.*`, may be there or not. Patches are of 16 x 16 pixels, as all of MoCo v3's.

    Returns:
        A title, such as "ViT-Base (width 768, depth 12)"; --model of DeiT or timm that it fits, or
        None; tensors that are missing, unexpected or of a wrong shape, "" if it is whole.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()
              if not name.startswith("head.")}
    width = shapes.get("cls_token", (0,))[-1]
    table = shapes.get("pos_embed", ())
    side = math.isqrt(table[1] - 1) if len(table) == 3 and table[1] else 14
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    depth, title, model = MODELS.get(width, (len(blocks), "ViT", None))

    block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
             "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    layers = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    layers.update({"patch_embed.proj": (width, 3, 16, 16), "norm": (width,)})
    expected = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width)}
    for name, shape in layers.items():
        expected.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    wrong = [f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}"
             for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    problem = f"{len(wrong)} differ: {'; '.join(wrong[:4])}" if wrong else ""
    return f"{title} (width {width}, depth {depth})", None if wrong else model, problem


def is_sine_cosine(pos_embed: Any) -> bool:
    """Whether it is a tensor (1, 1 + side * side, width), the fixed 2-D table of MoCo v3's vits.py.

    That is zeros for the class token, then sines and cosines of the row and of the column. The
    tolerance of 5e-3 lets bfloat16 pass, and no learned table.
    """
    if not torch.is_tensor(pos_embed) or pos_embed.dim() != 3 or pos_embed.shape[1] < 2:
        return False
    side, width = math.isqrt(pos_embed.shape[1] - 1), pos_embed.shape[2]
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(width // 4) * 4 / width)
    row, column = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    table = torch.cat([torch.zeros(1, table.shape[1]), table])[None]
    return pos_embed.shape == table.shape and torch.allclose(
        pos_embed.detach().float(), table, rtol=0, atol=5e-3)


def convert(checkpoint: Any) -> Tuple[Dict[str, torch.Tensor], str]:
    """Take MoCo v3's encoder without its head out of a checkpoint or a dict of tensors.

    Returns:
        The tensors, not copied, under timm's names in file order, 150 for ViT-Base;
        and in words where they were found.

    Raises CheckpointError if there is no encoder of MoCo v3, or not exactly a ViT's tensors.
    """
    weights = _tensors_of(checkpoint)
    prefix = _find_prefix(weights)
    model = {name[len(prefix):]: tensor.detach() for name, tensor in weights.items()
             if name.startswith(prefix) and not name.startswith(prefix + "head.")}
    misnamed = [layer for layer, right in MISNAMED.items()
                if f"{layer}.weight" in model and f"{right}.weight" not in model]
    for layer in misnamed:
        model = {name.replace(f"{layer}.", f"{MISNAMED[layer]}."): tensor
                 for name, tensor in model.items()}
    _, _, problem = recognise(model)
    if problem:
        raise CheckpointError(f"not exactly the tensors of a ViT: {problem}; {WANTED}")
    found = ("MoCo v3 pre-training checkpoint" if ENCODER.fullmatch(prefix)
             else "encoder with MoCo v3's position embedding")
    return model, found + (f", renamed its misnamed {', '.join(misnamed)}" if misnamed else "")


def _tensors_of(checkpoint: Any) -> Dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, without what torch.compile puts into the names."""
    whole = checkpoint if isinstance(checkpoint, dict) else {}
    weights = whole.get("state_dict", whole.get("model", checkpoint))
    if not isinstance(weights, dict):
        raise CheckpointError(f"a {type(weights).__name__} instead of tensors by name; {WANTED}")
    is_of_run = len(whole) > 1
    if weights is whole.get("model") and (is_of_run or is_sine_cosine(weights.get("pos_embed"))):
        what = "the checkpoint of a fine-tuning run" if is_of_run else "converted already"
        raise CheckpointError(f"{what}, which needs no conversion; pass it to --resume")
    return {str(name).replace("_orig_mod.", ""): tensor for name, tensor in weights.items()
            if torch.is_tensor(tensor)}


def _find_prefix(weights: Dict[str, torch.Tensor]) -> str:
    """What stands in front of the encoder's names, such as "module.base_encoder."."""
    every = [name[:-len("cls_token")] for name in weights
             if re.search(r"(^|\.)cls_token$", name) and "momentum_encoder." not in name]
    prefixes = [prefix for prefix in every if ENCODER.fullmatch(prefix)] or every
    if len(prefixes) != 1:
        resnet = any(name.endswith("layer1.0.conv1.weight") for name in weights)
        what = "a ResNet, and DeiT trains vision transformers only" if resnet else "not one ViT"
        found = ", ".join(prefixes) or "none"
        raise CheckpointError(f"{what} (encoders by base_encoder or cls_token: {found}); {WANTED}")
    table = weights.get(prefixes[0] + "pos_embed")
    if not ENCODER.fullmatch(prefixes[0]) and not is_sine_cosine(table):
        raise CheckpointError("no base_encoder, and a learned position embedding, as supervised "
                              f"models have, instead of MoCo v3's fixed one; {WANTED}")
    return prefixes[0]


def main(argv: Optional[List[str]] = None) -> None:
    """The command line. Raises SystemExit with a line that says why nothing was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint of MoCo v3 (.pth.tar or .safetensors)")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint for DeiT's --resume")
    args = parser.parse_args(argv)
    try:
        checkpoint = load(args.input)
        taken = os.path.exists(args.output) and (
            not os.path.isfile(args.output) or os.path.samefile(args.input, args.output))
        if taken or not os.path.basename(args.output):
            raise OSError("it is a folder, a device or the same file as --input; name another")
        model, found = convert(checkpoint)
        size = save({"model": model}, args.output)
    except CheckpointError as error:
        sys.exit(f"error: {args.input}: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"error: {args.output}: not written: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    title, fits, _ = recognise(model)
    values = sum(tensor.numel() for tensor in model.values())
    print(f"{title}, epoch {checkpoint.get('epoch', 'unknown')}: {found}")
    print(f"Fits DeiT's --model {fits}." if fits else "No model of DeiT's has this width.")
    print(f"{len(model)} tensors, {values:,} values: {args.output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
