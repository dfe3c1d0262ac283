"""The recipe is the same recipe on every stack and every DeiT, measured in a real run."""
import hashlib
from argparse import Namespace

import pytest
import torch

import generate
from conftest import ERAS, log_of, saved, train
from datasets import build_dataset

# Of the pictures that generate.py makes, at 112 pixels: the same on Python 3.8 with torch 1.7.1,
# timm 0.3.2 and Pillow 10.4 as on Python 3.13 with torch 2.15, timm 1.0.31 and Pillow 13.
IMAGES = {"train": ["64d70d92e37fdb0a", "3732fded1634b3ae", "f6a6bcc5cbc691b7"],
          "test": ["d54fc11932134da2", "174a52c4eeaf611c", "fe0a3a4a971c99ba"]}
LOSSES = [3.589152, 3.585391, 2.904437]  # mean over 3 steps each; those stacks agree to 1e-5
# timm's versions draw unequal numbers to initialise a model.
SEEDED = """
import timm.optim, torch
create = timm.optim.create_optimizer
def create_and_seed(args, model):
    torch.manual_seed(0)
    return create(args, model)
timm.optim.create_optimizer = create_and_seed"""


@pytest.mark.filterwarnings("ignore:.*official")
@pytest.mark.parametrize("is_train", [True, False])
def test_images_and_labels(is_train, data):
    split, per_class = ("train", 7) if is_train else ("test", 3)
    args = Namespace(data_set="pets", data_path=str(data / "pets"), input_size=112, reprob=0)
    dataset, _ = build_dataset(is_train, args)
    torch.manual_seed(0)
    # Eight bits are the same everywhere, and tell any other crop or flip.
    pixels = [(dataset[index][0] * 32).round().to(torch.int16).numpy() for index in range(3)]
    hashes = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in pixels]
    assert hashes == IMAGES[split]
    assert dataset.targets == sorted(list(range(7)) * per_class)


@pytest.mark.parametrize("era", [
    pytest.param(era, marks=[] if era == ERAS[-1] else pytest.mark.slow) for era in ERAS])
def test_losses_optimizer_and_what_decays(era, data, tmp_path):
    """Of the Pets recipe with ViT-Tiny, from given weights."""
    weights = generate.encoder_state(width=192, depth=12)
    rng = torch.Generator().manual_seed(1)
    weights.update({"head.weight": torch.randn(37, 192, generator=rng) * 0.02,
                    "head.bias": torch.zeros(37)})
    torch.save({"model": weights}, tmp_path / "weights.pth")
    train("pets", "--model", "deit_tiny_patch16_224", "--input-size", "112", "--num_workers", "1",
          "--epochs", "3", "--eval-freq", "3", "--lr", 6e-4 * 512 / 16, "--data-path",
          data / "pets", "--resume", tmp_path / "weights.pth", "--output_dir", tmp_path,
          altered=SEEDED, processes=2, era=era)
    assert [row["train_loss"] for row in log_of(tmp_path)] == pytest.approx(LOSSES, rel=1e-4)
    state = saved(tmp_path / "checkpoint.pth")
    groups = {group["weight_decay"]: group for group in state["optimizer"]["param_groups"]}
    for group in groups.values():
        assert (list(group["betas"]), group["eps"]) == ([0.9, 0.999], 1e-8)
        assert group["initial_lr"] == pytest.approx(6e-4)
    # DeiT of December 2020 hands the wrapped model to the optimizer, which then does not know the
    # names of what must not decay: pos_embed and cls_token.
    wrongly = 0 if "finetune" in state["args"] else 2
    decaying = {decay: len(group["params"]) for decay, group in groups.items()}
    assert decaying == {0.1: 50 + wrongly, 0.0: 102 - wrongly}
