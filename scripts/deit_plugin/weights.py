"""Loads pretrained weights into a model: only the head may be missing, nothing may be left over."""
import os
import re
from argparse import Namespace
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import is_model
from timm.models.vision_transformer import VisionTransformer, register_model

from convert_to_deit import (
    CheckpointError,
    compare_shapes,
    is_sine_cosine,
    load,
    recognise,
    require_finite,
)
from datasets import DATA_SETS, load_photo, read_image

from . import deit
from .errors import UserError, one_line
from .flags import implied_input_size

HEAD = ("head.weight", "head.bias")
# Width and number of heads of models that need no DeiT checkout. Source: DeiT's models.py.
DEIT_MODELS = {"deit_tiny_patch16_224": (192, 3), "deit_small_patch16_224": (384, 6),
               "deit_base_patch16_224": (768, 12), "moco_v3_vit_small_patch16_224": (384, 12)}


@register_model
def moco_v3_vit_small_patch16_224(pretrained=False, **kwargs):
    """MoCo v3's ViT-Small: DeiT's with 12 heads; ``kwargs`` go to timm's VisionTransformer."""
    return _vision_transformer("moco_v3_vit_small_patch16_224", **kwargs)


def _vision_transformer(name: str, **kwargs: Any) -> VisionTransformer:
    width, heads = DEIT_MODELS[name]
    return VisionTransformer(patch_size=16, embed_dim=width, depth=12, num_heads=heads, mlp_ratio=4,
                             qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                             **kwargs)


def create(name: str, input_size: int, make: Callable, **kwargs: Any) -> torch.nn.Module:
    """Create a model for that input size by ``make(name, **kwargs)``. Raises UserError."""
    # DeiT's two older commits do not pass the input size on.
    kwargs["img_size"] = None if input_size == implied_input_size(name) else input_size
    try:
        return make(name, **kwargs)
    except Exception as error:  # timm raises almost anything
        raise UserError(f"--model {name}: DeiT and timm cannot create it for --input-size "
                        f"{input_size}: {one_line(error)}; pass deit_base_patch16_224, which the "
                        "recipes use, or another ViT") from error


class Finished(NamedTuple):
    """A fine-tuned model, with what it takes to use it."""

    model: torch.nn.Module  # in evaluation mode, on the CPU
    classes: List[str]  # by label
    settings: Dict[str, Any]  # of its run
    loader: Callable  # (path) -> image
    transform: Callable  # (image) -> tensor


def finished(path: str, trust: bool = False) -> Finished:
    """Create the model in the checkpoint of a run. Raises UserError.

    Models that only DeiT has need a DeiT checkout, named by DEIT_DIR.
    """
    state = read(path, trust)
    settings, classes = state.get("settings"), state.get("classes")
    if not settings or not classes or not has_head(state["model"]):
        raise UserError(f"{path} is not the checkpoint of a run of this bundle: pass the "
                        "best_checkpoint.pth of an --output_dir")
    transform = DATA_SETS[settings["data_set"]].transform(False, Namespace(**settings))
    model = create(settings["model"], settings["input_size"], make, num_classes=len(classes))
    load_into(model, state["model"], path, settings["model"])
    # Photos come as they are, also to a model that was trained on prepared images.
    return Finished(model.eval(), classes, settings, partial(read_image, load_photo), transform)


def make(name: str, **kwargs: Any) -> torch.nn.Module:
    """A model for ``create``, by timm, or by DeiT if only DeiT has it."""
    if name in DEIT_MODELS:
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return _vision_transformer(name, **kwargs)
    if not is_model(name):
        deit.import_main()  # registers DeiT's models
    return deit.make_model(name, **kwargs)


