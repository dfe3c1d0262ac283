"""One fine-tuning run: the methods that replace DeiT's functions while its ``main(args)`` runs."""
import copy
import os
import random
import shlex
import sys
import time
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any, Dict, NamedTuple, Tuple

import torch
import torch.distributed

from . import accumulation, errors, job, loaders, provenance, weights
from .data import Data, evaluated_on, kind_of_accuracy
from .errors import UserError, one_line
from .evaluation import Evaluation, evaluate, gather, worst_classes, write_predictions
from .narrator import Narrator, saved
from .run_folder import PREDICTIONS, RunFolder

REPLACED = ("build_dataset", "create_model", "create_scheduler", "train_one_epoch", "evaluate")


class Trained(NamedTuple):
    """What ``Run.train_one_epoch`` leaves to ``Run.evaluate``, which DeiT calls next."""

    epoch: int  # from 0
    stats: Dict[str, float]
    parts: Dict[str, Any]  # whatever has a state_dict, by its key in the checkpoint


class Run:
    """The methods in REPLACED replace the functions of DeiT's main.py that they are named after.

    DeiT's main(args) calls, in this order on every commit:

    1. utils.init_distributed_mode. Afterwards all ranks can communicate, and print() is silent in
       all ranks but 0. Ours makes sure that all machines train the same.
    2. manual_seed of torch and NumPy, with --seed + rank.
    3. build_dataset, for train and test. Ours returns the images that were built before.
    4. DataLoader, for train and test. DeiT's loaders are never iterated; ours take over their
       kind of sampler, their batch size and their number of workers.
    5. create_model. Ours loads the weights here: step 6 copies the model, and every commit loads
       its own --resume only after that.
    6. ModelEma copies the model.
    7. DistributedDataParallel, create_optimizer, create_scheduler.
    8. train_one_epoch, for each epoch. Before the first, ours restores the state of optimizer, loss
       scaler, EMA and learning rate, which exist only now, and begins to write to --output_dir.
    9. lr_scheduler.step. So each epoch but the first trains with the rate scheduled for the one
       before.
    10. evaluate, the last step of an epoch. So ours also ends the epoch: log.txt gets its line,
        then the checkpoint is written. DeiT writes neither, since its args have no output_dir.

    deit_main: DeiT's main, as deit.import_main returns it.
    """

    def __init__(self, deit_main: ModuleType, decided: job.Job, data: Data) -> None:
        self.job, self.args, self.data = decided, decided.args, data
        self.start, self.folder = decided.start, RunFolder(decided.args.output_dir)
        self.deit_main = deit_main
        self.deit = SimpleNamespace(**vars(deit_main))  # its functions, which run_deit replaces
        self.connect = deit_main.utils.init_distributed_mode
        self.state = {}  # create_model reads it; _begin restores optimizer, EMA and so on from it
        self.train_loader = self.test_loader = None  # created once and kept, with their workers
        self.sampler = self.scheduler = self.trained = self.narrator = None
        self.places = []  # host, device and versions of each rank
        self.rows, self.best = list(self.start.rows), None  # of all epochs so far
        if self.start.best:
            self.best = {name: self.start.best[name] for name in ("epoch", "acc1")}

    def run_deit(self) -> None:
        """Run DeiT's ``main`` with this run's methods in place of its functions."""
        for name in REPLACED:
            setattr(self.deit_main, name, getattr(self, name))
        self.deit_main.utils.init_distributed_mode = self.init_distributed_mode
        # DeiT's main would print an accuracy of 0 for epochs without evaluation, and its utils and
        # engine print a line every 10 batches.
        others = () if self.args.verbose else (self.deit_main.utils, sys.modules["engine"])
        for module in (self.deit_main, *others):
            module.print = lambda *_, **__: None
        random.seed(self.args.seed + self.args.rank)  # DeiT seeds torch and NumPy only
        self.deit_main.main(job.for_deit(self.job))
        if self.args.rank == 0 and not self.args.eval:
            self.folder.end()
            path = self.folder.path
            if self.best:
                print(f"Best {kind_of_accuracy(self.args)}: {self.best['acc1']:.2f} % after epoch "
                      f"{self.best['epoch'] + 1}, {path / 'best_checkpoint.pth'}\n"
                      f"Table and curves: python scripts/report.py {shlex.quote(str(path))}")
            else:
                own = path / "checkpoint.pth"
                print(f"Trained without evaluation: {own}\nLabel photos: python "
                      f"scripts/predict.py --resume {shlex.quote(str(own))} PHOTOS")

    # What DeiT calls, in its order

    def init_distributed_mode(self, args: Namespace) -> None:
        """Connect the processes, and learn where they run.

        Raises UserError if another machine was launched differently: it would train another model,
        or the machines would wait for each other forever.
        """
        self.connect(args)
        place = {**provenance.of_process(self.args), **self.job.launch["versions"]}
        everyone = provenance.of_everyone({**job.shared(self.job), "place": place},
                                          self.args.device)
        self.places = [facts.pop("place") for facts in everyone]
        for other, facts in enumerate(everyone):
            different = job.differing(everyone[self.args.rank], facts, f"rank {other}")
            if different:
                raise UserError(
                    f"rank {self.args.rank} has {', '.join(different)}: launch with the same "
                    "flags, data, code and versions and one shared --output_dir on all machines")
        if self.args.rank and os.environ.get("LOCAL_RANK") == "0":  # the first on another machine
            sys.stdout.write(f"This machine has joined: {self.places[0]['host']} prints the "
                             f"progress of all {len(everyone)} processes\n")
            sys.stdout.flush()

    def build_dataset(self, is_train: bool, args: Namespace) -> Tuple[Any, int]:
        """The images that were decided on, and the number of classes."""
        dataset = self.data.train if is_train else self.data.test
        if dataset is None:  # with --eval or --eval-freq 0. DeiT needs some; a copy, since
            dataset = copy.copy(self.data.test or self.data.train)  # --ThreeAugment changes it
        return dataset, len(self.data.classes)

    def create_model(self, name: str, **kwargs: Any) -> torch.nn.Module:
        """Create the model and load its weights."""
        self.state = weights.read_again(self.start.path, self.start.mark, self.args.trust)
        kwargs.pop("img_size", None)  # which only DeiT HEAD passes
        model = weights.create(name, self.args.input_size, self.deit.create_model, **kwargs)
        weights.load_into(model, self.state["model"], self.start.path, name)
        return model

    def create_scheduler(self, args: Namespace, optimizer: torch.optim.Optimizer
                         ) -> Tuple[Any, int]:
        """Create DeiT's scheduler, and keep it: it is set when a run goes on, and saved."""
        self.scheduler, epochs = self.deit.create_scheduler(args, optimizer)
        return self.scheduler, epochs

    def train_one_epoch(self, model: torch.nn.Module, criterion: Any, data_loader: Any,
                        optimizer: torch.optim.Optimizer, device: torch.device, epoch: int,
                        loss_scaler: Any, max_norm: float, model_ema: Any, *mixup_fn: Any,
                        **kwargs: Any) -> Dict[str, float]:
        """Train with DeiT's function, on persistent data workers and with accumulated batches."""
        parts = {"model": getattr(model, "module", model), "optimizer": optimizer,
                 "lr_scheduler": self.scheduler, "scaler": loss_scaler,
                 "model_ema": model_ema and model_ema.ema}
        if self.train_loader is None:
            self._begin(parts)
            self.sampler = loaders.Batches(data_loader, self.args)
            self.train_loader = loaders.training(data_loader, self.sampler)
        began = time.monotonic()
        self.sampler.set_epoch(epoch)  # before iter, which begins to fetch batches
        batches = iter(self.train_loader)  # draws a number from torch's generator, so seed after it
        if epoch > 0:
            loaders.seed_process(self.args, epoch)
        step = accumulation.Step(self.args.accum_iter)
        scaler = accumulation.Scaler(loss_scaler, optimizer, step)
        ema = model_ema and accumulation.Ema(model_ema, step)
        number = len(self.train_loader)
        batches = self.narrator.follow(batches, number, "batch", self.args.batch_size, scaler)
        loader = accumulation.Loader(batches, number, model, step)
        try:
            stats = self.deit.train_one_epoch(
                model, criterion, loader, accumulation.Optimizer(optimizer), device, epoch, scaler,
                max_norm, ema, *mixup_fn, **kwargs)
        except SystemExit as stop:  # at every commit, DeiT exits only when the loss is not finite
            raise FloatingPointError("the loss is not finite, so DeiT stopped: pass a smaller "
                                     "--lr, and look at the data with --check") from stop
        stats["seconds"] = round(time.monotonic() - began, 2)
        self.trained = Trained(epoch, stats, parts)
        return stats

    def evaluate(self, data_loader: Any, model: torch.nn.Module, device: torch.device
                 ) -> Dict[str, float]:
        """Evaluate over all processes, if it is due, and end the epoch; or report, with --eval."""
        if self.test_loader is None and self.data.test:
            self.test_loader = loaders.evaluation(data_loader, self.args)
        if self.args.eval:
            self.narrator = Narrator(self.job)
            self._report(self._evaluate(model, device))
        else:
            began, stats = time.monotonic(), {}
            if self._is_due(self.args.eval_freq):
                found = self._evaluate(model, device)
                self._write_predictions(str(self.folder.path / PREDICTIONS), found)
                stats = {**found.stats, "seconds": round(time.monotonic() - began, 2)}
            self._end_epoch(stats, sum(parameter.numel() for parameter in model.parameters()
                                       if parameter.requires_grad))
        return {"acc1": 0.0}  # DeiT takes it for its own lines and files, which there are none of

    # What happens in between

    def _evaluate(self, model: torch.nn.Module, device: torch.device) -> Evaluation:
        batches = self.narrator.follow(self.test_loader, len(self.test_loader), "test batch",
                                       self.test_loader.batch_sampler.batch_size, scaler=None)
        return evaluate(model, batches, device, len(self.data.classes))

    def _report(self, found: Evaluation) -> None:
        """Say what --eval found, and write --predictions."""
        self.narrator.say(f"{self.start.path}: {self.narrator.in_words(found.stats)} on "
                          f"{evaluated_on(self.data, self.args)}\n"
                          f"worst classes: {worst_classes(found, self.data.classes)}")
        if self.args.predictions:
            self._write_predictions(self.args.predictions, found)
            self.narrator.say(f"predictions: {self.args.predictions}")

    def _write_predictions(self, path: str, found: Evaluation) -> None:
        predictions = gather(found.predictions, len(self.data.test), self.args.world_size)
        if self.args.rank == 0:
            write_predictions(path, predictions, self.data, self.args)

    def _require_layer_decay(self, parts: Dict[str, Any]) -> None:
        """Raise UserError if this commit of DeiT hides the layers from timm."""
        wanted = self.deit.create_optimizer(self.args, parts["model"])
        scales = [{id(weight): group.get("lr_scale") for group in optimizer.param_groups
                   for weight in group["params"]} for optimizer in (parts["optimizer"], wanted)]
        if scales[0] != scales[1]:
            raise UserError(f"--layer-decay {self.args.layer_decay}: this commit of DeiT hands "
                            "timm a wrapped model, whose layers it does not know: use a newer one")

    def _begin(self, parts: Dict[str, Any]) -> None:
        """Restore what exists only now, and begin to write to --output_dir."""
        if self.args.layer_decay is not None:
            self._require_layer_decay(parts)
        if self.start.epoch:  # no commit of DeiT restores all of this correctly
            try:
                for name in ("optimizer", "model_ema", "scaler"):
                    if parts[name] is not None and self.state.get(name):  # 2020's has no scaler
                        # A copy: optimizers keep tensors that they are given, and these are mapped
                        # to the old checkpoint, whose space on the disk would not be freed.
                        parts[name].load_state_dict(copy.deepcopy(self.state[name]))
            except ValueError as error:  # DeiT of 2020 groups the parameters in another way
                raise UserError(f"{self.start.path} was written with another DeiT commit "
                                f"({one_line(error)}): set DEIT_DIR to the same") from error
            self.scheduler.step(self.start.epoch - 1)  # the rate by this run's own schedule
        self.state = {}  # frees its memory
        self.narrator = Narrator(self.job)
        if self.args.rank == 0:
            self.folder.begin(self.job, provenance.in_words(self.places))

    def _is_due(self, every: int) -> bool:
        """Whether what is done every ``every`` epochs and after the last is due."""
        done = self.trained.epoch + 1
        return every > 0 and (done % every == 0 or done == self.args.epochs)

    def _end_epoch(self, tested: Dict[str, float], n_parameters: int) -> None:
        """Log what the epoch came to, write checkpoint.pth if it is due, and say it."""
        if self.args.rank != 0:
            return
        epoch, stats, parts = self.trained
        row = {**{f"train_{name}": value for name, value in stats.items()},
               **{f"test_{name}": value for name, value in tested.items()},
               "epoch": epoch, "n_parameters": n_parameters}
        is_best = bool(tested) and (self.best is None or tested["acc1"] > self.best["acc1"])
        if is_best:
            self.best = {"epoch": epoch, "acc1": tested["acc1"]}
        self.rows.append(row)
        self.folder.log(row)
        if is_best or self._is_due(self.args.save_freq):
            self.folder.save({
                **{name: part and part.state_dict() for name, part in parts.items()},
                "epoch": epoch, "rows": self.rows, "best": self.best, "settings": self.job.settings,
                "classes": self.data.classes, "origin": self.start.origin,
                "parent": self.start.parent, "launches": self.folder.launches,
                "args": vars(self.args)})  # a plain dict, which weights_only loads
            if is_best:
                self.folder.name_best()
            errors.write_status(saved(self.args, epoch + 1))
        # Last, since it raises OSError if the output goes to a full disk.
        self.narrator.say_epoch(row, self.best["acc1"] if self.best else 0)
