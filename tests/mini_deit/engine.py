"""One epoch of training."""
import math
import sys

import torch

import utils


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler,
                    max_norm=0, model_ema=None, mixup_fn=None, set_training_mode=True, args=None):
    model.train(set_training_mode)
    meters = utils.MetricLogger()
    for images, labels in meters.log_every(data_loader, 10, f"Epoch: [{epoch}]"):
        images, labels = images.to(device), labels.to(device)
        if mixup_fn is not None:
            images, labels = mixup_fn(images, labels)
        with torch.cuda.amp.autocast():
            logits = model(images)
            loss = criterion(logits, labels)
        if not math.isfinite(loss.item()):
            print(f"Loss is {loss.item()}")
            sys.exit(1)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, clip_grad=max_norm, parameters=model.parameters(),
                    create_graph=getattr(optimizer, "is_second_order", False))
        torch.cuda.synchronize()
        if model_ema is not None:
            model_ema.update(model)
        meters.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
    for meter in meters.meters.values():
        meter.synchronize_between_processes()
    return meters.averages()


def evaluate(data_loader, model, device):
    """What the bundle always replaces; beside it, only training is compared."""
    return {"acc1": 0.0}