def read(path: str, trust: bool = False) -> Dict[str, Any]:
    """The checkpoint at ``path``: a dict with at least ``model``, a dict of tensors by name.

    Parts of names that torch.compile or DDP added are removed. Raises UserError.
    """
    try:
        checkpoint = load(path, trust)
        model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
        if not isinstance(model, dict) or not all(map(torch.is_tensor, model.values())):
            raise UserError(f"{path} is not converted yet: python convert_to_deit.py --input "
                            f"{path} --output CONVERTED.pth, then --resume CONVERTED.pth")
        require_finite(model)
    except CheckpointError as error:
        other = os.path.join(os.path.dirname(path), "checkpoint.pth")
        there = not os.path.exists(path) and os.path.exists(other)  # --eval-freq 0 names no best
        raise UserError(f"{path}: {error}" + f"; {other} is there" * there) from error
    return _with_plain_names(checkpoint)


def read_again(path: str, mark: List[int], trust: bool) -> Dict[str, Any]:
    """What ``read`` has verified, without verifying it again.

    Raises OSError if the file is not the one that had that ``mark_of``.
    """
    if mark_of(path) != mark:
        raise OSError(f"{path} was replaced while this run was starting: launch again")
    return _with_plain_names(load(path, trust, verify=False))


def mark_of(path: str) -> List[int]:
    """Size and time of change of a file: other numbers mean that it was replaced."""
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns]


def _with_plain_names(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    model = checkpoint["model"]
    return {**checkpoint, "model": {re.sub(r"(_orig_mod|module)\.", "", name): model[name]
                                    for name in model}}


def has_head(weights: Dict[str, torch.Tensor]) -> bool:
    """Whether the tensors contain a classifier."""
    return HEAD[0] in weights


def load_into(model: torch.nn.Module, weights: Dict[str, torch.Tensor], path: str,
              model_name: str) -> None:
    """Load ``weights``, tensors by name, from the checkpoint at ``path`` into ``model``.

    Position embeddings of another input size are resampled. A head is left as it is if the weights
    have none. Raises UserError if any other tensor is missing, if any tensor is left over or has
    another shape, or if the number of attention heads is wrong.
    """
    own, headless = model.state_dict(), weights.keys().isdisjoint(HEAD)
    head = {name: own[name] for name in HEAD if name in own} if headless else {}
    tensors = {**resample_position_embedding(weights, own), **head}
    problem = compare_shapes(*({name: tuple(tensor.shape) for name, tensor in state.items()}
                               for state in (tensors, own)))
    if problem:
        fits = recognise(weights).model
        advice = f"; pass --model {fits}" if fits not in (None, model_name) else ""
        if not headless and fits == model_name:
            advice = "; pass pretrained weights, which have no classifier head"
        raise UserError(f"{path} does not fit --model {model_name} with "
                        f"{len(own.get(HEAD[0], ()))} classes: {problem}{advice}")
    model.load_state_dict(tensors)
    # No shape shows the number of heads: with another number, the weights would load and compute
    # nonsense. MoCo v3's fixed position embedding identifies its ViT-Small; its other models have
    # DeiT's numbers of heads.
    embedding, heads = weights.get("pos_embed"), model.blocks[0].attn.num_heads
    if heads != 12 and is_sine_cosine(embedding) and embedding.shape[-1] == 384:
        raise UserError(f"{path} is MoCo v3's ViT-Small with 12 heads, --model {model_name} has "
                        f"{heads}: pass --model moco_v3_vit_small_patch16_224")


def resample_position_embedding(weights: Dict[str, torch.Tensor], own: Dict[str, torch.Tensor]
                                ) -> Dict[str, torch.Tensor]:
    """Fit ``pos_embed`` (1, 1 + N, width) to the model's input size; the class token is kept.

    Bicubic, as DeiT does under ``--finetune``. Weights that fit already are returned unchanged.
    """
    found, wanted = weights.get("pos_embed"), own.get("pos_embed")
    if found is None or wanted is None or found.shape == wanted.shape or found.dim() != 3:
        return weights
    old, new = (int((tokens.shape[1] - 1) ** 0.5) for tokens in (found, wanted))
    if found.shape[-1] != wanted.shape[-1] or old * old + 1 != found.shape[1]:
        return weights
    found = found.float()  # torch 1.9 and 1.13 resample no half precision on the CPU
    grid = found[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return {**weights, "pos_embed": torch.cat([found[:, :1], grid], dim=1)}
