"""A miniature of DeiT's trainer: its seams, its faults, our own code. See README."""
import json
from pathlib import Path

import numpy as np
import torch
import torch.backends.cudnn as cudnn
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils import ModelEma, NativeScaler, get_state_dict

import models  # noqa: F401  registers the models with timm
import utils
from arguments import get_args_parser  # noqa: F401
from datasets import build_dataset
from engine import evaluate, train_one_epoch
from era import HEAD, SINCE_2021

if HEAD:
    import augment  # noqa: F401


def train_sampler(dataset, args):
    if HEAD and not args.distributed:
        return torch.utils.data.RandomSampler(dataset)
    if args.repeated_aug:
        raise NotImplementedError("the miniature DeiT wants --no-repeated-aug")
    return torch.utils.data.DistributedSampler(
        dataset, num_replicas=utils.get_world_size(), rank=utils.get_rank(), shuffle=True)


def make_loaders(args):
    train_set, args.nb_classes = build_dataset(is_train=True, args=args)
    test_set, _ = build_dataset(is_train=False, args=args)
    shared = {"num_workers": args.num_workers, "pin_memory": args.pin_mem}
    train = torch.utils.data.DataLoader(
        train_set, sampler=train_sampler(train_set, args),
        batch_size=args.batch_size, drop_last=True, **shared)
    test = torch.utils.data.DataLoader(
        test_set, batch_size=int(1.5 * args.batch_size), shuffle=False, **shared)
    return train, test


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def make_mixup(args):
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=args.nb_classes)


def make_criterion(args):
    if mixes(args) if HEAD else args.mixup > 0:  # before HEAD, CutMix alone fails
        criterion = SoftTargetCrossEntropy()
    elif args.smoothing:
        criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        criterion = torch.nn.CrossEntropyLoss()
    if SINCE_2021:  # with the images, which a teacher would see
        return lambda images, logits, labels: criterion(logits, labels)
    return criterion


def make_model(args):
    print(f"Creating model: {args.model}")
    newer = {"img_size": args.input_size} if HEAD else {}
    return create_model(
        args.model, pretrained=False, num_classes=args.nb_classes, drop_rate=args.drop,
        drop_path_rate=args.drop_path, drop_block_rate=getattr(args, "drop_block", None), **newer)


class Trainer:
    """All that a checkpoint contains, and the steps of a run."""

    def __init__(self, args):
        self.args = args
        self.device = torch.device(args.device)
        self.train_loader, self.test_loader = make_loaders(args)
        self.mixup = make_mixup(args)
        self.model = self.bare = make_model(args)
        self.model.to(self.device)
        self.ema = ModelEma(self.bare, decay=args.model_ema_decay) if args.model_ema else None
        if args.distributed:
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.bare, device_ids=[args.gpu])
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if not getattr(args, "unscale_lr", False):
            args.lr *= args.batch_size * utils.get_world_size() / 512
        self.optimizer = create_optimizer(args, self.bare if SINCE_2021 else self.model)
        self.scaler = NativeScaler()
        self.scheduler, _ = create_scheduler(args, self.optimizer)
        self.criterion = make_criterion(args)

    def resume(self):
        """After the weight average was made: it keeps what the model contained before."""
        self.bare.load_state_dict(torch.load(self.args.resume, map_location="cpu")["model"])

    def save(self, name, epoch):
        if not self.args.output_dir:
            return
        state = {
            "model": self.bare.state_dict(), "model_ema": get_state_dict(self.ema),
            "optimizer": self.optimizer.state_dict(), "lr_scheduler": self.scheduler.state_dict(),
            "epoch": epoch, "args": self.args,
        }
        if SINCE_2021:
            state["scaler"] = self.scaler.state_dict()
        utils.save_on_master(state, Path(self.args.output_dir) / name)

    def train(self, epoch):
        if self.args.distributed:
            self.train_loader.sampler.set_epoch(epoch)
        newer = {"set_training_mode": True} if SINCE_2021 else {}
        if HEAD:
            newer["args"] = self.args
        return train_one_epoch(
            self.model, self.criterion, self.train_loader, self.optimizer, self.device, epoch,
            self.scaler, self.args.clip_grad, self.ema, self.mixup, **newer)

    def test(self):
        stats = evaluate(self.test_loader, self.model, self.device)
        print(f"Accuracy of the network on the test images: {stats['acc1']:.1f}%")
        return stats

    def log(self, epoch, train_stats, test_stats):
        row = {**{f"train_{name}": value for name, value in train_stats.items()},
               **{f"test_{name}": value for name, value in test_stats.items()},
               "epoch": epoch, "n_parameters": self.parameters}
        if self.args.output_dir and utils.get_rank() == 0:
            with open(Path(self.args.output_dir, "log.txt"), "a") as out:
                out.write(f"{json.dumps(row)}\n")

    def run(self):
        best = 0.0
        for epoch in range(self.args.start_epoch, self.args.epochs):
            train_stats = self.train(epoch)
            self.scheduler.step(epoch)
            self.save("checkpoint.pth", epoch)
            test_stats = self.test()
            if test_stats["acc1"] > best:
                best = test_stats["acc1"]
                if HEAD:
                    self.save("best_checkpoint.pth", epoch)
            print(f"Max accuracy: {best:.2f}%")
            self.log(epoch, train_stats, test_stats)


def main(args):
    utils.init_distributed_mode(args)
    print(args)
    torch.manual_seed(args.seed + utils.get_rank())
    np.random.seed(args.seed + utils.get_rank())
    cudnn.benchmark = True
    trainer = Trainer(args)
    print(f"number of params: {trainer.parameters}")
    if args.resume:
        trainer.resume()
    if args.eval:
        trainer.test()
        return
    trainer.run()
