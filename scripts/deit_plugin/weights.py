"""Pretrained weights into a model: exactly the head may be missing, nothing may be left over."""
import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, register_model

from convert_to_deit import CheckpointError, is_sine_cosine, load, recognise

from .errors import UserError

HEAD = ("head.weight", "head.bias")


@register_model
def moco_v3_vit_small_patch16_224(pretrained=False, **kwargs):
    """MoCo v3's ViT-Small: DeiT's with 12 heads; ``kwargs`` go to timm's VisionTransformer."""
    return VisionTransformer(patch_size=16, embed_dim=384, depth=12, num_heads=12, mlp_ratio=4,
                             qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                             **kwargs)


def read(path):
    """The checkpoint at ``path``: a dict with at least ``model``, a dict of tensors.

    What torch.compile or DDP put into their names is taken away.
    """
    try:
        checkpoint = load(path)
    except CheckpointError as error:
        raise UserError(f"{path}: {error}") from error
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not all(map(torch.is_tensor, model.values())):
        raise UserError(f"{path} is not converted yet: python convert_to_deit.py --input "
                        f"{path} --output CONVERTED.pth, then --resume CONVERTED.pth")
    model = {re.sub(r"(_orig_mod|module)\.", "", name): model[name] for name in model}
    return {**checkpoint, "model": model}


def fit(model, weights, path, model_name):
    """Load ``weights`` (name to tensor) into ``model``.

    Position embeddings of another input size are resampled. Refused is anything but the head that
    is missing, left over or of another shape, and another number of attention heads.
    """
    own, headless = model.state_dict(), weights.keys().isdisjoint(HEAD)
    head = {name: own[name] for name in HEAD if name in own} if headless else {}
    try:
        model.load_state_dict({**resample_position_embedding(weights, own), **head})
    except RuntimeError as error:
        _, fits, _ = recognise(weights)
        advice = f"; pass --model {fits}" if fits not in (None, model_name) else ""
        reason = str(error).splitlines()[1].strip(" \t.")  # after a heading; it may be long
        raise UserError(f"{path} does not fit --model {model_name} with "
                        f"{len(own.get(HEAD[0], ()))} classes: {reason:.200}{advice}") from error
    # The number of heads shows in no shape: wrong, it loads and computes something else. MoCo v3's
    # fixed position embedding gives its ViT-Small away; its others have DeiT's heads.
    table, heads = weights.get("pos_embed"), model.blocks[0].attn.num_heads
    if heads != 12 and is_sine_cosine(table) and table.shape[-1] == 384:
        raise UserError(f"{path} is MoCo v3's ViT-Small with 12 heads, --model {model_name} has "
                        f"{heads}: pass --model moco_v3_vit_small_patch16_224")


def resample_position_embedding(weights, own):
    """Fit ``pos_embed`` (1, 1 + N, width) to the model's input size; the class token is kept.

    Bicubic, as DeiT does under ``--finetune``. Weights that fit already are returned unchanged.
    """
    table, target = weights.get("pos_embed"), own.get("pos_embed")
    if table is None or target is None or table.shape == target.shape or table.dim() != 3:
        return weights
    old, new = (int((tokens.shape[1] - 1) ** 0.5) for tokens in (table, target))
    if table.shape[-1] != target.shape[-1] or old * old + 1 != table.shape[1]:
        return weights
    table = table.float()  # torch 1.9 and 1.13 resample no half precision on the CPU
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return {**weights, "pos_embed": torch.cat([table[:, :1], grid], dim=1)}
