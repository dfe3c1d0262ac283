"""What a recipe does on this stack: runs as finetune.py does and writes facts as JSON to $FACTS.

Three epochs train; the others only tell their learning rate.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import failures  # noqa: E402
import finetune  # noqa: E402

TRAINED_EPOCHS = 3


class Recorder:
    """Stands in for DeiT's train_one_epoch and create_optimizer."""

    def __init__(self, main):
        self.train, self.create_optimizer = main.train_one_epoch, main.create_optimizer
        self.facts = {"rates": [], "losses": []}

    def create_optimizer_here(self, args, model):
        """DeiT's, noting what it was made for."""
        optimizer = self.create_optimizer(args, model)
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
        stats = self.train(model, criterion, data_loader, optimizer, device, epoch, *rest, **kw)
        self.facts["losses"].append(stats["loss"])
        return stats


def of_datasets(build_dataset, args):
    """Labels, and for a fixed seed what the transforms give."""
    facts = {}
    for is_train in (True, False):
        dataset, _ = build_dataset(is_train, args)
        torch.manual_seed(0)
        np.random.seed(0)
        items = [dataset[index] for index in range(3)]
        # Eight bits are the same everywhere, and tell any other crop or flip.
        pixels = [(image * 32).round().to(torch.int16).numpy().tobytes() for image, _ in items]
        name = "training" if is_train else "test"
        facts[f"{name} images"] = [hashlib.sha256(image).hexdigest()[:16] for image in pixels]
        facts[f"{name} labels"] = [int(label) for label in dataset.targets]
    return facts


def run(main, args):
    """As finetune.run, with a Recorder in place."""
    recorder = Recorder(main)
    main.create_optimizer = recorder.create_optimizer_here
    main.train_one_epoch = recorder.train_one_epoch
    recorder.facts.update(of_datasets(main.build_dataset, args))
    original_run(main, args)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(os.environ["FACTS"]).write_text(json.dumps(recorder.facts))


if __name__ == "__main__":
    original_run, finetune.run = finetune.run, run
    failures.guard(finetune.main)
