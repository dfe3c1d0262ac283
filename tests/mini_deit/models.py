"""DeiT's plain transformers and one that trains in seconds, registered with timm."""
from functools import partial

import timm.models.layers  # noqa: F401  DeiT imports from this path, so it has to exist
from timm.models.registry import register_model
from timm.models.vision_transformer import VisionTransformer, _cfg
from torch import nn


def vit(width, depth, heads, options):
    norm = partial(nn.LayerNorm, eps=1e-6)
    net = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads, patch_size=16,
                            mlp_ratio=4, qkv_bias=True, norm_layer=norm, **options)
    net.default_cfg = _cfg()
    return net


@register_model
def deit_micro_patch16_224(pretrained=False, **kwargs):
    return vit(64, 2, 2, kwargs)


@register_model
def deit_tiny_patch16_224(pretrained=False, **kwargs):
    return vit(192, 12, 3, kwargs)


@register_model
def deit_small_patch16_224(pretrained=False, **kwargs):
    return vit(384, 12, 6, kwargs)
