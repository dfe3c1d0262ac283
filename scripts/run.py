"""One fine-tuning run: what stands in for DeiT's functions while DeiT's ``main()`` runs it."""
import builtins
import os
import time

import numpy as np
import torch
import torch.distributed

import schedule
import summary
import weights
from failures import Refusal
from plan import Plan


class Run(Plan):
    """A plan that is carried out.

    Every public method named like a function of DeiT's stands in for it, on all commits.
    """

    def __init__(self, main, args):
        super().__init__(main, args)
        self.loaders = schedule.LastingLoaders()
        self.epoch = None  # the one in training; None before the first
        self.unsaved = None  # the state after self.epoch, until its line is in log.txt
        self.evaluated = True
        self.loss_scaler = None  # DeiT's
        self.began = None  # the moment when the epoch in training began

    def stand_in(self):
        """Put this run's methods in the place of DeiT's functions."""
        for name in ("build_dataset", "create_model", "train_one_epoch", "evaluate", "print",
                     "get_state_dict"):
            setattr(self.main, name, getattr(self, name))
        self.main.utils.save_on_master = self.save_on_master

    # What DeiT calls

    def build_dataset(self, is_train, args):
        """The data sets were built, and so checked, before DeiT took the GPUs."""
        return self.datasets[is_train]

    def create_model(self, name, **kwargs):
        """The model that was made, and loaded, before DeiT took the GPUs and copies its average.

        All commits need this: DeiT loads ``--resume`` after the copy is made, so that the average
        starts from random weights, and cannot load a checkpoint without a head.
        """
        if self.prepared is None:  # the student was given: this is the teacher of a distillation
            return self.deit["create_model"](name, **kwargs)
        (prepared, before, after), self.prepared = self.prepared, None
        arguments = self._model_arguments(**kwargs)
        if arguments == prepared and torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(after)
            return self.model
        return self._create_model(name, arguments)

    def train_one_epoch(self, model, criterion, data_loader, optimizer, device, epoch, loss_scaler,
                        max_norm=None, model_ema=None, mixup_fn=None, **kwargs):
        """DeiT's, with lasting data workers; before the first epoch, restores and says the run."""
        if self.epoch is None:
            self._begin(model, data_loader, optimizer, device, loss_scaler, model_ema)
        else:
            self.commit()
        self.epoch, self.loss_scaler = epoch, loss_scaler
        return self.deit["train_one_epoch"](
            model, criterion, self.loaders.training(data_loader), optimizer, device, epoch,
            loss_scaler, max_norm, model_ema, mixup_fn, **kwargs)

    def evaluate(self, data_loader, model, device):
        """Evaluate when due, each image in one process; keep the best weights, as HEAD does."""
        if self.epoch is None:
            self._put_back_weights(model)
        self.evaluated = self.epoch is None or schedule.is_due(
            self.epoch, self.args.eval_freq, self.args.epochs)
        if not self.evaluated:
            return schedule.NotEvaluated()
        loader = self.loaders.evaluation(data_loader, self.rank, self.processes)
        batches = loader
        if len(loader):
            batches = self.main.utils.MetricLogger(delimiter="  ").log_every(loader, 10, "Test:")
        stats = schedule.evaluate(model, batches, device)
        self.print("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
        if self.epoch is not None and stats["acc1"] > self.best_accuracy:
            self.best_accuracy = stats["acc1"]
            if self.unsaved:
                self._save("best_checkpoint.pth")
        return stats

    def get_state_dict(self, model):
        """DeiT saves the weight average even where ``--no-model-ema`` left it out, and crashes."""
        return None if model is None else self.deit["get_state_dict"](model)

    def save_on_master(self, state, path):
        """Hold the state of an epoch until its line is in ``log.txt``; ``commit`` writes it.

        DeiT HEAD's own calls for ``best_checkpoint.pth`` are left to ``evaluate``, which knows the
        best of a run that was continued.
        """
        if os.path.basename(path) == "checkpoint.pth":
            self.unsaved = state

    def print(self, *values, **kwargs):
        """DeiT's lines, less the accuracy of an epoch without evaluation."""
        text = str(values[0]) if values else ""
        if text.startswith(("Accuracy of the network", "Max accuracy")) and not self.evaluated:
            return
        if text.startswith("Max accuracy"):
            values = (f"Max accuracy: {self.best_accuracy:.2f}%",)
        builtins.print(*values, **kwargs)

    # Saving and continuing

    def commit(self):
        """Note the epoch that is complete; write ``checkpoint.pth`` for it, if it is due."""
        now = time.monotonic()
        self.seconds.append(round(now - self.began, 2))
        self.began = now
        if self.unsaved and schedule.is_due(self.epoch, self.args.save_freq, self.args.epochs):
            self._save("checkpoint.pth")
        self.unsaved = None
        self._describe()

    def _save(self, name):
        state = {"scaler": self.loss_scaler.state_dict(), **self.unsaved,  # 1d38fa4 has no scaler
                 "args": vars(self.args),  # a plain dict: torch.load reads it with weights_only
                 "max_accuracy": self.best_accuracy, "recipe": self.recipe,
                 "seconds": self.seconds}
        self.folder.save(name, state)

    def _describe(self):
        """Tell report.py what ``log.txt`` does not."""
        self.folder.describe({
            "recipe": self.recipe, "training images": len(self.datasets[True][0]),
            "test images": len(self.datasets[False][0]), "seconds": self.seconds})

    def finish(self):
        """Write what is left to write; end the data workers and the process group."""
        if self.epoch is not None:
            self.commit()
        self.loaders.close()
        if schedule.is_distributed():
            torch.distributed.destroy_process_group()

    def _begin(self, model, data_loader, optimizer, device, loss_scaler, model_ema):
        if len(data_loader) == 0:
            self._refuse_empty_epoch(len(data_loader.dataset))
        if self.processes > 1:
            self._check_same_start(device)
        if self.continues:
            self._put_back_weights(model)
            self._restore(optimizer, loss_scaler, model_ema)
        summary.show(self, len(data_loader), builtins.print)
        self.began = time.monotonic()
        self._describe()
        self.start = None  # its memory is not needed any more

    def _check_same_start(self, device):
        """Nodes that share no folder would continue from different epochs."""
        mine = torch.tensor([self.args.start_epoch], device=device)
        earliest = mine.clone()
        torch.distributed.all_reduce(earliest, op=torch.distributed.ReduceOp.MIN)
        latest = mine.clone()
        torch.distributed.all_reduce(latest, op=torch.distributed.ReduceOp.MAX)
        if earliest.item() != latest.item():
            raise Refusal(f"process {self.rank} would start at epoch {mine.item()}, others at "
                          f"{earliest.item()} to {latest.item()}: --output_dir must be one folder "
                          "that all nodes share")

    def _put_back_weights(self, model):
        """DeiT (e6b10b5, HEAD) loads ``--finetune`` over the weights of the run that goes on."""
        if self.start is not None and getattr(self.args, "finetune", ""):
            weights.load(getattr(model, "module", model), self.start["model"], self.start_path,
                         self.args.model, head_may_miss=False)

    def _restore(self, optimizer, loss_scaler, model_ema):
        """Go on as if never stopped: optimizer with its learning rate, weight average, loss scale.

        HEAD's own resuming is one epoch ahead in the learning rate; 1d38fa4 and e6b10b5 do not
        restore the average, and 1d38fa4 has no loss scale.
        """
        optimizer.load_state_dict(self.start["optimizer"])
        if model_ema is not None and not self.start.get("model_ema"):
            raise Refusal(f"{self.start_path} has no weight average to go on with: pass "
                          "--no-model-ema, as the run that wrote it")
        if model_ema is not None:
            model_ema.ema.load_state_dict(self.start["model_ema"])
        if self.start.get("scaler"):
            loss_scaler.load_state_dict(self.start["scaler"])
        # Else the augmentation of the first epochs would be drawn again.
        seed = self.args.seed + self.rank + self.processes * self.args.start_epoch
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
