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
import pickle
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

# Since torch 2.1 a checkpoint can be mapped into memory and be read without running its code.
SAFE_AND_MAPPED = "mmap" in inspect.signature(torch.load).parameters

# (width, depth): name, DeiT's or timm's --model. Sources: vits.py of MoCo v3, models.py of DeiT.
MODELS = {
    (192, 12): ("ViT-Tiny", "deit_tiny_patch16_224"),
    (384, 12): ("ViT-Small", "moco_v3_vit_small_patch16_224"),
    (768, 12): ("ViT-Base", "deit_base_patch16_224"),
    (1024, 24): ("ViT-Large", "vit_large_patch16_224"),
}
# In the public ViT-L file of MoCo v3's authors four layers of two blocks are misnamed.
MISNAMED = {
    "blocks.13.norm13": "blocks.13.norm1",
    "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
    "blocks.14.norm14": "blocks.14.norm2",
    "blocks.14.mlp.fc14": "blocks.14.mlp.fc2",
}
WANTED = "pass a MoCo v3 checkpoint of a ViT"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint and what to do about it, in one line."""


def load(path: str) -> Any:
    """Read a checkpoint of torch or safetensors onto the CPU.

    Tensors are mapped into memory, and nothing in the file is run, where torch can do both (2.1).
    An older torch reads it in its own way, which runs whatever code the file contains.

    Raises:
        CheckpointError: the file cannot be read, is damaged or contains more than safe types.
    """
    try:
        kind = _kind_of(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "safetensors":
                return _load_safetensors(path)
            return _load_torch(path, can_map=kind == "zip" and _check_zip(path))
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path") from error
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise CheckpointError(f"{path}: {_reason(error, path)}") from error


def _kind_of(path: str) -> str:
    """One of "zip" (torch since 1.6), "pickle" (torch before), "safetensors", by content."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    if start[8:9] == b"{" or path.endswith(".safetensors"):  # 8 bytes of length, then JSON
        return "safetensors"
    looks_like = "no PyTorch checkpoint"
    if not start:
        looks_like = "an empty file"
    elif start.startswith(b"version https:"):
        looks_like = "a Git LFS pointer, not the file that it stands for"
    elif start.lstrip().startswith(b"<"):
        looks_like = "a web page (HTML)"
    raise CheckpointError(f"{path}: this is {looks_like}; download it again")


def _check_zip(path: str) -> bool:
    """Compare all checksums; return whether the tensors can be mapped (are not compressed)."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path}: damaged (checksum of {damaged}); download it again")
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _load_torch(path: str, can_map: bool) -> Any:
    if not SAFE_AND_MAPPED:
        return torch.load(path, map_location="cpu")
    with _harmless_extras():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)


def _harmless_extras() -> Any:
    """A context in which safe loading takes NumPy's numbers and DeiT's arguments too."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5
        return contextlib.nullcontext()
    rebuild = numpy.float64().__reduce__()[0]
    harmless = [argparse.Namespace, numpy.dtype, rebuild]
    harmless += {type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"}
    if torch.__version__ >= (2, 6):  # NumPy 2 has renamed the module that older files name
        harmless += [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals(harmless)


def _load_safetensors(path: str) -> Dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: a safetensors file; pip install safetensors") from error
    return load_file(path)


def _reason(error: Exception, path: str) -> str:
    """Why a reader failed, and what to type next."""
    refused = re.search(r"(?:GLOBAL|Unsupported class|Unsupported operand) (\S+)", str(error))
    if not refused or not isinstance(error, pickle.UnpicklingError):
        first_line = str(error).strip().split("\n")[0][:100]
        return (f"damaged, cut short or no PyTorch checkpoint ({type(error).__name__}: "
                f"{first_line}); download it again")
    weights = f"{path}.weights"
    resave = (f"import torch; c = torch.load({json.dumps(path)}, 'cpu', weights_only=False); "
              "c = c if isinstance(c, dict) else c.state_dict(); torch.save({k: v for k, v in "
              "c.items() if torch.is_tensor(v) or k in ('state_dict', 'model', 'epoch')}, "
              f"{json.dumps(weights)})")
    return (f"contains {refused.group(1)}, and loading that could run code; if you trust the file, "
            f"take its weights out and pass {weights}: python -c "
            + shlex.quote(resave.replace("'", '"')))


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that is at `path` only when the block has ended, and then whole.

    It is written beside `path`, flushed to disk and renamed. If the block or the disk fails,
    nothing of it stays, and `path` is as before. The folder is made where it is missing.

    Raises:
        OSError: with a short `strerror`.
    """
    path = os.path.realpath(path)  # what a symbolic link points to is replaced, not the link
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
        OSError: it could not be written; the file that was at `path` is still there.
    """
    with whole_file(path) as file:
        _save_torch(content, file)
        with zipfile.ZipFile(file) as written:
            if written.testzip():
                raise OSError(errno.EIO, "the disk gave back other bytes than were written", path)
        return file.seek(0, os.SEEK_END)


def _save_torch(content: Dict[str, Any], file: BinaryIO) -> None:
    if not SAFE_AND_MAPPED:  # torch before 2.0 aborts the process when a write fails
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file.write(buffer.getbuffer())
        return
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None  # a full disk or Ctrl-C, of which torch makes its own


class VisionTransformer(NamedTuple):
    """What names and shapes of tensors tell about a ViT."""

    name: str  # such as "ViT-Base"; "ViT" where MoCo v3 has none of this size
    width: int
    depth: int
    patch: int  # pixels
    tokens: int  # with the class token
    stem: bool  # whether it begins with MoCo v3's convolutional stem
    model: Optional[str]  # DeiT's or timm's --model for it
    problem: str  # missing, unexpected and misshapen tensors, or ""

    @property
    def input_size(self) -> int:
        """Pixels of a side of the images that it takes."""
        return math.isqrt(max(self.tokens - 1, 0)) * self.patch


def recognise(weights: Dict[str, Any]) -> Optional[VisionTransformer]:
    """Tell which ViT the tensors are of, by names and shapes alone; None if of none.

    The classifier, `head.*`, may be there or not. A model is named only where nothing is missing,
    unexpected or of another shape.
    """
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in weights.items()
              if not name.startswith("head.")}
    stem = "patch_embed.proj.0.weight" in shapes
    patches = (0, 0, 16, 16) if stem else shapes.get("patch_embed.proj.weight", ())
    position = shapes.get("pos_embed", ())
    if len(position) != 3 or len(patches) != 4 or "cls_token" not in shapes:
        return None
    (_, tokens, width), patch = position, patches[-1]
    blocks = [int(block) for block in re.findall(r"^blocks\.(\d+)\.", "\n".join(shapes), re.M)]
    depth = max(blocks, default=-1) + 1
    problem = _differences(shapes, _expected_shapes(width, depth, patch, tokens, stem))
    name, model = MODELS.get((width, depth + stem), ("ViT", None))  # the stem is for one block
    fits = not stem and patch == 16 and not problem
    return VisionTransformer(name, width, depth, patch, tokens, stem, model if fits else None,
                             problem)


def _expected_shapes(width: int, depth: int, patch: int, tokens: int, stem: bool) -> dict:
    """Names and shapes of MoCo v3's ViT (vits.py) without its head."""
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
              "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    weights = {f"blocks.{i}.{layer}": layers[layer] for i in range(depth) for layer in layers}
    weights["norm"] = (width,)
    last = "patch_embed.proj.12" if stem else "patch_embed.proj"
    weights[last] = (width, width, 1, 1) if stem else (width, 3, patch, patch)
    side = math.isqrt(max(tokens - 1, 0))
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width)}
    for stage in range(4 if stem else 0):
        inputs, outputs = (width * 2**stage // 16 if stage else 3), width * 2**stage // 8
        shapes[f"patch_embed.proj.{3 * stage}.weight"] = (outputs, inputs, 3, 3)
        norm = f"patch_embed.proj.{3 * stage + 1}"
        weights[norm] = shapes[f"{norm}.running_mean"] = shapes[f"{norm}.running_var"] = (outputs,)
        shapes[f"{norm}.num_batches_tracked"] = ()
    for name, shape in weights.items():
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    return shapes


def _differences(shapes: dict, expected: dict) -> str:
    misshapen = [f"{name} is {shapes[name]}, not {expected[name]}" for name in expected
                 if shapes.get(name, expected[name]) != expected[name]]
    kinds = {"missing ": [name for name in expected if name not in shapes],
             "unexpected ": [name for name in shapes if name not in expected], "": misshapen}
    return "; ".join(kind + _first(names) for kind, names in kinds.items() if names)


def _first(names: List[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_sine_cosine(pos_embed: torch.Tensor) -> bool:
    """Whether (1, 1 + side * side, width) is the fixed 2-D table of MoCo v3's vits.py.

    Zeros for the class token, then sines and cosines of the row and of the column. A tolerance of
    1e-3 lets half precision pass, and no learned table.
    """
    side = math.isqrt(max(pos_embed.shape[1] - 1, 0)) if pos_embed.dim() == 3 else 0
    if side == 0 or pos_embed.shape[1] != 1 + side * side or pos_embed.shape[2] % 4:
        return False
    quarter = pos_embed.shape[2] // 4
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(quarter) / float(quarter))
    row, column = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    table = torch.cat([torch.zeros(1, 4 * quarter), table])
    return torch.allclose(pos_embed[0].detach().float(), table, rtol=0, atol=1e-3)


def convert(checkpoint: Dict[str, Any]) -> Tuple[Dict[str, torch.Tensor], str]:
    """Take MoCo v3's encoder without its head out of a checkpoint or a state_dict.

    Returns:
        OrderedDict of the tensors under timm's names in file order, 150 for ViT-Base, copied only
        where one is a part of a larger storage; and in words what they were found in.

    Raises:
        CheckpointError: it contains no encoder of MoCo v3, or not exactly a ViT's tensors.
    """
    weights = _state_dict(checkpoint)
    prefix = _find_prefix(weights)
    encoder = {name[len(prefix):]: tensor for name, tensor in weights.items()
               if name.startswith(prefix) and not name.startswith(prefix + "head.")}
    model = OrderedDict((_right_name(name), _plain_tensor(name, tensor))
                        for name, tensor in encoder.items())
    vit = recognise(model)
    problem = vit.problem if vit else "no pos_embed of 3 or patch_embed.proj of 4 dimensions"
    if problem or len(model) < len(encoder):
        raise CheckpointError(f"not exactly the tensors of a ViT: {problem or MISNAMED}; {WANTED}")
    found = "encoder with MoCo v3's position embedding"
    if prefix.endswith("base_encoder."):
        found = "MoCo v3 pre-training checkpoint"
    renamed = [name for name in encoder if name not in model]
    return model, found + (f", renamed the misnamed {', '.join(renamed)}" if renamed else "")


def _state_dict(checkpoint: Any) -> Dict[str, Any]:
    """The tensors of a checkpoint by name, without what torch.compile puts into the names."""
    weights = checkpoint
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict):
        weights = checkpoint["model"]
        if len(checkpoint) > 1:
            raise CheckpointError("the checkpoint of a fine-tuning run, which needs no conversion; "
                                  "pass it to --resume as it is")
        vit = recognise(weights)
        if vit and is_sine_cosine(weights["pos_embed"]):
            raise CheckpointError("converted already; pass it to --resume as it is")
    elif isinstance(checkpoint, dict) and "state_dict" in checkpoint:
        weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"a {type(weights).__name__}, no state_dict of names and tensors; "
                              + WANTED)
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    if len(plain) < len(weights):
        raise CheckpointError(f"names are there with and without _orig_mod.; {WANTED}")
    return plain


