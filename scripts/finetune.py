#!/usr/bin/env python3
"""Decides what a launch does, refuses what cannot work, describes the run, and launches it.

One process on each machine does this, without a GPU. torch's launcher then starts
deit_plugin/worker.py for each process, which trains what was decided: see deit_plugin/job.py.
"""
import os
import shlex
import signal
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any, Callable, Dict, List, NamedTuple, Optional

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import errors  # noqa: E402 (the others need torch, which --help does not)

USAGE = """\
usage: scripts/{cifar10,cifar100,flowers,pets,imagenet}.sh --resume CONVERTED --data-path FOLDER
           --output_dir FOLDER [any flag of DeiT's]

Fine-tunes a converted MoCo v3 checkpoint with DeiT, using the published recipe. Your own flags
override the recipe. The same command again continues a run that was stopped.

  --accum-iter N     for fewer GPUs: accumulate N batches per process for one optimizer step
  --data-set folder  your own images, in train/CLASS/ and val/CLASS/ below --data-path
  --download         download Flowers or Pets if they are missing
  --hold-out SHARE   evaluate on a share of the train images instead of the test images
  --eval             evaluate a run's checkpoint, given by --resume; train nothing
  --overwrite        start from scratch and delete the run that is in --output_dir
  --check            check everything a launch needs, and every image; train nothing
  --dry-run          print torch's command and every flag, and stop
  --all-flags        list every flag, DeiT's and ours

environment variables and their defaults:
  DEIT_DIR           the DeiT checkout (default: the folder that this bundle was copied into)
  PYTHON             the Python to use (default: python3)
  NPROC_PER_NODE     processes on this machine, one per GPU (default: 8; with --eval: 1)
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                     for several machines: their number (default: 1), this one's number from 0,
                     the address and a free port (default: 29500) of the first"""


class Decision(NamedTuple):
    """What a command line came to; where there is a problem, some of it is None."""

    args: Namespace  # see flags.py
    machines: Optional[Any]  # a launcher.Machines
    gpus: Optional[str]  # a description
    data: Optional[Any]  # a data.Data
    model: Optional[Any]  # on the CPU, with the weights
    decided: Optional[Any]  # a job.Job
    must_download: bool  # whether data must be downloaded before all can be decided
    problems: List[str]


class Problems(list):
    """What is wrong with a launch, each in one line."""

    def ask(self, question: Callable, *arguments: Any) -> Any:
        """The answer; None if it is a problem, or if an argument is None because of one."""
        if any(argument is None for argument in arguments):
            return None
        try:
            return question(*arguments)
        except errors.UserError as error:
            self.extend(error.args)
        except OSError as error:  # such as a path that is too long
            self.append(errors.one_line(error))
        return None


def decide(deit_main: ModuleType, words: List[str]) -> Decision:
    """Decide what a launch with this command line does; read only, and create nothing.

    deit_main: DeiT's main. All problems are collected, but UserError is raised for words that
    cannot be parsed.
    """
    from deit_plugin import data, evaluation, flags, launcher, run_folder, weights

    problems = Problems()
    ask, parser = problems.ask, flags.parser_for(deit_main)
    given = flags.parse(parser, words)
    path, continues = ask(run_folder.choose_checkpoint, given.args) or (None, None)
    state = ask(run_folder.read_checkpoint, path, continues, given.args)
    if given.args.eval and state:
        given = flags.inherit(parser, given, state.get("settings", {}))
    machines = ask(launcher.find_machines, os.environ, 1 if given.args.eval else flags.PROCESSES)
    args = flags.complete(given.args, machines.world_size if machines else 1)
    given = given._replace(args=args)
    wrong_flags = flags.problems(parser, given)
    problems.extend(wrong_flags)
    gpus = ask(launcher.require_gpus, args.device, machines, args.check)
    if args.output_dir and not args.eval:
        ask(run_folder.RunFolder(args.output_dir).check)
    start = ask(run_folder.start_from, path, continues, state, args)
    images, must_download = None, False
    if args.data_set and args.data_path and (state or not args.eval):
        must_download = data.must_download(args)
        images = None if must_download else ask(data.load, args)
    # From here on, what was found wrong above would only be said again in other words.
    usable, decided = args, None
    if wrong_flags:
        usable = Namespace(**{**vars(parser.parse_args([])), "model": args.model, "opt": args.opt})
    else:
        decided = ask(make_job, given, images, start, state, machines)
    model = ask(create_model, deit_main, usable, number_of_classes(images, state))
    ask(create_optimizer, deit_main, usable, model)
    if decided or not images:
        ask(weights.load_into, model, state and state["model"], path, args.model)
    if args.predictions:
        ask(evaluation.check_predictions, args.predictions, path)
    return Decision(args, machines, gpus, images, model, decided, must_download, problems)


