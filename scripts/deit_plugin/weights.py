"""Pretrained weights into a model, checked: exactly the head may be missing, nothing be left over."""
import torch
import torch.nn.functional as F

from convert_to_deit import CheckpointError, is_sine_cosine, load, recognise

from .errors import UserError

HEAD = ("head.weight", "head.bias")
MOCO_V3_SMALL_WIDTH, MOCO_V3_HEADS = 384, 12  # MoCo v3's vits.py, vit_small; DeiT's has 6 heads


def read(path):
    """The checkpoint at ``path``: a dict with at least ``model``, a dict of tensors.

    Raises UserError if it is missing, unreadable, or of another kind.
    """
    if path.startswith(("http:", "https:")):
        raise UserError(f"--resume {path}: download the file first, then pass its path")
    try:
        checkpoint = load(path)
    except CheckpointError as error:
        raise UserError(f"--resume {error}") from error
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if isinstance(model, dict) and model and all(map(torch.is_tensor, model.values())):
        return checkpoint
    raise UserError(f"--resume {path} is not converted yet: python convert_to_deit.py --input "
                    f"{path} --output CONVERTED.pth, then --resume CONVERTED.pth")


def fit(model, weights, path, model_name, head_may_miss=True):
    """Load ``weights`` (name to tensor) into ``model``; return whether the head was missing.

    Position embeddings of another input size are resampled. Raises UserError if anything but the
    head is missing, left over or of another shape, or if the attention heads differ.
    """
    own = model.state_dict()
    _check_attention_heads(model, weights, path, model_name)
    weights = resample_position_embedding(weights, own)
    headless = not any(name in weights for name in HEAD)
    if headless and not head_may_miss:
        raise UserError(f"--resume {path} has no classifier head, so there is nothing to evaluate: "
                        "pass a checkpoint of a fine-tuning run")
    if headless:
        weights = {**weights, **{name: own[name] for name in HEAD if name in own}}
    _check_classes(own, weights, path)
    difference = _difference(own, weights)
    if difference:
        raise UserError(f"--resume {path} does not fit --model {model_name}: {difference}"
                        f"{_advice(weights, model_name)}")
    model.load_state_dict(weights)
    return headless


def _check_classes(own, weights, path):
    head = HEAD[0]
    if head in own and head in weights and len(own[head]) != len(weights[head]):
        raise UserError(f"--resume {path} has a classifier head of {len(weights[head])} classes, "
                        f"not of {len(own[head])}: it was fine-tuned on another --data-set")


def _difference(own, weights):
    missing = [name for name in own if name not in weights]
    if missing:
        prefix = _prefix(weights)
        found = f"; its names begin with {prefix!r}: take that away from each" if prefix else ""
        return f"{len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}{found}"
    left_over = [name for name in weights if name not in own]
    if left_over:
        return f"{len(left_over)} left over, the first is {left_over[0]!r:.80}"
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return None


def _prefix(weights):
    """What stands before the expected names, as ``module.`` or torch.compile's ``_orig_mod.``."""
    return next((name[:-len("cls_token")] for name in weights if name.endswith("cls_token")), "")


def _advice(weights, model_name):
    """The ``--model`` that the weights are of, as far as names and shapes tell."""
    vit = recognise(weights)
    fits = vit.model if vit else None
    return f"; pass --model {fits}" if fits not in (None, model_name) else ""


def _check_attention_heads(model, weights, path, model_name):
    """The number of heads shows in no shape: wrong, it loads and computes something else.

    MoCo v3's fixed position embedding gives its ViT-Small away; its others have DeiT's heads.
    """
    table = weights.get("pos_embed")
    if table is None or table.shape[-1] != MOCO_V3_SMALL_WIDTH or not is_sine_cosine(table):
        return
    blocks = getattr(model, "blocks", None)
    heads = blocks[0].attn.num_heads if blocks and hasattr(blocks[0], "attn") else MOCO_V3_HEADS
    if heads != MOCO_V3_HEADS:
        raise UserError(f"--resume {path} is MoCo v3's ViT-Small with {MOCO_V3_HEADS} heads, --model "
                        f"{model_name} has {heads}: pass --model {recognise(weights).model}")


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
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return {**weights, "pos_embed": torch.cat([table[:, :1], grid], dim=1)}
