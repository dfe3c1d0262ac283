#!/usr/bin/env python3
"""Rewrite a MoCo v3 ViT checkpoint into the form that DeiT's --resume loads."""

import argparse
import contextlib
import errno
import inspect
import io
import json
import math
import os
import re
import shlex
import sys
import warnings
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple

try:
    import numpy
    import torch
except ImportError as error:
    sys.exit(f"error: {error}; install PyTorch: https://pytorch.org/get-started/locally")

# Since torch 2.1 a file can be mapped into memory and read without running code that is in it.
SAFE_AND_MAPPED = "mmap" in inspect.signature(torch.load).parameters
# (width, depth): name, --model of DeiT or timm. Sources: MoCo v3's vits.py, DeiT's models.py.
MODELS = {
    (192, 12): ("ViT-Tiny", "deit_tiny_patch16_224"),
    (384, 12): ("ViT-Small", "moco_v3_vit_small_patch16_224"),
    (768, 12): ("ViT-Base", "deit_base_patch16_224"),
    (1024, 24): ("ViT-Large", "vit_large_patch16_224"),
}
# Layers that have a wrong name in the public ViT-L file of MoCo v3's authors.
MISNAMED = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
            "blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}
WANTED = "pass a ViT checkpoint of MoCo v3"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint and what to do about it, in one line."""


def load(path: str) -> Any:
    """Read a checkpoint of torch or safetensors onto the CPU.

    Since torch 2.1 tensors are mapped into memory, and nothing in the file is run. An older torch
    reads in its own way, which runs whatever code the file contains.

    Raises:
        CheckpointError: the file cannot be read, is damaged or contains more than safe types.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":  # after 8 bytes of length a header in JSON
            from safetensors.torch import load_file

            return load_file(path)
        safe = {"weights_only": True, "mmap": _check(path, start)}
        with warnings.catch_warnings(), _harmless_extras():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", **(safe if SAFE_AND_MAPPED else {}))
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.strerror or error}; check the path"
    except Exception as error:  # damaged bytes make the readers raise almost anything
        problem = _reason(error, path)
    raise CheckpointError(f"{path}: {problem}")


def _check(path: str, start: bytes) -> bool:
    """Compare the checksums of a checkpoint; return whether it can be mapped into memory."""
    if start.startswith(b"\x80"):  # a pickle, as torch saved before 1.6: without checksums
        return False
    if not start.startswith(b"PK"):
        what = "no PyTorch checkpoint" if start else "an empty file"
        if start.startswith(b"version https:"):
            what = "a Git LFS pointer, not the file that it stands for"
        elif start.lstrip().startswith(b"<"):
            what = "a web page (HTML)"
        raise CheckpointError(f"this is {what}; download it again")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"damaged (checksum of {damaged}); download it again")
        # torch would map a compressed checkpoint, too, and give wrong numbers without a word.
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _harmless_extras() -> Any:
    """A context in which safe loading takes NumPy's numbers and DeiT's arguments, too."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5
        return contextlib.nullcontext()
    rebuild = numpy.float64().__reduce__()[0]
    harmless = [argparse.Namespace, numpy.dtype, rebuild]
    harmless += {type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"}
    if torch.__version__ >= (2, 6):  # older files have the name that the module had in NumPy 1
        harmless += [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals(harmless)


def _reason(error: Exception, path: str) -> str:
    """Why a reader failed, and what to type next."""
    text = str(error).strip()
    if isinstance(error, ImportError) and "safetensors" in text:
        return "a safetensors file; pip install safetensors"
    if isinstance(error, (ImportError, AttributeError)):  # of an older Python stack than its own
        return f"contains what is not installed here ({text}); convert it where it was made"
    refused = re.search(r"(?:GLOBAL |class '?|Unsupported (?=operand))([\w.]+(?: \d+)?)", text)
    if not refused:
        detail = f"{type(error).__name__}: {text[:100]}".splitlines()[0]
        return f"damaged, cut short or no PyTorch checkpoint ({detail}); download it again"
    old, new = json.dumps(path), json.dumps(f"{path}.weights")
    resave = (f'import torch; c = torch.load({old}, "cpu", weights_only=False); '
              'c = c if isinstance(c, dict) else c.state_dict(); '
              'torch.save({k: v for k, v in c.items() if torch.is_tensor(v) or k == "epoch" or '
              f'k in ("state_dict", "model") and isinstance(v, dict)}}, {new})')
    return (f"contains {refused[1]}, which could run code; if you trust the file, "
            f"type: python -c {shlex.quote(resave)} and pass {path}.weights, which it makes")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that replaces the one at `path` when the block ends, if it is whole.

    It is written beside `path`, flushed to disk and renamed. If the block or the disk fails,
    nothing of it stays, and `path` is as before. The folder is made where it is missing.

    Raises:
        OSError: with a short `strerror`.
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "disk full", path) from error
        raise


def save(content: Dict[str, Any], path: str) -> int:
    """Write a checkpoint to `path`, whole and checked or not at all; return its size in bytes.

    Raises:
        OSError: it could not be written; `path` is as before.
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