def number_of_classes(images: Any, state: Optional[Dict[str, Any]]) -> int:
    """The number of the data's classes or, without data, of the checkpoint's, or 1000."""
    from deit_plugin import weights

    if images:
        return len(images.classes)
    return len((state or {}).get("model", {}).get(weights.HEAD[0], range(1000)))


def make_job(given: Any, images: Any, start: Any, state: Dict[str, Any], machines: Any) -> Any:
    """The job.Job. Raises UserError if data and checkpoint do not suit the flags.

    given: a flags.Given; state: the content of the checkpoint that is started from.
    """
    from deit_plugin import flags, job, provenance, run_folder

    settings = job.settings_of(given.args, images)
    made = job.Job(given.args, settings, job.published_settings(given),
                   run_folder.changed_since(start, state, settings), images.classes, start,
                   provenance.of_launch(flags.command(given)))
    run_folder.require_agreement(made, state)
    return made


def create_model(deit_main: ModuleType, args: Namespace, classes: int) -> Any:
    """DeiT's model."""
    from deit_plugin import weights

    return weights.create(args.model, args.input_size, deit_main.create_model, num_classes=classes,
                          drop_rate=args.drop, drop_path_rate=args.drop_path)


def create_optimizer(deit_main: ModuleType, args: Namespace, model: Any) -> None:
    """Try to create DeiT's optimizer. Raises UserError."""
    try:
        optimizer = deit_main.create_optimizer(args, model)
    except Exception as error:  # timm raises almost anything
        raise errors.UserError(f"--opt {args.opt}: timm cannot create this optimizer: "
                               f"{errors.one_line(error)}; pass adamw, as the recipes do"
                               ) from error
    if args.layer_decay is not None and not any("lr_scale" in group
                                                for group in optimizer.param_groups):
        raise errors.UserError(f"--layer-decay {args.layer_decay}: this timm ignores it: type "
                               f"{sys.executable} -m pip install 'timm>=0.6'")


def launch(deit_main: ModuleType, words: List[str]) -> int:
    """Do what the command line says; return the exit status. Raises UserError."""
    from deit_plugin import check, data, job, launcher, narrator, run_folder

    found = decide(deit_main, words)
    if found.must_download and not found.problems and not found.args.dry_run:
        data.download(found.args)
        found = decide(deit_main, words)
    args, machines, decided = found.args, found.machines, found.decided
    if args.check and not args.dry_run:
        return check.check(found)
    if found.problems:
        raise errors.UserError(*found.problems)
    if args.dry_run:
        show(deit_main, args, machines)
        return 0
    if decided.start.epoch >= args.epochs:
        if decided.start.best and not machines.node_rank:  # a kill may have prevented it
            run_folder.RunFolder(args.output_dir).name_best(decided.start.best["path"])
        print(f"{decided.start.path} has all {args.epochs} epochs: nothing left to train; for "
              "more, pass it to --resume, with more --epochs and another --output_dir")
        return 0
    if not machines.node_rank and not args.eval:
        print(narrator.describe(decided, found.data), flush=True)
    with launcher.temporary_folder() as folder:
        job.write(decided, folder)
        data.write(found.data, folder)
        del found  # its memory
        saved = narrator.saved(args, decided.start.epoch) if decided.start.continues else ""
        return launcher.launch(machines, folder, args, saved)


def show(deit_main: ModuleType, args: Namespace, machines: Any) -> None:
    """Print torch's command, and every flag with its value, to be compared with a recipe's."""
    from deit_plugin import flags, launcher

    words = flags.all_words(flags.parser_for(deit_main), args)
    print(f"torch's launcher:\n  {shlex.join(launcher.command(machines, 'FOLDER'))}\n"
          f"DeiT's flags, and this bundle's:\n  {shlex.join(['main.py', *words])}")


def main() -> None:
    """Fine-tune, with the flags on the command line."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        print(USAGE)
        return
    from deit_plugin import launcher

    launcher.prepare()
    signal.signal(signal.SIGINT, launcher.interrupted_while_deciding)
    from deit_plugin import deit

    sys.exit(launch(deit.import_main(), words))


if __name__ == "__main__":
    errors.guard(main)
