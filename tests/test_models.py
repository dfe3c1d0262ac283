"""The models, against a vision transformer written out from its definition in plain torch."""
import math
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import generate
import moco_v3_vit
import versions
import weights
from conftest import ROOT, saved, train

README = (ROOT / "README.md").read_text()


def vit_features(state, images, heads):
    """Class token after the last layer norm: (B, width) of images (B, 3, H, W), patch 16.

    As in "An Image is Worth 16x16 Words", with MoCo v3's epsilon. state: tensors by timm's names.
    """
    kernel = state["patch_embed.proj.weight"].flatten(1)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    patches = patches.flatten(3).flatten(1, 2)  # (B, N, 3 * 16 * 16)
    x = patches @ kernel.t() + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for number in range(12):
        block = {name.split(".", 2)[2]: value for name, value in state.items()
                 if name.startswith(f"blocks.{number}.")}
        x = x + attention(block, normalise(block, "norm1", x), heads)
        hidden = linear(block, "mlp.fc1", normalise(block, "norm2", x))
        x = x + linear(block, "mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    return normalise(state, "norm", x)[:, 0]


def attention(block, x, heads):
    outputs = []
    for query, key, value in zip(*(part.chunk(heads, dim=-1) for part in
                                   linear(block, "attn.qkv", x).chunk(3, dim=-1))):
        likeness = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        outputs.append(likeness.softmax(dim=-1) @ value)
    return linear(block, "attn.proj", torch.cat(outputs, dim=-1))


def linear(block, name, x):
    return x @ block[f"{name}.weight"].t() + block[f"{name}.bias"]


def normalise(block, name, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    x = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return x * block[f"{name}.weight"] + block[f"{name}.bias"]


def sin_cos(width, side):
    """MoCo v3's position embedding: sines and cosines of the row, then of the column."""
    rates = [10000 ** (-4 * i / width) for i in range(width // 4)]
    rows = [[0.0] * width]  # of the class token
    for row in range(side):
        for column in range(side):
            rows.append([wave(place * rate) for place in (row, column)
                         for wave in (math.sin, math.cos) for rate in rates])
    return torch.tensor([rows])


def lively(state, seed=0):
    """The state with noise everywhere, so that no bias is 0 and no attention uniform."""
    rng = torch.Generator().manual_seed(seed)
    return {name: value + 0.05 * torch.randn(value.shape, generator=rng)
            for name, value in state.items()}


def some_images(size=224):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(features, expected):
    return torch.allclose(features, expected, atol=1e-4)


@pytest.fixture(scope="module")
def moco_v3_small(tmp_path_factory):
    """A MoCo v3 checkpoint of a ViT-Small, and its base encoder's tensors."""
    path = tmp_path_factory.mktemp("moco") / "vit-s.pth.tar"
    checkpoint = generate.moco_checkpoint(path, width=384)
    prefix = "module.base_encoder."
    encoder = lively({name[len(prefix):]: value for name, value in checkpoint["state_dict"].items()
                      if name.startswith(prefix) and ".head." not in name})
    encoder["pos_embed"] = sin_cos(384, 14)
    encoder["cls_token"] *= 0.02  # MoCo v3 starts with less; the layer norm's epsilon counts here
    for name, value in encoder.items():
        checkpoint["state_dict"][prefix + name] = value
    torch.save(checkpoint, path)
    return path, encoder


@torch.no_grad()
def test_converted_vit_small_has_the_features_of_moco_v3(moco_v3_small, tmp_path):
    path, encoder = moco_v3_small
    converted, name = str(tmp_path / "converted.pth"), "moco_v3_vit_small_patch16_224"
    done = subprocess.run([sys.executable, ROOT / "convert_to_deit.py", "--input", path,
                           "--output", converted], stdout=subprocess.PIPE, text=True, check=True)
    assert f"--model {name}" in done.stdout
    model = moco_v3_vit.moco_v3_vit_small_patch16_224(num_classes=0).eval()
    assert weights.load(model, weights.read(converted)["model"], converted, name)
    features = model(some_images())
    assert same(features, vit_features(encoder, some_images(), heads=12))
    assert not same(features, vit_features(encoder, some_images(), heads=6))


def cubic_resampling(old, new):
    """(new, old) matrix of cubic convolution with a = -0.75, which holds the border's values."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += cubic(abs(place - tap))
    return matrix


def cubic(x, a=-0.75):
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


@pytest.mark.parametrize("size", [160, 224, 384])
def test_position_embedding_of_224_fits_another_input_size(size):
    encoder = lively(generate.encoder_state(width=64, depth=1))
    model = VisionTransformer(img_size=size, embed_dim=64, depth=1, num_heads=2, qkv_bias=True,
                              num_classes=0)
    weights.load(model, encoder, "a.pth", "a model")
    before, after = encoder["pos_embed"], model.pos_embed.detach()
    assert torch.equal(after[:, 0], before[:, 0])  # the class token has no place to move
    matrix = cubic_resampling(14, size // 16)
    grid = before[0, 1:].double().reshape(14, 14, 64)
    expected = torch.einsum("ri,cj,ijw->rcw", matrix, matrix, grid).reshape(-1, 64)
    assert torch.allclose(after[0, 1:].double(), expected, atol=1e-6)


def example_for_vit_base():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if "timm.create_model" in block)


@torch.no_grad()
def test_plain_timm_computes_what_was_fine_tuned(data, checkpoint, tmp_path):
    """A run's checkpoint with ViT-Base's weights in it, which would take long to train."""
    train("pets", "--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path,
          "--epochs", "1", processes=1)
    tuned = lively({**generate.encoder_state(width=768, depth=12),
                    "head.weight": torch.zeros(37, 768), "head.bias": torch.zeros(37)})
    folder = tmp_path / "out" / "pets"
    folder.mkdir(parents=True)
    torch.save({**saved(tmp_path / "checkpoint.pth"), "model": tuned},
               folder / "best_checkpoint.pth")
    torch.save(some_images(), tmp_path / "images")
    lines = example_for_vit_base() + "torch.save(model(torch.load('images')), 'logits')"
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    logits = torch.load(tmp_path / "logits")
    features = vit_features(tuned, some_images(), heads=12)
    assert torch.allclose(logits, linear(tuned, "head", features), atol=1e-3)


@pytest.mark.skipif(versions.numbers(timm.__version__) < (0, 9), reason="needs timm 0.9")
@torch.no_grad()
def test_plain_timm_has_moco_v3_vit_small():
    line = re.search(r'`(timm\.create_model\("vit_small[^`]*)`', README).group(1)
    plain = eval(line, {"timm": timm}).eval()
    tuned = moco_v3_vit.moco_v3_vit_small_patch16_224(num_classes=37).eval()
    plain.load_state_dict(tuned.state_dict())
    assert torch.allclose(plain(some_images()), tuned(some_images()), atol=1e-5)