def _find_prefix(weights: Dict[str, Any]) -> str:
    """What stands in front of the encoder's names, such as "module.base_encoder."."""
    prefixes = [name[:-len("cls_token")] for name in weights
                if re.search(r"(^|\.)cls_token$", name) and "momentum_encoder." not in name]
    encoders = [prefix for prefix in prefixes if re.fullmatch(r"(module\.)?base_encoder\.", prefix)]
    if len(encoders) == 1:
        return encoders[0]
    if len(prefixes) > 1:
        raise CheckpointError(f"several encoders, named {_first(prefixes)}; {WANTED}")
    if not prefixes:
        resnet = any(re.search(r"(^|\.)layer1\.0\.conv1\.weight$", name) for name in weights)
        what = "a ResNet, and DeiT trains vision transformers only" if resnet else "no ViT in it"
        raise CheckpointError(f"{what} (no base_encoder, no cls_token); {WANTED}")
    table = weights.get(prefixes[0] + "pos_embed")
    if not isinstance(table, torch.Tensor) or not is_sine_cosine(table):
        raise CheckpointError("its position embedding is not MoCo v3's fixed one but learned, as "
                              f"in supervised models, and there is no base_encoder; {WANTED}")
    return prefixes[0]


def _right_name(name: str) -> str:
    layer, dot, kind = name.rpartition(".")
    return MISNAMED.get(layer, layer) + dot + kind


