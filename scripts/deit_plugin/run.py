"""One fine-tuning run: what stands in for DeiT's functions while DeiT's ``main(args)`` runs."""
import json
import shlex
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed

from datasets import DATA_SETS

from . import loaders, options, weights
from .accumulation import Accumulation, batches
from .errors import UserError, one_line
from .evaluation import evaluate
from .options import count

STAND_INS = ("build_dataset", "create_model", "create_optimizer", "train_one_epoch", "evaluate")


class Run:
    """Every method named like a function of DeiT's stands in for it, on all commits.

    main: DeiT's module; args: options.parse's; folder: an output.RunFolder; start: output.Start.
    """

    def __init__(self, main, args, folder, start):
        self.main, self.args, self.folder, self.start = main, args, folder, start
        self.deit = SimpleNamespace(**vars(main))  # its functions, as they were
        self.datasets = []  # train, test
        self.differs = [*args.differs]  # from the recipe; a cut-down data set does, too
        self.train_loader = self.test_loader = None
        self.trained = {}  # the state after an epoch, unsaved until its line is in log.txt
        self.best = {"epoch": None, "test_acc1": -1}  # rank 0's: the best row of log.txt

    def train(self):
        """Run DeiT's ``main`` with this run's methods in the place of its functions."""
        for name in STAND_INS:
            setattr(self.main, name, getattr(self, name))
        self.main.utils.save_on_master = self.save_on_master
        self.main.print = lambda *_: None  # says what this bundle says, too, and all arguments
        # DeiT saves the weight average also where --no-model-ema left it out, and crashes.
        self.main.get_state_dict = lambda average: average and self.deit.get_state_dict(average)
        self.args.start_epoch = self.start.epoch
        # Else the augmentation of the first epochs would be drawn again.
        self.args.seed += self.args.world_size * self.start.epoch
        self.main.main(self.args)
        if self.args.rank == 0 and not self.args.eval:
            self._commit()
            path = self.folder.path
            print(f"Best test accuracy: {self.best['test_acc1']:.2f} % after epoch "
                  f"{self.best['epoch'] + 1}, {path / 'best_checkpoint.pth'}\n"
                  f"Table and curves: python scripts/report.py {shlex.quote(str(path))}")
        self.train_loader = self.test_loader = None  # ends their workers
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # What DeiT calls, in its order

    def build_dataset(self, is_train, args):
        """The data set, large enough for a step of the optimizer."""
        try:
            dataset, classes = self.deit.build_dataset(is_train=is_train, args=args)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(one_line(error)) from error
        self.datasets.append(dataset)
        official = DATA_SETS[args.data_set].images.get(is_train, len(dataset))
        if len(dataset) != official:
            self.differs.append(f"{len(dataset)} {'train' if is_train else 'test'} images "
                                f"(published: {official})")
        if is_train and not args.eval:
            self.steps = loaders.steps_per_epoch(len(dataset), args)
        return dataset, classes

    def create_model(self, name, **kwargs):
        """The model with its weights, before DeiT copies it for the weight average.

        All commits load ``--resume`` after that copy, which then averages from random weights.
        """
        if torch.distributed.is_initialized():
            self._check_same_everywhere()
        path, classes = self.start.path, self.datasets[0].classes
        its_classes = self.start.state.get("classes", classes)
        if its_classes != classes:
            raise UserError(f"{path} is of a run on other classes, {', '.join(its_classes):.80}: "
                            f"--data-path {self.args.data_path} must have the same")
        size = self.args.input_size  # 1d38fa4 and e6b10b5 do not pass it on
        kwargs["img_size"] = None if size == 224 or name.endswith(f"_{size}") else size
        try:
            model = self.deit.create_model(name, **kwargs)
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"--model {name}: DeiT and timm cannot make it, --input-size {size}: "
                            f"{one_line(error)}; the recipes use deit_base_patch16_224") from error
        weights.fit(model, self.start.state["model"], path, name)
        return model

    def create_optimizer(self, args, model):
        """DeiT's; timm raises all sorts for a name that it does not know."""
        try:
            return self.deit.create_optimizer(args, model)
        except Exception as error:
            raise UserError(f"--opt {args.opt}: timm cannot make it: {one_line(error)}; the "
                            "recipes use adamw") from error

    def train_one_epoch(self, model, criterion, data_loader, optimizer, device, epoch, loss_scaler,
                        max_norm, model_ema, *mixup_fn, **kwargs):
        """DeiT's, with data workers that last, and batches accumulated; before the first, begin."""
        if self.train_loader is None:
            self._begin(data_loader, optimizer, loss_scaler, model_ema)
        elif self.args.rank == 0:
            self._commit()
        began = time.monotonic()
        self.train_loader.batch_sampler[:] = batches(data_loader, self.args, epoch)
        steps = Accumulation(self.train_loader, model, optimizer, loss_scaler, model_ema,
                             self.args.accum_iter)
        try:
            stats = self.deit.train_one_epoch(model, criterion, steps, steps, device, epoch, steps,
                                              max_norm, model_ema and steps, *mixup_fn, **kwargs)
        except SystemExit as stop:  # which DeiT has one reason for, at any commit
            raise FloatingPointError("the loss is not finite, so DeiT stopped: pass a smaller "
                                     "--lr, and look at the data with --check") from stop
        self.trained = {"epoch": epoch, "scaler": loss_scaler.state_dict()}  # not in 1d38fa4's
        return {**stats, "seconds": round(time.monotonic() - began, 2)}

    def save_on_master(self, state, path):
        """Keep the state until the epoch's line is in log.txt; ``_commit`` writes it.

        Where is not for DeiT to say: HEAD's best accuracy knows only the epochs of this launch.
        """
        self.trained.update(state)

    def evaluate(self, data_loader, model, device):
        """When due, over all processes; says how far the run is."""
        if not (self.args.eval or self._is_due(self.args.eval_freq)):
            self._say_progress()
            return Counter()  # nothing for log.txt, and for DeiT an acc1 of 0
        if self.test_loader is None:
            self.test_loader = loaders.evaluation(data_loader, self.args)
        stats = evaluate(model, self.test_loader, device)
        accuracy = "test accuracy {acc1:.2f} %, top-5 {acc5:.2f} %, loss {loss:.4f}".format(**stats)
        if self.args.eval:
            print(f"{self.start.path}: {accuracy} on {count(len(self.datasets[1]), 'image')}")
            return stats
        if stats["acc1"] > self.best["test_acc1"]:
            self.best = {"epoch": self.trained["epoch"], "test_acc1": stats["acc1"]}
        self._say_progress(f"{accuracy} (best accuracy {self.best['test_acc1']:.2f} %); ")
        return stats

    # What happens in between

    def _begin(self, data_loader, optimizer, loss_scaler, model_ema):
        state = self.start.state
        if self.start.epoch:  # go on as if never stopped, as no commit of DeiT does
            optimizer.load_state_dict(state["optimizer"])
            if model_ema is not None:
                model_ema.ema.load_state_dict(state["model_ema"])
            if state.get("scaler"):  # DeiT's own of December 2020 has none
                loss_scaler.load_state_dict(state["scaler"])
        if self.args.rank == 0:
            rows = self.folder.begin(self.start.epoch, self.args.overwrite, {
                "settings": self.args.settings, "differs": self.differs,
                "classes": self.datasets[0].classes})
            self.best = max([self.best, *rows], key=lambda row: row.get("test_acc1", -1))
        print(self.plan(), flush=True)
        state.clear()  # its memory is not needed any more
        self.train_loader = loaders.persistent(data_loader, [])  # of batches, anew in each epoch
        self.began = time.monotonic()

    def plan(self):
        """What is trained from what and how, in lines."""
        args, start, (train, test) = self.args, self.start.path, self.datasets
        if self.start.epoch:
            start += f", continued: epoch {self.start.epoch + 1} of {args.epochs} comes next"
        elif "head.weight" not in self.start.state["model"]:
            start += " (the classifier head is new)"
        size, lr = args.settings["effective_batch_size"], args.settings["lr"]
        rate = f"{lr:g}"
        if not getattr(args, "unscale_lr", False):
            rate += f" x {size} / 512 = {lr * size / 512:g}"
        return "\n  ".join([
            f"Fine-tuning {args.model} on {args.data_set}: {len(train)} train and {len(test)} test "
            f"images, {count(len(train.classes), 'class')}",
            f"start: {start}",
            f"output: {args.output_dir}",
            f"effective batch size: {options.batch_size_in_words(args)}; "
            f"{count(self.steps, 'step')} per epoch",
            f"learning rate: {rate}",
            f"evaluation every {count(args.eval_freq, 'epoch')}, checkpoint.pth every "
            f"{count(args.save_freq, 'epoch')}, both after the last",
            f"settings that differ from the published recipe: {', '.join(self.differs) or 'none'}"])

    def _check_same_everywhere(self):
        """Machines that were launched differently would train different models, or wait forever."""
        text = json.dumps({**self.args.settings, "first epoch": self.start.epoch + 1,
                           "train and test images": [*map(len, self.datasets)]})
        # all_gather_object of torch 1.7.1 takes the rank for the number of a GPU of this machine.
        own = torch.tensor([*text.ljust(2**16).encode()], device=self.args.device)
        everyone = [torch.zeros_like(own) for _ in range(self.args.world_size)]
        torch.distributed.all_gather(everyone, own)
        for rank, its in enumerate(everyone):
            its = json.loads(bytes(its.tolist()))
            differing = options.differing(json.loads(text), its, f"rank {rank}")
            if differing:
                raise UserError(f"rank {self.args.rank} has {', '.join(differing)}: type the same "
                                "on all machines, with the same data and one shared --output_dir")

    def _is_due(self, every):
        """Whether what is done every ``every`` epochs and after the last is due."""
        done = self.trained["epoch"] + 1
        return done % every == 0 or done == self.args.epochs

    def _say_progress(self, accuracy=""):
        done, epochs = self.trained["epoch"] + 1, self.args.epochs
        elapsed = time.monotonic() - self.began
        to_go = elapsed / (done - self.start.epoch) * (epochs - done)
        so_far, to_go = (timedelta(seconds=round(seconds)) for seconds in (elapsed, to_go))
        print(f"Epoch {done} of {epochs}: {accuracy}{so_far} so far, about {to_go} to go",
              flush=True)

    def _commit(self):
        """Write what the last epoch leaves, whose line is in log.txt now."""
        state = {**self.trained,
                 "args": vars(self.args),  # a plain dict: torch.load reads it with weights_only
                 "settings": self.args.settings, "classes": self.datasets[0].classes}
        is_best = self.best["epoch"] == state["epoch"]
        if is_best:  # then its epoch must not be lost, or log.txt would not know of it
            self.folder.save("best_checkpoint.pth", state)
        if is_best or self._is_due(self.args.save_freq):
            self.folder.save("checkpoint.pth", state)
