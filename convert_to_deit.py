#!/usr/bin/env python3
"""Convert a MoCo v3 ViT checkpoint into the form that DeiT's --resume loads."""

import argparse
import contextlib
import errno
import inspect
import io
import math
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple

try:
    import numpy
    import torch
except ImportError as error:
    sys.exit(f"error: {error}; install PyTorch: https://pytorch.org/get-started/locally")

# torch 2.1 and newer can map a file into memory, and load weights without running code in the file.
SAFE_AND_MAPPED = "mmap" in inspect.signature(torch.load).parameters
# Width: depth, title, --model of DeiT or timm. Sources: MoCo v3's vits.py and DeiT's models.py.
MODELS = {
    192: (12, "ViT-Tiny", "deit_tiny_patch16_224"),
    384: (12, "ViT-Small", "moco_v3_vit_small_patch16_224"),
    768: (12, "ViT-Base", "deit_base_patch16_224"),
    1024: (24, "ViT-Large", "vit_large_patch16_224"),
}
# The public ViT-Large file of MoCo v3's authors misnames these layers.
MISNAMED = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
            "blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}
WANTED = "pass a ViT checkpoint of MoCo v3"
ENCODER = re.compile(r"(module\.)?base_encoder\.")  # the prefix of names in MoCo v3's own files
# What fsync answers where it does not exist, as on some CIFS mounts.
CANNOT_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Safe loading also accepts DeiT's arguments and NumPy's numbers (under NumPy 1's and 2's names).
if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch 2.6 and newer
    scalar = numpy.float64().__reduce__()[0]
    torch.serialization.add_safe_globals([
        argparse.Namespace, numpy.dtype, *{type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"},
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))])


class CheckpointError(ValueError):
    """What is wrong with a checkpoint and what to do about it, in one line without its path."""


def load(path: str, trust: bool = False, verify: bool = True) -> Any:
    """Read a checkpoint of torch or safetensors onto the CPU.

    With torch 2.1 or newer, no code in the file runs, and its tensors are mapped into memory where
    the file system can do that. Replace the file only by renaming another over it: tensors that are
    in use would change with it. An older torch reads all of a file of torch's, and runs whatever
    code it contains.

    Args:
        path: the file.
        trust: also load objects other than tensors and plain values, which can run code, as torch
            did before it had `weights_only`.
        verify: compare the bytes of a zip file with its checksums, which reads all of it.

    Raises CheckpointError if the file cannot be read, is damaged, or needs `trust`.
    """
    start = b""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CheckpointError("it is a pipe or a device; pass the path of a file")
    try:
        # Some network file systems map no files, so what cannot be mapped is read. A file that is
        # damaged cannot be read either, and the error that is shown comes from there.
        with open(path, "rb") as file:
            start = file.read(30)
            if start[8:9] == b"{":  # safetensors: 8 bytes of length, then a header in JSON
                import safetensors.torch

                with contextlib.suppress(Exception):
                    return safetensors.torch.load_file(path)
                return safetensors.torch.load(start + file.read())
        options = {"weights_only": not trust} if SAFE_AND_MAPPED else {}
        # torch would map compressed members too, and silently read wrong numbers from them.
        if start.startswith(b"PK") and _is_uncompressed(path, verify) and SAFE_AND_MAPPED:
            with contextlib.suppress(RuntimeError, UnicodeError):
                return torch.load(path, map_location="cpu", mmap=True, **options)
        with open(path, "rb") as file:  # torch opens no path that is not UTF-8
            return torch.load(file, map_location="cpu", **options)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise CheckpointError(_why_unreadable(error, start)) from error


def _is_uncompressed(path: str, verify: bool) -> bool:
    """Whether all members of a zip file are uncompressed; with `verify`, after reading them.

    Two threads read 1.73 GB in 0.5 s, one in 0.9 s. Each has a ZipFile of its own, since one that
    is shared can mix up what it reads. Raises zipfile.BadZipFile.
    """
    def read_half(turn: int) -> bool:
        with zipfile.ZipFile(path) as archive:
            by_size = sorted(archive.infolist(), key=lambda member: member.file_size)
            for member in by_size[turn::2] if verify else ():
                with archive.open(member) as content:
                    while content.read(1 << 22):
                        pass
            return all(member.compress_type == zipfile.ZIP_STORED for member in by_size)

    with ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(read_half, (0, 1))))