def _plain_tensor(name: str, tensor: Any) -> torch.Tensor:
    """The tensor without gradient, copied if saving it would save a larger storage with it."""
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name} is no tensor but a {type(tensor).__name__}; {WANTED}")
    tensor = tensor.detach()
    typed = not hasattr(tensor, "untyped_storage")  # torch before 2.0
    stored = len(tensor.storage()) if typed else (
        tensor.untyped_storage().nbytes() // tensor.element_size())
    return tensor.clone() if stored > tensor.numel() else tensor


def convert_file(source: str, target: str) -> str:
    """Convert the file `source` into the file `target`; return what to tell about it.

    Raises:
        CheckpointError: `source` cannot be converted, or `target` is no name for a file.
        OSError: `target` could not be written.
    """
    if target.endswith(os.sep) or (os.path.exists(target) and not os.path.isfile(target)):
        raise CheckpointError(f"{target}: --output is no file; name a file")
    checkpoint = load(source)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise CheckpointError(f"{target}: --output is the same file as --input; name another")
    try:
        model, found = convert(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    size = save({"model": model}, target)
    vit = recognise(model)
    stem = " with a convolutional stem" if vit.stem else ""
    epoch = f", epoch {checkpoint['epoch']}" if isinstance(checkpoint.get("epoch"), int) else ""
    parameters = sum(tensor.numel() for name, tensor in model.items()
                     if not name.endswith(("running_mean", "running_var", "num_batches_tracked")))
    return (f"{vit.name}{stem} (width {vit.width}, depth {vit.depth}) of a {found}{epoch}\n"
            f"{len(model)} tensors, {parameters:,} parameters, {size / 1e6:.1f} MB: {target}\n"
            + _advice(vit))


def _advice(vit: VisionTransformer) -> str:
    if not vit.model:
        return f"DeiT has no such model (patch size {vit.patch}, {vit.tokens} tokens)."
    size = "" if vit.tokens == 197 else f" --input-size {vit.input_size}"
    heads = " (12 heads; DeiT's own deit_small_patch16_224 has 6)" if vit.width == 384 else ""
    return f"Fits DeiT's --model {vit.model}{size}{heads}."


def main(argv: Optional[List[str]] = None) -> int:
    """The command line. Returns the exit status: 0, 1 with one line on stderr, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint of MoCo v3, .pth.tar or .safetensors")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="PATH",
                        help="checkpoint for DeiT's --resume")
    args = parser.parse_args(argv)
    try:
        print(convert_file(args.input, args.output))
        return 0
    except OSError as error:
        message = f"{args.output}: not written: {error.strerror or error}"
    except CheckpointError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