class VisionTransformer(NamedTuple):
    """What the names and shapes of its tensors tell about a ViT."""

    title: str  # such as "ViT-Base (width 768, depth 12)"
    input_size: int  # side of an image, in pixels
    model: Optional[str]  # --model of DeiT or timm that it fits
    problem: str  # tensors that are missing, unexpected or of a wrong shape; "" if it is whole


def recognise(weights: Dict[str, torch.Tensor]) -> Optional[VisionTransformer]:
    """Tell which ViT the tensors are of, from names and shapes alone; None if of none.

    A classifier, `head.*`, may be there or not.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()
              if not name.startswith("head.")}
    stem = {name: shape for name, shape in shapes.items() if name.startswith("patch_embed.proj.")}
    convolutional = "patch_embed.proj.0.weight" in stem  # MoCo v3's, in the place of one block
    patch_shape = (0, 0, 16, 16) if convolutional else stem.get("patch_embed.proj.weight", ())
    if len(shapes.get("pos_embed", ())) != 3 or len(patch_shape) != 4:
        return None
    (_, tokens, width), patch = shapes["pos_embed"], patch_shape[3]
    side = math.isqrt(max(tokens - 1, 0))
    full = {size: depth - convolutional for size, depth in MODELS}
    blocks = re.findall(r"^blocks\.(\d+)\.", "\n".join(shapes), re.MULTILINE)
    depth = max([full.get(width, 0), *(1 + int(block) for block in blocks)])
    expected = _shapes_of(width, depth, side)
    expected.update(stem if convolutional else {"patch_embed.proj.weight": (width, 3, patch, patch),
                                                "patch_embed.proj.bias": (width,)})
    problem = _differences(shapes, expected)
    name, model = MODELS.get((width, depth + convolutional), ("ViT", None))
    title = f"{name}{' with a convolutional stem' * convolutional} (width {width}, depth {depth})"
    fits = patch == 16 and not convolutional and not problem
    return VisionTransformer(title, side * patch, model if fits else None, problem)


def _shapes_of(width: int, depth: int, side: int) -> Dict[str, tuple]:
    """Names and shapes of a ViT's tensors, but for its stem and head."""
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
              "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width)}
    for name in ["norm", *(f"blocks.{i}.{layer}" for i in range(depth) for layer in layers)]:
        shape = layers.get(name.split(".", 2)[-1], (width,))
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    return shapes


def _differences(shapes: Dict[str, tuple], expected: Dict[str, tuple]) -> str:
    wrong = [f"{name} is missing" if name not in shapes else
             f"{name} is unexpected" if name not in expected else
             f"{name} is {shapes[name]} instead of {expected[name]}"
             for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    return "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")


def is_sine_cosine(pos_embed: torch.Tensor) -> bool:
    """Whether (1, 1 + side * side, width) is the fixed 2-D table of MoCo v3's vits.py.

    That is zeros for the class token, then sines and cosines of the row and of the column. The
    tolerance of 5e-3 lets bfloat16 pass, and no learned table.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[1] < 2:
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
        OrderedDict of the tensors, not copied, under timm's names in file order, 150 for ViT-Base;
        and in words where they were found.

    Raises:
        CheckpointError: it contains no encoder of MoCo v3, or not exactly a ViT's tensors.
    """
    weights = _tensors_of(checkpoint)
    prefix = _find_prefix(weights)
    encoder = {name[len(prefix):]: tensor for name, tensor in weights.items()
               if name.startswith(prefix) and not name.startswith(prefix + "head.")}
    model = OrderedDict()
    for name, tensor in encoder.items():
        layer, dot, kind = name.rpartition(".")
        right_name = MISNAMED.get(layer, layer) + dot + kind
        model[name if right_name in encoder else right_name] = tensor.detach()
    vit = recognise(model)
    problem = vit.problem if vit else "no pos_embed of 3 or patch_embed.proj of 4 dimensions"
    if problem:
        raise CheckpointError(f"not exactly the tensors of a ViT: {problem}; {WANTED}")
    found = "encoder with MoCo v3's position embedding"
    if prefix.endswith("base_encoder."):
        found = "MoCo v3 pre-training checkpoint"
    renamed = sorted({name.rpartition(".")[0] for name in encoder if name not in model})
    return model, found + (f", renamed its misnamed {', '.join(renamed)}" if renamed else "")