def _why_unreadable(error: Exception, start: bytes) -> str:
    """Why a reader failed, and what to do next."""
    text = str(error).strip()
    if isinstance(error, IsADirectoryError):
        return "it is a folder; pass a file in it"
    if isinstance(error, OSError):
        return f"{error.strerror or text}; check the path"
    if isinstance(error, ImportError) and "safetensors" in text:
        return "this is a safetensors file; type pip install safetensors"
    if not start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
        # The first bytes show a web page or a Git LFS pointer for what it is.
        what = f"not a PyTorch checkpoint, it starts with {start!r}" if start else "an empty file"
        return f"{what}; copy or download it again"
    refused = re.search(r"(?:GLOBAL |class '?|Unsupported (?=operand))([\w.]+(?: \d+)?)", text)
    if refused:
        return (f"contains {refused[1]}, which can run code when it is loaded; if you trust the "
                "file, pass --trust")
    detail = f"{type(error).__name__}: {text[:100]}".splitlines()[0]
    return f"damaged, cut short or not a PyTorch checkpoint ({detail}); copy or download it again"


def check_output(path: str, flag: str, source: str) -> None:
    """Raise OSError if `path` cannot become a file, or is the file `source` that `flag` names."""
    if not os.path.basename(path) or os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is a folder, a pipe or a device; pass the path of a file")
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(source, path):
        raise OSError(f"it is the same file as {flag}; pass another path")
    check_folder(os.path.dirname(os.path.realpath(path)))


def check_folder(path: str) -> None:
    """Raise OSError if files cannot be written to a folder, which may not exist yet."""
    folder = Path(path).absolute()  # keeps "..", which behind a link means another folder
    # Missing folders are created below this one.
    nearest = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(f"{nearest} is not a folder that you may write to; pass another path")


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that replaces the one at `path` when the block ends.

    The file is written beside `path`, flushed to disk and renamed. A missing folder is created. If
    the block or the disk fails, nothing of all this stays, and `path` is as before. A device would
    be replaced, too, so a command calls `check_output` before its work begins.

    Raises OSError with `path` as its `filename`.
    """
    path = os.path.realpath(path)  # replace what a symbolic link points to, not the link
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    missing = [each for each in (Path(folder), *Path(folder).parents) if not os.path.exists(each)]
    try:
        os.makedirs(folder, exist_ok=True)
        with open(aside, "w+b") as file:
            yield file
            flush_to_disk(file)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it was not made
            os.unlink(aside)
        for each in missing:
            with contextlib.suppress(OSError):  # it was not made, or others use it
                os.rmdir(each)
        if isinstance(error, OSError) and error.filename in (None, aside):
            error.filename = path
        raise


def flush_to_disk(file: IO) -> None:
    """Write an open file to the disk, as far as its file system can. Raises OSError."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in CANNOT_FSYNC:
            raise


def save(content: Dict[str, Any], path: str) -> int:
    """Write a checkpoint to `path`, complete or not at all; return its size in bytes.

    What was written is read back against its checksums. Raises OSError if it could not be written;
    `path` is then as before.
    """
    with atomic_write(path) as file:
        if SAFE_AND_MAPPED:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # hides a failed write or Ctrl-C
                raise (error.__context__ or error) from None
        else:  # torch before 2.0 aborts the process when a write fails
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
        with zipfile.ZipFile(file) as written:
            if written.testzip():
                raise OSError(errno.EIO, "it reads back as other bytes than were written", path)
        return file.seek(0, os.SEEK_END)


class Recognised(NamedTuple):
    """What `recognise` found."""

    title: str  # for example "ViT-Base (width 768, depth 12)"
    model: Optional[str]  # the --model of DeiT or timm that takes exactly these tensors
    problem: str  # tensors that are missing, unexpected or of another shape; "" if there are none


