"""A miniature of facebookresearch/deit, written for this project's tests: our own code, not DeiT's.

It has DeiT's file names and what the project adapts from outside: functions, options, the order of
the steps, and the faults to correct (weights loaded after the EMA was made, a GPU that must exist,
names that newer timm has dropped). It trains only as a process of torch's launcher. MINI_DEIT_ERA=
2020, 2021 or head (the default) selects the DeiT of December 2020, of June 2021 or the last.
"""
import json
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils import ModelEma, NativeScaler
from torch.utils.data import DataLoader, DistributedSampler

import models  # noqa: F401  registers the models with timm
import utils
from arguments import HEAD, SINCE_2021, get_args_parser  # noqa: F401
from datasets import build_dataset
from engine import evaluate, train_one_epoch
from samplers import RASampler

if HEAD:
    import augment  # noqa: F401


def make_loaders(args):
    train_set, args.nb_classes = build_dataset(is_train=True, args=args)
    test_set, _ = build_dataset(is_train=False, args=args)
    kind = RASampler if args.repeated_aug else DistributedSampler
    sampler = kind(train_set, args.world_size, args.rank, shuffle=True)
    shared = {"num_workers": args.num_workers, "pin_memory": args.pin_mem}
    return (DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **shared),
            DataLoader(test_set, int(1.5 * args.batch_size), **shared))


def make_criterion(args):
    """The mixup, if any, and the loss for it."""
    if args.mixup == 0 and args.cutmix == 0:
        return None, LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, label_smoothing=args.smoothing,
                  num_classes=args.nb_classes)
    return mixup, SoftTargetCrossEntropy()


def main(args):
    utils.init_distributed_mode(args)
    print(args)
    device = torch.device(args.device)
    torch.manual_seed(args.seed + args.rank)
    np.random.seed(args.seed + args.rank)
    train_loader, test_loader = make_loaders(args)
    mixup, criterion = make_criterion(args)
    newer = {"img_size": args.input_size} if HEAD else {}
    model = bare = create_model(
        args.model, pretrained=False, num_classes=args.nb_classes, drop_rate=args.drop,
        drop_path_rate=args.drop_path, drop_block_rate=None, **newer)
    model.to(device)
    ema = ModelEma(model, decay=args.model_ema_decay) if args.model_ema else None
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu])
    args.lr *= args.batch_size * args.world_size / 512
    optimizer = create_optimizer(args, bare if SINCE_2021 else model)
    scaler = NativeScaler()
    scheduler, _ = create_scheduler(args, optimizer)
    if args.resume:  # after the EMA was made, which keeps what the model contained before
        bare.load_state_dict(torch.load(args.resume, map_location="cpu")["model"])
    if args.eval:
        stats = evaluate(test_loader, model, device)
        print(f"Accuracy of the network on the test images: {stats['acc1']:.1f}%")
        return

    newer = {"set_training_mode": True} if SINCE_2021 else {}
    if HEAD:
        newer["args"] = args
    for epoch in range(args.start_epoch, args.epochs):
        train_loader.sampler.set_epoch(epoch)
        trained = train_one_epoch(model, criterion, train_loader, optimizer, device, epoch, scaler,
                                  args.clip_grad, ema, mixup, **newer)
        scheduler.step(epoch)
        tested = evaluate(test_loader, model, device)
        print(f"Accuracy of the network on the test images: {tested['acc1']:.1f}%")
        row = {**{f"train_{name}": value for name, value in trained.items()},
               **{f"test_{name}": value for name, value in tested.items()},
               "epoch": epoch}
        if args.output_dir and args.rank == 0:
            torch.save({"model": bare.state_dict()}, Path(args.output_dir, "checkpoint.pth"))
            with open(Path(args.output_dir, "log.txt"), "a") as out:
                out.write(f"{json.dumps(row)}\n")
