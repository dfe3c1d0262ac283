"""``--check``: all that a launch needs, and every image, without training."""
import sys

import torch
from torch.hub import tqdm

from . import options
from .errors import REFUSED, UserError, die_with_parent, one_line
from .loaders import steps_per_epoch
from .output import RunFolder
from .run import Run

BROKEN_SHOWN = 20


class Checklist:
    """Says each outcome in a line; counts what is not ready."""

    def __init__(self):
        self.problems = 0

    def ask(self, what, check, *arguments):
        """The value of ``check(*arguments)``, or None if it raised UserError."""
        try:
            found = check(*arguments)
        except UserError as error:
            self.problems += 1
            print(f"PROBLEM  {what}: {error}", flush=True)
            return None
        if isinstance(found, str):
            print(f"ok       {what}: {found}", flush=True)
        return found


def report(main, args):
    """Check everything; exit with 2 if a launch would fail. What follows from a problem is left out.

    main: DeiT's module; args: options.parse's.
    """
    checklist, folder = Checklist(), RunFolder(args, rank=0)
    checklist.ask("GPUs", _gpus, args)
    checklist.ask("output", folder.check)
    start = checklist.ask("start", folder.find_start, args)
    run = Run(main, args, folder, start)
    train = checklist.ask("train images", run.build_dataset, True, args)
    test = checklist.ask("test images", run.build_dataset, False, args)
    if start:
        print(f"ok       start: {start.path}")
    if train and start:
        checklist.ask("model", _model, run, train)
    found = [built[0] for built in (train, test) if built]
    if found:
        checklist.ask("images", decode, found, args.num_workers)
    if train:
        _show_settings(args, steps_per_epoch(len(train[0]), args, run.processes))
    if checklist.problems:
        print(f"not ready: {options.count(checklist.problems, 'problem')}")
        sys.exit(REFUSED)
    print("ready")


def _gpus(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        return "this machine has none, so they were not counted"
    return options.check_gpus(args)


def _model(run, train):
    args = run.args
    model = run.create_model(args.model, num_classes=train[1], drop_rate=args.drop,
                             drop_path_rate=args.drop_path)
    parameters = sum(value.numel() for value in model.parameters())
    return f"{args.model}, {parameters:,} parameters, {options.count(train[1], 'class')}"


def _show_settings(args, steps):
    print(f"         effective batch size: {options.batch_size_in_words(args, steps)}\n"
          f"         learning rate: {options.learning_rate_in_words(args)}\n"
          f"         settings differ from the published recipe: {', '.join(args.differs) or 'none'}")


def decode(datasets, num_workers):
    """Decode every image, in data workers; raises UserError listing the broken ones."""
    images = torch.utils.data.ConcatDataset([_Decoding(dataset) for dataset in datasets])
    loader = torch.utils.data.DataLoader(images, batch_size=16, collate_fn=list,
                                         num_workers=num_workers, worker_init_fn=die_with_parent)
    broken = []
    with tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty()) as bar:
        for errors in loader:
            broken += filter(None, errors)
            bar.update(len(errors))
    if not broken:
        return f"all {len(images)} can be decoded"
    listed = broken[:BROKEN_SHOWN]
    if len(broken) > BROKEN_SHOWN:
        listed.append(f"and {len(broken) - BROKEN_SHOWN} more")
    raise UserError("\n           ".join([f"{len(broken)} of {len(images)} cannot be decoded:",
                                          *listed]))


class _Decoding(torch.utils.data.Dataset):
    """Of each image of a data set, what is wrong with it: '' or one line that names its file."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.dataset.transform = None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            self.dataset[index]
            return ""
        except Exception as error:  # whatever it is, the image cannot be trained on
            return one_line(error)