def recognise(weights: Dict[str, torch.Tensor]) -> Recognised:
    """Tell which ViT the tensors belong to, from names and shapes alone.

    A classifier, `head.*`, is ignored. Patches have 16 x 16 pixels, as in all MoCo v3 models.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()
              if not name.startswith("head.")}
    width = shapes.get("cls_token", (0,))[-1]
    positions = shapes.get("pos_embed", ())
    side = math.isqrt(positions[1] - 1) if len(positions) == 3 and positions[1] else 14
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    depth, title, model = MODELS.get(width, (len(blocks), "ViT", None))

    block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
             "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    layers = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    layers.update({"patch_embed.proj": (width, 3, 16, 16), "norm": (width,)})
    expected = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width)}
    for name, shape in layers.items():
        expected.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    problem = compare_shapes(shapes, expected)
    title = f"{title} (width {width}, depth {depth})"
    return Recognised(title, None if problem else model, problem)


def compare_shapes(found: Dict[str, tuple], expected: Dict[str, tuple]) -> str:
    """The differences between two sets of tensors by name and shape, in words; "" if none."""
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
             for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return f"{len(wrong)} differ: {'; '.join(wrong[:4])}" if wrong else ""


def is_sine_cosine(pos_embed: Any) -> bool:
    """Whether this is MoCo v3's fixed position embedding, a tensor (1, 1 + side * side, width).

    It has zeros for the class token, then sines and cosines of the row and of the column (source:
    MoCo v3's vits.py). The tolerance of 5e-3 accepts bfloat16 and no learned embedding.
    """
    if not torch.is_tensor(pos_embed) or pos_embed.dim() != 3 or pos_embed.shape[1] < 2:
        return False
    side, width = math.isqrt(pos_embed.shape[1] - 1), pos_embed.shape[2]
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(width // 4) * 4 / width)
    row, column = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    fixed = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    fixed = torch.cat([torch.zeros(1, fixed.shape[1]), fixed])[None]
    return pos_embed.shape == fixed.shape and torch.allclose(
        pos_embed.detach().float(), fixed, rtol=0, atol=5e-3)


def require_finite(weights: Dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError with the name of the first tensor that contains NaN or infinity."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} contains NaN or infinity, which no run recovers from: "
                                  "pass a checkpoint from before the loss diverged")


def convert(checkpoint: Any, keep_head: bool = False) -> Tuple[Dict[str, torch.Tensor], str]:
    """Extract MoCo v3's encoder from a checkpoint or a dict of tensors.

    Args:
        checkpoint: what `load` returns.
        keep_head: keep the classifier of a linear probe, too. A pre-training head is never kept.

    Returns:
        The tensors under timm's names, in file order and not copied (150 for ViT-Base), and a
        description of where they were found.

    Raises CheckpointError if there is no MoCo v3 encoder, if it does not have exactly a ViT's
    tensors, if a value is NaN or infinite, or if there is no classifier to keep.
    """
    weights = _tensors_of(checkpoint)
    prefix = _find_prefix(weights)
    head = classifier_of(checkpoint)
    if keep_head and not head:
        raise CheckpointError("no classifier to keep: leave --keep-head out, or pass one of MoCo "
                              "v3's linear-vit files")
    model = {name[len(prefix):]: tensor.detach() for name, tensor in weights.items()
             if name.startswith(prefix) and not name.startswith(prefix + "head.")}
    misnamed = [layer for layer, right in MISNAMED.items()
                if f"{layer}.weight" in model and f"{right}.weight" not in model]
    for layer in misnamed:
        model = {name.replace(f"{layer}.", f"{MISNAMED[layer]}."): tensor
                 for name, tensor in model.items()}
    problem = recognise(model).problem
    if problem:
        raise CheckpointError(f"not exactly the tensors of a ViT: {problem}; {WANTED}")
    model.update(head if keep_head else {})
    require_finite(model)
    found = ("MoCo v3 pre-training checkpoint" if ENCODER.fullmatch(prefix)
             else "encoder with MoCo v3's position embedding")
    return model, found + (f", renamed its misnamed {', '.join(misnamed)}" if misnamed else "")


def classifier_of(checkpoint: Any) -> Dict[str, torch.Tensor]:
    """`head.weight` (classes, width) and `head.bias` of a linear probe on an encoder, or {}."""
    weights = _tensors_of(checkpoint)
    prefix = _find_prefix(weights)
    head = {name: weights[prefix + name].detach() for name in ("head.weight", "head.bias")
            if prefix + name in weights}
    is_one = len(head) == 2 and [tensor.dim() for tensor in head.values()] == [2, 1]
    return head if is_one and not ENCODER.fullmatch(prefix) else {}


def _tensors_of(checkpoint: Any) -> Dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, with torch.compile's "_orig_mod." removed."""
    whole = checkpoint if isinstance(checkpoint, dict) else {}
    weights = whole.get("state_dict", whole.get("model", checkpoint))
    if isinstance(weights, torch.nn.Module):  # as --trust loads it
        weights = weights.state_dict()
    if not isinstance(weights, dict):
        raise CheckpointError(f"a {type(weights).__name__} instead of tensors by name; {WANTED}")
    is_of_run = len(whole) > 1 and not any(map(ENCODER.match, map(str, weights)))
    if weights is whole.get("model") and (is_of_run or is_sine_cosine(weights.get("pos_embed"))):
        what = "the checkpoint of a fine-tuning run" if is_of_run else "already converted"
        raise CheckpointError(f"{what}, which needs no conversion; pass it to --resume")
    return {str(name).replace("_orig_mod.", ""): tensor for name, tensor in weights.items()
            if torch.is_tensor(tensor)}


def _find_prefix(weights: Dict[str, torch.Tensor]) -> str:
    """The prefix of the encoder's names, such as "module.base_encoder."."""
    every = [name[:-len("cls_token")] for name in weights
             if re.search(r"(^|\.)cls_token$", name) and "momentum_encoder." not in name]
    prefixes = [prefix for prefix in every if ENCODER.fullmatch(prefix)] or every
    if len(prefixes) != 1:
        resnet = any(name.endswith("layer1.0.conv1.weight") for name in weights)
        what = "a ResNet, but DeiT trains only vision transformers" if resnet else "not one ViT"
        found = ", ".join(prefixes) or "none"
        raise CheckpointError(f"{what} (encoders by base_encoder or cls_token: {found}); {WANTED}")
    pos_embed = weights.get(prefixes[0] + "pos_embed")
    if not ENCODER.fullmatch(prefixes[0]) and not is_sine_cosine(pos_embed):
        raise CheckpointError("no base_encoder, and a learned position embedding, as in supervised "
                              f"models, instead of MoCo v3's fixed one; {WANTED}")
    return prefixes[0]


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command line. Raises SystemExit with one line if nothing was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint of MoCo v3 (.pth.tar or .safetensors)")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint for DeiT's --resume")
    parser.add_argument("--trust", action="store_true",
                        help="load an --input that contains more than tensors and plain values; "
                             "this runs the code in it")
    parser.add_argument("--keep-head", action="store_true",
                        help="keep the classifier of MoCo v3's linear-vit files, for --eval")
    args = parser.parse_args(argv)
    try:
        check_output(args.output, "--input", args.input)
        checkpoint = load(args.input, args.trust)
        model, found = convert(checkpoint, args.keep_head)
        classes = len(classifier_of(checkpoint).get("head.bias", ()))
        size = save({"model": model, **({"kept_head": True} if args.keep_head else {})},
                    args.output)
    except CheckpointError as error:
        sys.exit(f"error: {args.input}: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"error: {args.output}: not written: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    title, fits, _ = recognise(model)
    values = sum(tensor.numel() for tensor in model.values())
    epoch = checkpoint.get("epoch", "unknown") if isinstance(checkpoint, dict) else "unknown"
    use = f"Use it with --model {fits}." if fits else "No model of DeiT has this width."
    if classes:
        use += f"\nIts classifier of {classes} classes was " + (
            "kept: pass it to --eval." if args.keep_head else
            "left out, as fine-tuning needs it; --keep-head keeps it, for --eval.")
    try:
        print(f"{title}, epoch {epoch}: {found}\n{use}\n{len(model)} tensors, {values:,} values: "
              f"{args.output}, {size / 1e6:.1f} MB", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try and complain again
        if not isinstance(error, BrokenPipeError):  # as `| head` makes it
            sys.exit(f"error: cannot print that {args.output} was written: {error.strerror}")


if __name__ == "__main__":
    main()
