"""MoCo v3's ViT-Small, which has 12 attention heads where DeiT's has 6."""
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

try:
    from timm.models import register_model
except ImportError:  # timm 0.3
    from timm.models.registry import register_model


@register_model
def moco_v3_vit_small_patch16_224(pretrained=False, **kwargs):
    """ViT-Small of MoCo v3 (vits.py, ``vit_small``): width 384, 12 blocks, 12 heads, patch 16.

    Otherwise as ``deit_small_patch16_224``; ``kwargs`` go to timm's VisionTransformer.
    """
    return VisionTransformer(patch_size=16, embed_dim=384, depth=12, num_heads=12, mlp_ratio=4,
                             qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs)
