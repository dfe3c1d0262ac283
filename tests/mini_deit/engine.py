"""One epoch of training, one pass of evaluation."""
import math
import sys

import torch
from timm.utils import accuracy

import utils
from era import SINCE_2021


def batches(meters, loader, device, header):
    for pair in meters.log_every(loader, 10, header):
        yield [tensor.to(device, non_blocking=True) for tensor in pair]


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler,
                    max_norm=0, model_ema=None, mixup_fn=None, set_training_mode=True, args=None):
    model.train(set_training_mode)
    meters = utils.MetricLogger(delimiter="  ")
    meters.add_meter("lr", utils.SmoothedValue(window_size=1, fmt="{value:.6f}"))
    for images, labels in batches(meters, data_loader, device, f"Epoch: [{epoch}]"):
        if mixup_fn is not None:
            images, labels = mixup_fn(images, labels)
        with torch.cuda.amp.autocast():
            logits = model(images)
            loss = criterion(images, logits, labels) if SINCE_2021 else criterion(logits, labels)
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
    meters.synchronize_between_processes()
    print("Averaged stats:", meters)
    return meters.averages()


@torch.no_grad()
def evaluate(data_loader, model, device):
    model.eval()
    meters = utils.MetricLogger(delimiter="  ")
    for images, labels in batches(meters, data_loader, device, "Test:"):
        logits = model(images)
        acc1, acc5 = accuracy(logits, labels, topk=(1, 5))
        meters.update(acc1=acc1, acc5=acc5,
                      loss=torch.nn.functional.cross_entropy(logits, labels))
    return meters.averages()
