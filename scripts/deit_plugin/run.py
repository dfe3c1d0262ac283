"""One fine-tuning run: what stands in for DeiT's functions while DeiT's ``main(args)`` runs."""
import builtins
import os
import shlex
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed

from . import options, weights
from .accumulation import Accumulation, RanksInTurn
from .errors import UserError, one_line
from .evaluation import NotEvaluated, evaluate
from .loaders import PersistentLoaders, steps_per_epoch
from .options import count

STAND_INS = ("build_dataset", "create_model", "create_optimizer", "train_one_epoch", "evaluate",
             "get_state_dict", "print")
DEIT_SAYS_TOO = ("Namespace(", "Accuracy of the network", "Max accuracy")  # run.json, evaluate


class Run:
    """Every method named like a function of DeiT's stands in for it, on all commits.

    main: DeiT's module; args: options.parse's; folder: an output.RunFolder; start: output.Start.
    """

    def __init__(self, main, args, folder, start):
        self.main, self.args, self.folder, self.start = main, args, folder, start
        self.rank, self.processes = options.rank(), options.processes_of(args)
        self.deit = {name: getattr(main, name) for name in STAND_INS if name != "print"}
        self.datasets = {}  # by is_train: a data set and its number of classes
        self.headless = False  # whether the weights lacked the classifier head
        self.loaders = PersistentLoaders()
        self.sampler = None  # of --accum-iter
        self.epoch = None  # the one in training; None before the first
        self.unsaved = None  # the state after self.epoch, until its line is in log.txt
        self.loss_scaler = None  # DeiT's
        self.best = None  # the row of log.txt with the best accuracy
        self.began = None

    def train(self):
        """Run DeiT's ``main`` with this run's methods in the place of its functions."""
        for name in STAND_INS:
            setattr(self.main, name, getattr(self, name))
        self.main.utils.save_on_master = self.save_on_master
        self.args.start_epoch = self.start.epoch
        try:
            self.main.main(self.args)
        except SystemExit as stop:
            if stop.code != 1:  # which DeiT has one reason for, at any commit
                raise
            raise UserError("the loss is not finite, so DeiT stopped: pass a smaller --lr, and "
                            "look at the data with --check", status=1) from stop
        self._finish()

    # What DeiT calls, in its order

    def build_dataset(self, is_train, args):
        """The data set, large enough for a step of the optimizer."""
        try:
            built = self.deit["build_dataset"](is_train=is_train, args=args)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(one_line(error)) from error
        self.datasets[is_train] = built
        if is_train and not args.eval:
            steps_per_epoch(len(built[0]), args, self.processes)
        return built

    def create_model(self, name, **kwargs):
        """The model with its weights, before DeiT copies it for the weight average.

        All commits load ``--resume`` after that copy, which then averages from random weights.
        """
        self._check_origin(name)
        size = self.args.input_size  # 1d38fa4 and e6b10b5 do not pass it on
        kwargs["img_size"] = None if size == 224 or name.endswith(f"_{size}") else size
        try:
            model = self.deit["create_model"](name, **kwargs)
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"--model {name}: DeiT and timm cannot make it, --input-size {size}: "
                            f"{one_line(error)}; the recipes use deit_base_patch16_224") from error
        self.headless = weights.fit(model, self.start.state["model"], self.start.path, name,
                                    head_may_miss=not (self.args.eval or self.start.continues))
        return model

    def create_optimizer(self, args, model):
        """DeiT's; timm raises all sorts for a name that it does not know."""
        try:
            return self.deit["create_optimizer"](args, model)
        except Exception as error:
            raise UserError(f"--opt {args.opt}: timm cannot make it: {one_line(error)}; the "
                            "recipes use adamw") from error

    def train_one_epoch(self, model, criterion, data_loader, optimizer, device, epoch, loss_scaler,
                        max_norm=None, model_ema=None, mixup_fn=None, **kwargs):
        """DeiT's, with data workers that last, and batches accumulated; before the first, begin."""
        if self.epoch is None:
            self._begin(data_loader, optimizer, device, loss_scaler, model_ema)
        else:
            self._commit()
        self.epoch, self.loss_scaler, began = epoch, loss_scaler, time.monotonic()
        loader = self.loaders.training(data_loader, self.sampler or data_loader.sampler)
        if self.sampler:
            self.sampler.set_epoch(epoch)  # on one process, HEAD does not
            loader = Accumulation(loader, model, self.args.accum_iter)
            optimizer, model_ema = loader.optimizer(optimizer), loader.model_ema(model_ema)
            loss_scaler = loader.loss_scaler(loss_scaler)
        stats = self.deit["train_one_epoch"](
            model, criterion, loader, optimizer, device, epoch, loss_scaler, max_norm, model_ema,
            mixup_fn, **kwargs)
        return {**stats, "seconds": round(time.monotonic() - began, 2)}

    def save_on_master(self, state, path):
        """Keep the state until the epoch's line is in log.txt; ``_commit`` writes it.

        DeiT HEAD's own calls for ``best_checkpoint.pth`` know only the epochs of this launch.
        """
        if os.path.basename(path) == "checkpoint.pth":
            self.unsaved = state

    def get_state_dict(self, model):
        """DeiT saves the weight average also where ``--no-model-ema`` left it out, and crashes."""
        return None if model is None else self.deit["get_state_dict"](model)

    def evaluate(self, data_loader, model, device):
        """When due, over all processes; says how far the run is."""
        if self.epoch is not None and not is_due(self.epoch, self.args.eval_freq, self.args.epochs):
            self._say_progress()
            return NotEvaluated()
        began = time.monotonic()
        loader = self.loaders.evaluation(data_loader, self.rank, self.processes)
        stats = evaluate(model, loader, device)
        accuracy = "test accuracy {acc1:.2f} %, top-5 {acc5:.2f} %, loss {loss:.4f}".format(**stats)
        if self.epoch is None:
            images = count(len(data_loader.dataset), "image")
            self.print(f"{self.start.path}: {accuracy} on {images}")
            return stats
        if self.best is None or stats["acc1"] > self.best["test_acc1"]:
            self.best = {"epoch": self.epoch, "test_acc1": stats["acc1"]}
        self._say_progress(f"{accuracy} (best accuracy {self.best['test_acc1']:.2f} %); ")
        return {**stats, "seconds": round(time.monotonic() - began, 2)}

    def print(self, *values, **kwargs):
        """DeiT's lines, less those that say again what this bundle says or writes."""
        if not str(values[0] if values else "").startswith(DEIT_SAYS_TOO):
            builtins.print(*values, **kwargs)  # found at the call: DeiT replaces it but in rank 0

    # What happens in between

    def _begin(self, data_loader, optimizer, device, loss_scaler, model_ema):
        if self.processes > 1:
            self._check_same_start(device)
        if self.args.accum_iter > 1:
            self.sampler = RanksInTurn(data_loader, self.rank, self.processes, self.args.accum_iter)
        (train, _), (test, _) = self.datasets[True], self.datasets[False]
        self.folder.begin(self.start.epoch, self.args.overwrite, {
            "settings": self.args.settings, "differs": self.args.differs,
            "train_images": len(train), "test_images": len(test), "classes": train.classes})
        if self.start.continues:
            self._restore(optimizer, loss_scaler, model_ema)
        self.print("\n".join(self.plan()), flush=True)
        self.start.state.clear()  # its memory is not needed any more
        self.began = time.monotonic()

    def plan(self):
        """What is trained from what and how, in lines."""
        args, (train, classes), (test, _) = self.args, self.datasets[True], self.datasets[False]
        start, rate = self.start.path, f"{args.settings['lr']:g}"
        if self.start.continues:
            start += f", continued: epoch {self.start.epoch + 1} of {args.epochs} comes next"
        elif self.headless:
            start += " (the classifier head is new)"
        if not getattr(args, "unscale_lr", False):
            size = args.settings["effective_batch_size"]
            rate += f" x {size} / 512 = {args.settings['lr'] * size / 512:g}"
        return [
            f"Fine-tuning {args.model} on {args.data_set}: {len(train)} train and {len(test)} test "
            f"images, {count(classes, 'class')}",
            f"  start: {start}", f"  output: {args.output_dir}",
            f"  effective batch size: {options.batch_size_in_words(args)}; "
            f"{count(steps_per_epoch(len(train), args, self.processes), 'step')} per epoch",
            f"  learning rate: {rate}",
            f"  evaluation every {count(args.eval_freq, 'epoch')}, checkpoint.pth every "
            f"{count(args.save_freq, 'epoch')}, both after the last",
            "  settings that differ from the published recipe: "
            + (", ".join(args.differs) or "none")]

    def _check_origin(self, model):
        """A run's own checkpoint tells what no shape does: classes, and the model with its heads"""
        state, path, classes = self.start.state, self.start.path, self.datasets[True][0].classes
        its_model = state.get("settings", {}).get("model", model)
        if its_model != model:
            raise UserError(f"{path} is of a run with --model {its_model}: pass that")
        its_classes = state.get("classes", classes)
        if its_classes != classes:
            raise UserError(f"{path} is of a run on other classes, {', '.join(its_classes):.80}: "
                            f"--data-path {self.args.data_path} must have the same")

    def _check_same_start(self, device):
        """Machines that do not share a folder would continue from different epochs."""
        epoch = self.start.epoch
        extremes = torch.tensor([epoch, -epoch], device=device)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        if extremes.tolist() != [epoch, -epoch]:
            raise UserError(f"rank {self.rank} would start at epoch {epoch + 1}, others elsewhere: "
                            "--output_dir must be one folder that all machines share")

    def _restore(self, optimizer, loss_scaler, model_ema):
        """Go on as if never stopped: optimizer with its learning rate, weight average, loss scale.

        HEAD's own resuming is one epoch ahead in the learning rate; 1d38fa4 and e6b10b5 do not
        restore the average, and 1d38fa4 has no loss scale.
        """
        state = self.start.state
        optimizer.load_state_dict(state["optimizer"])
        if model_ema is not None:
            if not state.get("model_ema"):
                raise UserError(f"{self.start.path} has no weight average to go on with: pass "
                                "--no-model-ema, as for the run that wrote it")
            model_ema.ema.load_state_dict(state["model_ema"])
        if state.get("scaler"):
            loss_scaler.load_state_dict(state["scaler"])
        # Else the augmentation of the first epochs would be drawn again.
        seed = self.args.seed + self.rank + self.processes * self.start.epoch
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        evaluated = [row for row in self.folder.rows() if "test_acc1" in row]
        self.best = max(evaluated, key=lambda row: row["test_acc1"], default=None)

    def _say_progress(self, accuracy=""):
        done, epochs = self.epoch + 1, self.args.epochs
        elapsed = time.monotonic() - self.began
        to_go = elapsed / (done - self.start.epoch) * (epochs - done)
        so_far, to_go = (timedelta(seconds=round(seconds)) for seconds in (elapsed, to_go))
        self.print(f"Epoch {done} of {epochs}: {accuracy}{so_far} so far, about {to_go} to go",
                   flush=True)

    def _commit(self):
        """Write what the epoch leaves, whose line is in log.txt now."""
        state, self.unsaved = self.unsaved, None
        if state is None:
            return
        state = {"scaler": self.loss_scaler.state_dict(), **state,  # 1d38fa4 leaves it out
                 "args": vars(self.args),  # a plain dict: torch.load reads it with weights_only
                 "settings": self.args.settings, "classes": self.datasets[True][0].classes}
        is_best = self.best is not None and self.best["epoch"] == self.epoch
        if is_best:  # then its epoch must not be lost, or log.txt would not know of it
            self.folder.save("best_checkpoint.pth", state)
        if is_best or is_due(self.epoch, self.args.save_freq, self.args.epochs):
            self.folder.save("checkpoint.pth", state)

    def _finish(self):
        """Write what is left to write; end the data workers and the process group; say the best."""
        if self.epoch is not None:
            self._commit()
        self.loaders.close()
        if self.best is not None:
            folder = self.folder.path
            self.print(f"Best test accuracy: {self.best['test_acc1']:.2f} % after epoch "
                       f"{self.best['epoch'] + 1}, {folder / 'best_checkpoint.pth'}\n"
                       f"Table and curves: python scripts/report.py {shlex.quote(str(folder))}")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_due(epoch, every, epochs):
    """Whether what is done every ``every`` epochs and after the last is due; ``epoch`` from 0."""
    return (epoch + 1) % every == 0 or epoch + 1 == epochs
