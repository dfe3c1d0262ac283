"""The recipe is the same recipe on every stack and every DeiT, measured in a real run."""
import json

import numpy as np
import pytest
import torch
from timm.data.mixup import rand_bbox

import generate
from conftest import ERAS, TIMM, expected_rates, fork

# Of the pictures that generate.py makes, at 112 pixels: the same on Python 3.8 with torch 1.7.1,
# timm 0.3.2 and Pillow 10.4 as on Python 3.13 with torch 2.15, timm 1.0.31 and Pillow 13.
IMAGES = {"train": ["64d70d92e37fdb0a", "3732fded1634b3ae", "f6a6bcc5cbc691b7"],
          "test": ["d54fc11932134da2", "174a52c4eeaf611c", "fe0a3a4a971c99ba"]}
LOSSES = [3.589152, 3.585391, 2.904437]  # mean over 3 steps each; those stacks agree to 1e-5
EPOCHS, WARMUP, PEAK = 100, 3, 6e-4


@pytest.fixture(scope="module", params=[
    pytest.param(era, marks=[] if era == ERAS[-1] else pytest.mark.slow) for era in ERAS])
def facts(request, data, tmp_path_factory):
    """What recipe_facts.py notes of the Pets recipe with ViT-Tiny, from given weights."""
    folder = tmp_path_factory.mktemp("facts")
    weights = generate.encoder_state(width=192, depth=12)
    rng = torch.Generator().manual_seed(1)
    weights.update({"head.weight": torch.randn(37, 192, generator=rng) * 0.02,
                    "head.bias": torch.zeros(37)})
    torch.save({"model": weights}, folder / "weights.pth")
    done = fork(
        "pets", "--model", "deit_tiny_patch16_224", "--input-size", "112", "--num_workers", "1",
        "--epochs", EPOCHS, "--eval-freq", EPOCHS, "--save-freq", EPOCHS, "--lr", PEAK * 512 / 16,
        "--data-path", data / "pets", "--resume", folder / "weights.pth", "--output_dir",
        folder / "run", script="recipe_facts.py", processes=2, era=request.param,
        FACTS=str(folder / "facts.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "facts.json").read_text())


def test_learning_rate_of_every_epoch(facts):
    assert facts["rates"] == pytest.approx(expected_rates(EPOCHS, WARMUP, PEAK), rel=1e-12)


def test_optimizer_and_what_decays(facts):
    assert facts["optimizer"] == "AdamW"
    assert facts["settings"] == {"lr": pytest.approx(PEAK), "betas": [0.9, 0.999], "eps": 1e-8}
    assert facts["weight_decay"] == [0.1]
    assert len(facts["decayed"]) + len(facts["not_decayed"]) == 152
    embeddings = {"pos_embed", "cls_token"}
    weights = {name for name in facts["decayed"] if name not in embeddings}
    assert len(weights) == 50 and all(name.endswith(".weight") for name in weights)
    assert not any("norm" in name for name in weights)
    # DeiT of December 2020 hands the wrapped model to the optimizer, which then does not know the
    # names of what must not decay.
    decaying = embeddings & set(facts["decayed"])
    assert decaying == (embeddings if facts["wrapped"] else set())


def test_images_and_labels(facts):
    for split, per_class in (("train", 7), ("test", 3)):
        assert facts[f"{split} images"] == IMAGES[split]
        assert facts[f"{split} labels"] == sorted(list(range(7)) * per_class)


def test_loss_of_the_first_steps(facts):
    assert facts["losses"] == pytest.approx(LOSSES, rel=1e-4)


def test_cutmix_boxes():
    """The one difference between stacks: from timm 1.0.29 on, odd boxes keep their last pixel."""
    np.random.seed(0)
    heights = set()
    for share in np.linspace(0.3, 0.9, 100):  # with a margin, boxes stay clear of the edges
        top, bottom, _, _ = rand_bbox((1, 3, 10000, 10000), share, margin=0.5)
        heights.add((bottom - top) % 2)
    even_only = TIMM < (1, 0, 29)
    assert heights == ({0} if even_only else {0, 1})
