"""Loading weights, checked: exactly the head may be missing, nothing may be left over."""
import math

import torch
import torch.nn.functional as F

import harmless_load
from failures import Refusal

HEAD = ("head.weight", "head.bias")
MOCO_V3_SMALL = "moco_v3_vit_small_patch16_224"  # of moco_v3_vit.py
MOCO_V3_HEADS = 12  # in all its vision transformers (MoCo v3's vits.py), also in the 384 wide


def read(path, flag="--resume"):
    """The checkpoint at ``path``: a dict with at least ``model``, a dict of tensors.

    Raises Refusal if it is missing, unreadable, or of another kind; ``flag`` is what named it.
    """
    if path.startswith(("http:", "https:")):
        raise Refusal(f"{flag} {path}: download the file first, then pass its path")
    try:
        with open(path, "rb"):
            checkpoint = harmless_load.load(path)
    except OSError as error:
        raise Refusal(f"{flag} {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever hostile or broken bytes make torch raise
        raise Refusal(f"{path} cannot be read as a checkpoint, it is damaged or something else "
                      f"({_first_line(error)}); copy or convert it again") from error
    _check_kind(checkpoint, path)
    return checkpoint


def _first_line(error):
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0][:150]


def _check_kind(checkpoint, path):
    if isinstance(checkpoint, dict) and "state_dict" in checkpoint:
        raise Refusal(f"{path} is not converted yet: python convert_to_deit.py --input {path} "
                      "--output CONVERTED.pth, then --resume CONVERTED.pth")
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not model:
        raise Refusal(f"{path} holds no 'model': pass what convert_to_deit.py wrote, or a "
                      "checkpoint of a fine-tuning run")
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Refusal(f"{path}: model[{name!r:.80}] is no tensor but {type(value).__name__}; "
                          "pass what convert_to_deit.py wrote")
        if not _is_whole(value):
            raise Refusal(f"{path}: model[{name!r:.80}] has fewer numbers than its shape says; "
                          "pass what convert_to_deit.py wrote")


def _is_whole(tensor):
    """Whether it has a number in memory for each it shows, not a few that repeat without end."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return False
    untyped = hasattr(tensor, "untyped_storage")  # since torch 2.0, where storage() warns
    storage = tensor.untyped_storage() if untyped else tensor.storage()
    shown = math.prod(tensor.shape) * tensor.element_size()
    return shown <= storage.size() * storage.element_size()


def load(model, weights, path, model_name, head_may_miss=True):
    """Load ``weights`` (name to tensor) into ``model``; return whether the head was missing.

    Position embeddings of another input size are resampled. Raises Refusal if anything but the
    head is missing, left over or of another shape, or if the attention heads differ.
    """
    own = model.state_dict()
    _check_attention_heads(model, weights, path, model_name)
    weights = resample_position_embedding(weights, own)
    headless = not any(name in weights for name in HEAD)
    if headless and not head_may_miss:
        raise Refusal(f"{path} has no classifier head, so there is nothing to evaluate: pass a "
                      "checkpoint of a fine-tuning run")
    if headless:
        weights = {**weights, **{name: own[name] for name in HEAD if name in own}}
    _check_classes(own, weights, path)
    problem = _difference(own, weights)
    if problem:
        raise Refusal(f"{path} does not fit --model {model_name}: {problem}{_advice(weights)}")
    model.load_state_dict(weights)
    return headless


def _check_classes(own, weights, path):
    head = HEAD[0]
    if head in own and head in weights and len(own[head]) != len(weights[head]):
        raise Refusal(f"{path} has a classifier head of {len(weights[head])} classes, not of "
                      f"{len(own[head])}: it was fine-tuned on another --data-set")


def _difference(own, weights):
    missing = [name for name in own if name not in weights]
    if missing:
        return f"{len(missing)} tensors are missing, the first is {missing[0]}"
    left_over = [name for name in weights if name not in own]
    if left_over:
        return f"{len(left_over)} tensors are left over, the first is {left_over[0]!r:.80}"
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return None


def _advice(weights):
    """Which ``--model`` the weights are of, as far as their shapes tell."""
    if "patch_embed.proj.0.weight" in weights:
        return "; it has a convolutional stem, of which DeiT has no model"
    width = next(reversed(weights["cls_token"].shape), None) if "cls_token" in weights else None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    name = {192: "deit_tiny_patch16_224", 384: MOCO_V3_SMALL,
            768: "deit_base_patch16_224"}.get(width if depth == 12 else None)
    if name is None:
        return f"; it is {width} wide and {depth} blocks deep"
    return f"; its shape is that of --model {name}"


def _check_attention_heads(model, weights, path, model_name):
    """The number of heads shows in no shape: wrong, it loads and computes something else.

    MoCo v3's fixed position embedding gives its ViT-Small away; its others have DeiT's heads.
    """
    table = weights.get("pos_embed")
    if table is None or table.dim() != 3 or table.shape[-1] != 384 or not _is_sin_cos(table):
        return
    blocks = getattr(model, "blocks", None)
    heads = blocks[0].attn.num_heads if blocks and hasattr(blocks[0], "attn") else MOCO_V3_HEADS
    if heads != MOCO_V3_HEADS:
        raise Refusal(f"{path} is MoCo v3's ViT-Small with {MOCO_V3_HEADS} heads, --model "
                      f"{model_name} has {heads}: pass --model {MOCO_V3_SMALL}")


def _is_sin_cos(table):
    """Whether (1, 1 + side * side, width) is MoCo v3's 2-D sine-cosine table.

    Its first column is sin(x) for the grid's coordinate x = 0, 1, 2 ...
    """
    side = _side(table)
    column = table[0, 1:, 0].float()
    expected = torch.sin(torch.arange(side, dtype=torch.float32)).repeat_interleave(side)
    return column.shape == expected.shape and bool(torch.allclose(column, expected, atol=1e-3))


def _side(table):
    return int(max(table.shape[1] - 1, 0) ** 0.5)


def resample_position_embedding(weights, own):
    """Fit ``pos_embed`` (1, 1 + N, width) to the model's input size; the class token is kept.

    Bicubic, as DeiT does under ``--finetune``. Weights that fit already are returned unchanged.
    """
    table, target = weights.get("pos_embed"), own.get("pos_embed")
    if table is None or target is None or table.shape == target.shape or table.dim() != 3:
        return weights
    old, new = _side(table), _side(target)
    if table.shape[-1] != target.shape[-1] or old * old + 1 != table.shape[1]:
        return weights
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return {**weights, "pos_embed": torch.cat([table[:, :1], grid], dim=1)}
