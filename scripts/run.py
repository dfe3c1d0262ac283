"""One fine-tuning run: what stands in for DeiT's functions while DeiT's ``main()`` runs it."""
import builtins
import copy
import os
import time

import numpy as np
import torch
import torch.distributed

import options
import schedule
import summary
import weights
from checkpoints import RunFolder
from datasets import DATA_SETS
from failures import Refusal

# What may differ between a run and its continuation; all else is the recipe.
NOT_RECIPE = {"output_dir", "data_path", "device", "num_workers", "pin_mem", "dist_url",
              "world_size", "batch_size", "start_epoch", "resume", "eval", "eval_freq",
              "save_freq", "overwrite", "download", "check", "dist_eval", "distributed"}


class Run:
    """Every public method named like a function of DeiT's stands in for it, on all commits."""

    def __init__(self, main, args):
        self.main = main
        self.args = args
        self.rank, self.processes = options.rank_and_processes()
        if args.check:
            self.processes = options.planned_processes()
        self.recipe = self._recipe()
        self.resume, args.resume = args.resume, ""  # DeiT's own loading is late, and too strict
        args.dist_eval = False  # DeiT warns that it counts images twice; here none is
        self.folder = RunFolder(args.output_dir, writes=self.rank == 0 and not args.eval)
        self.loaders = schedule.LastingLoaders()
        self.datasets = {}
        self.start = self.start_path = None  # the checkpoint this run starts or continues from
        self.parameters = None  # of the model, once it is made
        self.epoch = None  # the one in training; None before the first
        self.unsaved = None  # the state after self.epoch, until its line is in log.txt
        self.best_accuracy = 0.0
        self.seconds = []  # of each epoch, evaluation and saving included
        self.evaluated = True
        self.deit = {name: getattr(main, name)
                     for name in ("build_dataset", "create_model", "train_one_epoch",
                                  "get_state_dict")}

    def stand_in(self):
        """Put this run's methods in the place of DeiT's functions."""
        for name in ("build_dataset", "create_model", "train_one_epoch", "evaluate", "print",
                     "get_state_dict"):
            setattr(self.main, name, getattr(self, name))
        self.main.utils.save_on_master = self.save_on_master

    def _recipe(self):
        recipe = {name: value for name, value in vars(self.args).items() if name not in NOT_RECIPE}
        recipe["images a step"] = self.processes * self.args.batch_size
        recipe["resume"] = os.path.basename(self.args.resume)
        return recipe

    # Before the process group is made

    def prepare(self):
        """Check all that can be checked before the GPUs are taken. Raises Refusal."""
        for _, check in self.checks():
            check()
        self.folder.begin(self.args.start_epoch, self.args.overwrite)

    def checks(self):
        """Names and functions; each raises Refusal, or returns in words what it found."""
        return (("processes", self._check_processes), ("data set", self._build_datasets),
                ("output", self._check_output), ("start", self._find_start),
                ("optimizer", self._check_optimizer), ("model", self._make_model),
                ("disk", self._check_space))

    def _check_processes(self):
        if not self.args.device.startswith("cuda"):
            return f"on {self.args.device}"
        gpus = torch.cuda.device_count()
        if gpus == 0 and self.args.check:
            return "this machine has no GPU, so they could not be counted"
        if gpus == 0:
            raise Refusal("no GPU found: pass --device cpu to rehearse without one "
                          "(and NPROC_PER_NODE=2, say)")
        told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("NPROC_PER_NODE") or "1"
        wanted = options.whole_number("NPROC_PER_NODE", told)
        if wanted > gpus:
            raise Refusal(f"{wanted} processes are more than the {gpus} GPUs of this machine: set "
                          f"NPROC_PER_NODE={gpus}")
        return f"{wanted} on {gpus} GPUs"

    def _build_datasets(self):
        for is_train in (True, False):
            try:
                self.datasets[is_train] = self.deit["build_dataset"](is_train=is_train,
                                                                     args=self.args)
            except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
                raise Refusal(str(error)) from error
        (training, classes), (test, _) = self.datasets[True], self.datasets[False]
        if -(-len(training) // self.processes) < self.args.batch_size and not self.args.eval:
            self._refuse_empty_epoch(len(training))
        return f"{len(training)} training and {len(test)} test images, {classes} classes"

    def _refuse_empty_epoch(self, images):
        raise Refusal(f"no full batch in an epoch: {images} training images over "
                      f"{self.processes} processes are less than --batch-size "
                      f"{self.args.batch_size} each; use fewer processes or a smaller batch")

    def _check_output(self):
        if not self.args.output_dir:
            return "no --output_dir: nothing is saved"
        if self.args.check:
            return self.folder.check_writable()
        self.folder.claim()
        return str(self.folder.path)

    def _find_start(self):
        """Continue what ``--output_dir`` holds, or else start from ``--resume``."""
        finetune = getattr(self.args, "finetune", "")
        if self.args.overwrite:
            self._check_kept(self.resume, finetune)
        fresh = self.args.eval or self.args.overwrite
        self.start = None if fresh else self.folder.previous()
        if self.start is not None:
            self.start_path = str(self.folder.path / "checkpoint.pth")
        elif self.resume:
            self.start, self.start_path = weights.read(self.resume), self.resume
        elif finetune and not finetune.startswith("https"):
            weights.read(finetune, "--finetune")  # DeiT loads it
        elif self.args.eval and not finetune:
            raise Refusal("--eval needs --resume with a checkpoint of a fine-tuning run")
        if self.continues:
            self._check_same_recipe()
            self.args.start_epoch = self.start["epoch"] + 1
            self.best_accuracy = self.folder.best_accuracy(self.start)
            self.seconds = self.start.get("seconds", [])
        return self.start_path or finetune or "random weights (no --resume)"

    def _check_kept(self, *paths):
        for path in filter(None, paths):
            if self.folder.holds(path):
                raise Refusal(f"--overwrite would delete {path}, which this run starts from: move "
                              "it, or choose another --output_dir")

    def _check_optimizer(self):
        """Make optimizer and schedule of a stand-in model: timm's error says what it has not."""
        args = copy.copy(self.args)
        try:
            optimizer = self.main.create_optimizer(args, torch.nn.Linear(1, 1))
            schedule_of_rates, _ = self.main.create_scheduler(args, optimizer)
        except Exception as error:  # which one differs between timm's versions
            raise Refusal(f"--opt {args.opt}, --sched {args.sched}: cannot be made "
                          f"({type(error).__name__}: {error})") from error
        if schedule_of_rates is None:
            raise Refusal(f"--sched {args.sched}: timm has no schedule of that name")
        return f"{args.opt}, {args.sched}"

    def _make_model(self):
        """Make the model and load its weights; DeiT gets it, and the random state, when it asks.

        Made from DeiT's own seed, it is the one that DeiT would make then.
        """
        torch.manual_seed(self.args.seed + self.rank)
        before = torch.get_rng_state()
        _, classes = DATA_SETS[self.args.data_set]
        arguments = self._model_arguments(
            num_classes=classes, drop_rate=self.args.drop, drop_path_rate=self.args.drop_path,
            img_size=self.args.input_size)
        self.model = self._create_model(self.args.model, arguments)
        self.prepared = arguments, before, torch.get_rng_state()
        self.parameters = sum(value.numel() for value in self.model.parameters())
        return f"{self.args.model}, {self.parameters:,} parameters"

    def _check_space(self):
        if self.args.eval or not self.args.output_dir or self.rank:
            return "nothing is saved"
        if not self.parameters:
            raise Refusal("cannot be judged, since there is no model")
        return self.folder.check_space(self.parameters)

    @property
    def continues(self):
        """Whether the start is a run's own checkpoint, with its optimizer, and training goes on."""
        return (self.start is not None and not self.args.eval
                and "optimizer" in self.start and "epoch" in self.start)

    @property
    def is_over(self):
        """Whether the run in ``--output_dir`` has trained all its epochs."""
        return self.continues and self.args.start_epoch >= self.args.epochs

    def _check_same_recipe(self):
        before = dict(self.start.get("recipe", {}))
        if not self.folder.holds(self.start_path):  # by the user's own word, another run's
            before = {name: before[name] for name in before if name == "opt"}
        elif self.folder.holds(self.resume):  # as one continues with DeiT alone
            before.pop("resume", None)
        differing = [f"{options.flag(name)} {self.recipe.get(name)!r} (there: {before[name]!r})"
                     for name in before if self.recipe.get(name) != before[name]]
        if differing:
            raise Refusal(f"{self.start_path} is of a run of another recipe: "
                          f"{', '.join(differing)}; choose another --output_dir, or pass "
                          "--overwrite to delete the run that it holds and start anew")

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

    def _model_arguments(self, **kwargs):
        """What differs from a model's defaults; 1d38fa4 and e6b10b5 do not pass img_size."""
        size = self.args.input_size
        is_default = size == 224 or self.args.model.endswith(f"_{size}")
        kwargs["img_size"] = None if is_default else size
        return {name: value for name, value in kwargs.items() if value not in (None, False)}

    def _create_model(self, name, arguments):
        try:
            model = self.deit["create_model"](name, **arguments)
        except (RuntimeError, KeyError) as error:
            raise Refusal(f"--model {name}: neither DeiT nor timm has a model of that name "
                          f"({error})") from error
        except TypeError as error:
            raise Refusal(f"--model {name}: cannot be made with {arguments} ({error})") from error
        self.headless = False
        if self.start is not None:
            self.headless = weights.load(
                model, self.start["model"], self.start_path, name,
                head_may_miss=not (self.args.eval or self.continues))
        return model

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
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _begin(self, model, data_loader, optimizer, device, loss_scaler, model_ema):
        if len(data_loader) == 0:
            self._refuse_empty_epoch(len(data_loader.dataset))
        if self.processes > 1:
            self._check_same_start(device)
        if self.continues:
            self._put_back_weights(model)
            self._restore(optimizer, loss_scaler, model_ema)
        summary.show(self, data_loader, optimizer, builtins.print)
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
