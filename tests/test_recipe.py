"""The recipe is the same recipe on every stack and every DeiT, measured in a real run."""
import os
import sys

import pytest
import torch

import generate
from conftest import ERAS, assert_rates, log_of, saved, train

# Mean over 3 steps each: to 1e-5 the same on Python 3.8 with torch 1.7.1, timm 0.3.2, Pillow 10.4
# as on Python 3.13 with torch 2.15, timm 1.0.31 and Pillow 13. Other images would have others.
LOSSES = [3.589152, 3.571283, 2.917811]


def train_three_epochs():
    """The other epochs only tell their learning rate.

    The first is seeded, since timm's versions draw unequal numbers to initialise a model.
    """
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, os.environ["DEIT_DIR"])
    import engine

    sys.path.pop(0)
    train, init = engine.train_one_epoch, DistributedDataParallel.__init__

    def train_three(model, criterion, data_loader, optimizer, device, epoch, *rest, **options):
        if epoch >= 3:
            return {"lr": optimizer.param_groups[0]["lr"], "loss": 0.0}
        return train(model, criterion, data_loader, optimizer, device, epoch, *rest, **options)

    def init_and_seed(*arguments, **options):
        init(*arguments, **options)
        torch.manual_seed(0)

    engine.train_one_epoch, DistributedDataParallel.__init__ = train_three, init_and_seed


@pytest.mark.parametrize("era", [
    pytest.param(era, marks=[] if era == ERAS[-1] else pytest.mark.slow) for era in ERAS])
def test_losses_rates_optimizer_and_what_decays(era, data, tmp_path):
    """Of the Pets recipe with ViT-Tiny, from given weights."""
    weights = generate.encoder_state(width=192, depth=12)
    rng = torch.Generator().manual_seed(1)
    weights.update({"head.weight": torch.randn(37, 192, generator=rng) * 0.02,
                    "head.bias": torch.zeros(37)})
    torch.save({"model": weights}, tmp_path / "weights.pth")
    train("pets", "--model", "deit_tiny_patch16_224", "--input-size", "112", "--num_workers", "1",
          "--epochs", "100", "--eval-freq", "100", "--save-freq", "100", "--lr", 6e-4 * 512 / 16,
          "--data-path", data / "pets", "--resume", tmp_path / "weights.pth", "--output_dir",
          tmp_path, before=train_three_epochs, processes=2, era=era)
    losses = [row["train_loss"] for row in log_of(tmp_path)[:3]]
    assert losses == pytest.approx(LOSSES, rel=1e-4)
    assert_rates(tmp_path, 100, 3, 6e-4)
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
