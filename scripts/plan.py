"""One fine-tuning run, as far as it can be made and checked before it takes the GPUs."""
import copy
import os

import torch
from timm.models import is_model

import options
import weights
from checkpoints import RunFolder
from datasets import DATA_SETS
from failures import Refusal

# What may differ between a run and its continuation; all else is the recipe.
NOT_RECIPE = {"output_dir", "data_path", "device", "num_workers", "pin_mem", "dist_url",
              "world_size", "batch_size", "start_epoch", "resume", "eval", "eval_freq",
              "save_freq", "overwrite", "download", "check", "dist_eval", "distributed"}


class Plan:
    """Data sets, model, start and folder of a run.

    main: DeiT's module; args: its argparse.Namespace from options.py, which is modified.
    """

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
        self.datasets = {}
        self.start = self.start_path = None  # the checkpoint this run starts or continues from
        self.model = self.parameters = None  # once it is made, and how many it has
        self.headless = False  # whether the start lacked the classifier head
        self.prepared = None  # what the model was made with, until DeiT asks for it
        self.best_accuracy = 0.0
        self.seconds = []  # of each epoch, evaluation and saving included
        self.deit = {name: getattr(main, name) for name in (
            "build_dataset", "create_model", "train_one_epoch", "get_state_dict")}

    def _recipe(self):
        recipe = {name: value for name, value in vars(self.args).items() if name not in NOT_RECIPE}
        recipe["images a step"] = self.processes * self.args.batch_size
        recipe["resume"] = os.path.basename(self.args.resume)
        return recipe

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
                          f"({type(error).__name__}: {error}); the recipes use adamw and cosine"
                          ) from error
        if schedule_of_rates is None:
            raise Refusal(f"--sched {args.sched}: timm has no schedule of that name; the recipes "
                          "use cosine")
        return f"{args.opt}, {args.sched}"

    def _make_model(self):
        """Make the model and load its weights; DeiT gets it, and the random state, when it asks.

        Made from DeiT's own seed, it is the one that DeiT would make then.
        """
        torch.manual_seed(self.args.seed + self.rank)
        before = torch.get_rng_state()
        arguments = self._model_arguments(
            num_classes=DATA_SETS[self.args.data_set].CLASSES, drop_rate=self.args.drop,
            drop_path_rate=self.args.drop_path, img_size=self.args.input_size)
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

    def _model_arguments(self, **kwargs):
        """What differs from a model's defaults; 1d38fa4 and e6b10b5 do not pass img_size."""
        size = self.args.input_size
        is_default = size == 224 or self.args.model.endswith(f"_{size}")
        kwargs["img_size"] = None if is_default else size
        return {name: value for name, value in kwargs.items() if value not in (None, False)}

    def _create_model(self, name, arguments):
        try:
            model = self.deit["create_model"](name, **arguments)
        except (RuntimeError, KeyError, TypeError) as error:
            if not is_model(name):
                raise Refusal(f"--model {name}: neither DeiT nor timm has a model of that name; "
                              "the recipes use deit_base_patch16_224") from error
            raise Refusal(f"--model {name}: cannot be made with {arguments} ({error})") from error
        if self.start is not None:
            self.headless = weights.load(
                model, self.start["model"], self.start_path, name,
                head_may_miss=not (self.args.eval or self.continues))
        return model
