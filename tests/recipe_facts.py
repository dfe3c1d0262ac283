"""What a recipe does on this stack: runs as finetune.py does and writes facts as JSON to $FACTS.

Three epochs train; the others only tell their learning rate.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import finetune  # noqa: E402
from deit_plugin import errors  # noqa: E402

TRAINED_EPOCHS = 3


class Recorder:
    """Stands in for DeiT's build_dataset, create_optimizer and train_one_epoch."""

    def __init__(self, main):
        self.facts = {"rates": [], "losses": []}
        for name in ("build_dataset", "create_optimizer", "train_one_epoch"):
            setattr(self, f"deit_{name}", getattr(main, name))
            setattr(main, name, getattr(self, name))

    def build_dataset(self, is_train, args):
        """Ours, noting the labels, and for a fixed seed what the transforms give."""
        dataset, classes = self.deit_build_dataset(is_train=is_train, args=args)
        torch.manual_seed(0)
        # Eight bits are the same everywhere, and tell any other crop or flip.
        pixels = [(dataset[index][0] * 32).round().to(torch.int16).numpy().tobytes()
                  for index in range(3)]
        name = "train" if is_train else "test"
        self.facts[f"{name} images"] = [hashlib.sha256(image).hexdigest()[:16] for image in pixels]
        self.facts[f"{name} labels"] = [int(label) for label in dataset.targets]
        return dataset, classes

    def create_optimizer(self, args, model):
        """DeiT's, noting what it was made for."""
        optimizer = self.deit_create_optimizer(args, model)
        names = {id(value): name.replace("module.", "", 1)
                 for name, value in model.named_parameters()}
        decays = [(names[id(value)], group["weight_decay"])
                  for group in optimizer.param_groups for value in group["params"]]
        self.facts.update(
            wrapped=hasattr(model, "module"),
            optimizer=type(optimizer).__name__,
            settings={key: optimizer.defaults[key] for key in ("lr", "betas", "eps")},
            weight_decay=sorted({decay for _, decay in decays if decay}),
            decayed=sorted(name for name, decay in decays if decay),
            not_decayed=sorted(name for name, decay in decays if not decay))
        return optimizer

    def train_one_epoch(self, model, criterion, data_loader, optimizer, device, epoch, *rest, **kw):
        """DeiT's for the first epochs."""
        self.facts["rates"].append(optimizer.param_groups[0]["lr"])
        if epoch >= TRAINED_EPOCHS:
            return {"loss": 0.0, "lr": 0.0}
        torch.manual_seed(epoch)  # timm's versions draw unequal numbers to initialise a model
        stats = self.deit_train_one_epoch(model, criterion, data_loader, optimizer, device, epoch,
                                          *rest, **kw)
        self.facts["losses"].append(stats["loss"])
        return stats


def run(main, arguments):
    """As finetune.run, with a Recorder in place."""
    recorder = Recorder(main)
    finetune_run(main, arguments)
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["FACTS"]).write_text(json.dumps(recorder.facts))


if __name__ == "__main__":
    finetune_run, finetune.run = finetune.run, run
    errors.guard(finetune.main)