def _tensors_of(checkpoint: Any) -> Dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, without what torch.compile puts into the names."""
    is_dict = isinstance(checkpoint, dict)
    key = next((key for key in ("state_dict", "model") if is_dict and key in checkpoint), None)
    weights = checkpoint[key] if key else checkpoint
    if not isinstance(weights, dict):
        raise CheckpointError(f"a {type(weights).__name__} instead of tensors by name; {WANTED}")
    if key == "model" and len(checkpoint) > 1:
        raise CheckpointError("the checkpoint of a fine-tuning run, which needs no conversion; "
                              "pass it to --resume as it is")
    tensors = [(str(name), tensor) for name, tensor in weights.items() if torch.is_tensor(tensor)]
    vit = recognise(dict(tensors)) if key == "model" else None
    if vit and not vit.problem and is_sine_cosine(weights["pos_embed"]):
        raise CheckpointError("converted already; pass it to --resume as it is")
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors}
    if len(plain) < len(tensors):
        raise CheckpointError(f"the same names with and without _orig_mod.; {WANTED}")
    return plain


def _find_prefix(weights: Dict[str, torch.Tensor]) -> str:
    """What stands in front of the encoder's names, such as "module.base_encoder."."""
    prefixes = [name[:-len("cls_token")] for name in weights
                if re.search(r"(^|\.)cls_token$", name) and "momentum_encoder." not in name]
    encoders = [name for name in prefixes if re.fullmatch(r"(module\.)?base_encoder\.", name)]
    if len(encoders) == 1:
        return encoders[0]
    if len(prefixes) > 1:
        raise CheckpointError(f"several encoders ({', '.join(prefixes)}); {WANTED}")
    if not prefixes:
        resnet = any(name.endswith("layer1.0.conv1.weight") for name in weights)
        what = "a ResNet, and DeiT trains vision transformers only" if resnet else "no ViT"
        raise CheckpointError(f"{what} (no base_encoder, no cls_token in it); {WANTED}")
    table = weights.get(prefixes[0] + "pos_embed")
    if table is None or not is_sine_cosine(table):
        raise CheckpointError("no base_encoder, and a learned position embedding, as supervised "
                              f"models have, instead of MoCo v3's fixed one; {WANTED}")
    return prefixes[0]


def convert_file(source: str, target: str) -> str:
    """Convert the file `source` into the file `target`; return three lines to print.

    Raises:
        CheckpointError: `source` cannot be converted, or `target` cannot be a file's name.
        OSError: `target` could not be written.
    """
    if target.endswith(os.sep) or os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{target}: --output is not a file; name a file")
    checkpoint = load(source)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise CheckpointError(f"{target}: --output is the same file as --input; name another")
    try:
        model, found = convert(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    size, vit = save({"model": model}, target), recognise(model)
    fit = f"No model of DeiT's has this stem or size ({vit.input_size} pixels)."
    if vit.model:
        input_size = "" if vit.input_size == 224 else f" --input-size {vit.input_size}"
        heads = " (12 heads; DeiT's deit_small_patch16_224 has 6)" * ("small" in vit.model)
        fit = f"Fits DeiT's --model {vit.model}{input_size}{heads}."
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(tensor.numel() for name, tensor in model.items() if not name.endswith(buffers))
    return (f"{vit.title}, epoch {checkpoint.get('epoch', 'unknown')}: {found}\n{fit}\n"
            f"{len(model)} tensors, {parameters:,} parameters: {target}, {size / 1e6:.1f} MB")


def main(argv: Optional[List[str]] = None) -> int:
    """The command line. Returns the exit status: 0, 1 with a line on stderr, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint of MoCo v3 (.pth.tar or .safetensors)")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint for DeiT's --resume")
    args = parser.parse_args(argv)
    try:
        print(convert_file(args.input, args.output))
        return 0
    except OSError as error:
        message, status = f"{args.output}: not written: {error.strerror or error}", 1
    except CheckpointError as error:
        message, status = " ".join(str(error).split()), 1
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was written", 130
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
