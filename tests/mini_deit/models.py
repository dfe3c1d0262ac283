"""DeiT's smallest transformer and one that trains in seconds, registered with timm."""
from functools import partial

from timm.models.registry import register_model  # as in DeiT, by a name that timm has moved
from timm.models.vision_transformer import VisionTransformer
from torch import nn

vit = partial(VisionTransformer, patch_size=16, mlp_ratio=4, qkv_bias=True,
              norm_layer=partial(nn.LayerNorm, eps=1e-6))


@register_model
def deit_micro_patch16_224(pretrained=False, **kwargs):
    return vit(embed_dim=64, depth=2, num_heads=2, **kwargs)


@register_model
def deit_tiny_patch16_224(pretrained=False, **kwargs):
    return vit(embed_dim=192, depth=12, num_heads=3, **kwargs)
