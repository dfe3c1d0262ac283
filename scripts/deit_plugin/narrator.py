"""What a run prints: what it is, how far it is, and what it found."""
import os
import time
from argparse import Namespace
from collections import Counter
from datetime import timedelta
from typing import Any, Callable, Dict, Iterable, Iterator

import torch

from datasets import left_out_in_words

from .data import Data, count, evaluated_on, kind_of_accuracy, nested_in_words
from .data import describe as describe_data
from .flags import ACCURACIES
from .job import BATCH, STEPS, Job

SECONDS_BETWEEN_LINES = 30


def describe(job: Job, data: Data) -> str:
    """What is trained from what and how, in lines."""
    args, lines = job.args, []
    splits = data[:1] if args.hold_out else data  # whose two parts come from the same folders
    left_out = sum((getattr(split, "left_out", Counter()) for split in splits), Counter())
    if left_out:
        lines.append(left_out_in_words(left_out))
    if args.data_set == "folder" and data.train is not None:
        lines += filter(None, [nested_in_words(data.train)])
    if job.published:
        lines.append("settings that differ from the published recipe: "
                     f"{', '.join(job.differs) or 'none'}")
        if args.data_set in ("cifar10", "cifar100", "flowers", "pets") and args.reprob > 0:
            lines.append("random erasing acts here; MoCo v3's code ignores --reprob, so --reprob 0 "
                         "is as published, too")
    elif args.data_set != "folder" and args.data_set not in ACCURACIES:
        lines.append(f"no recipe was published for {args.data_set}")
    if job.changed is not None:
        lines.append(f"changed since {job.start.path}: {', '.join(job.changed) or 'nothing'}")
    return "\n  ".join([
        f"Fine-tuning {args.model} on {args.data_set}: {describe_data(data, args)}",
        f"start: {_describe_start(job)}",
        *([f"output: {args.output_dir}"] if args.output_dir else []),  # --check needs none
        f"effective batch size: {_describe_batch(job)}",
        f"learning rate: {_describe_rate(job)}",
        _describe_evaluation(data, args), *lines])


def _describe_start(job: Job) -> str:
    start, epochs = job.start, job.args.epochs
    if start.epoch >= epochs:
        return f"{start.path}, which has all {epochs} epochs: nothing is left to train"
    if start.epoch:
        return f"{start.path}, resumed: epoch {start.epoch + 1} of {epochs} comes next"
    if not start.origin["is_moco_v3"]:
        return (f"{start.path} (these are not MoCo v3's pretrained weights: their position "
                "embedding is learned, as in supervised or fine-tuned models)")
    return start.path if start.has_head else f"{start.path} (the classifier head is new)"


def _describe_batch(job: Job) -> str:
    args = job.args
    accumulated = f" x {args.accum_iter} accumulated" if args.accum_iter > 1 else ""
    return (f"{job.settings[BATCH]} = {count(args.world_size, 'process')} x {args.batch_size} "
            f"images{accumulated}; {count(job.settings[STEPS], 'step')} per epoch")


def _describe_evaluation(data: Data, args: Namespace) -> str:
    saved = f"checkpoint.pth every {count(args.save_freq, 'epoch')} and after the last"
    if not args.eval_freq:
        return f"no evaluation; {saved}"
    return (f"evaluation on {evaluated_on(data, args)} every {count(args.eval_freq, 'epoch')}; "
            f"{saved}, and when the accuracy is the best so far")


def _describe_rate(job: Job) -> str:
    args, rate, text = job.args, job.args.lr, f"{job.args.lr:g}"
    if not getattr(args, "unscale_lr", False):  # which only DeiT HEAD has
        rate = args.lr * job.settings[BATCH] / 512
        text += f" x {job.settings[BATCH]} / 512 = {rate:g}"
    if rate < args.min_lr and args.sched != "step":  # which never reaches --min-lr
        text += (f"; it will rise to --min-lr {args.min_lr:g}, which is larger: pass a larger "
                 "--lr or a smaller --min-lr")
    return text


class Narrator:
    """Prints in rank 0, for all processes. Its clock starts when it is made."""

    def __init__(self, job: Job) -> None:
        self.job, self.args, self.first_epoch = job, job.args, job.start.epoch
        self.began = time.monotonic()
        self.seconds_before = sum(row.get("train_seconds", 0) + row.get("test_seconds", 0)
                                  for row in job.start.rows)

    def say(self, text: str) -> None:
        """Print, in rank 0 only."""
        if self.args.rank == 0:
            print(text, flush=True)

    def follow(self, batches: Iterable[Any], total: int, what: str, batch_size: int, scaler: Any
               ) -> Iterator[Any]:
        """Yield the batches, and print a line from time to time.

        scaler: an accumulation.Scaler, or None where nothing is trained.
        """
        def details() -> str:
            text = f", loss {scaler.last_loss.item():.4f}" if scaler else ""
            if self.args.device == "cuda":
                text += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory at most"
            return text

        return follow(batches, total, what, batch_size * self.args.world_size, self.say, details)

    def say_epoch(self, row: Dict[str, float], best: float) -> None:
        """Print the results of an epoch, a row of log.txt, and how long the run still takes."""
        done, epochs = row["epoch"] + 1, self.args.epochs
        tested = ""
        if "test_acc1" in row:
            tested = f"{self.in_words(row, 'test_')} (best accuracy {best:.2f} %); "
        elapsed = time.monotonic() - self.began
        to_go = duration(elapsed / (done - self.first_epoch) * (epochs - done))
        so_far = duration(self.seconds_before + elapsed)
        self.say(f"Epoch {done} of {epochs}: loss {row['train_loss']:.4f}, learning rate "
                 f"{row['train_lr']:.3g}; {tested}{so_far} so far, about {to_go} to go")

    def in_words(self, stats: Dict[str, float], prefix: str = "") -> str:
        """The accuracies and the loss of an evaluation."""
        acc1, acc5, acc_per_class, loss = (
            stats[prefix + name] for name in ("acc1", "acc5", "acc_per_class", "loss"))
        top_5 = f"top-5 {acc5:.2f} %, " if len(self.job.classes) > 5 else ""
        return (f"{kind_of_accuracy(self.args)} {acc1:.2f} %, {top_5}mean per class "
                f"{acc_per_class:.2f} %, loss {loss:.4f}")


def saved(args: Namespace, epochs: int) -> str:
    """How much of a run is in its checkpoint."""
    return (f"{count(epochs, 'epoch')} of {args.epochs} are saved in "
            f"{os.path.join(args.output_dir, 'checkpoint.pth')}")


def duration(seconds: float) -> str:
    """As hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def follow(items: Iterable[Any], total: int, what: str, images_per_item: float,
           say: Callable[[str], None], details: Callable[[], str] = str) -> Iterator[Any]:
    """Yield the items, and say from time to time how many were done.

    what: what they are, such as "step"; images_per_item: over all processes; details: called when a
    line is due.
    """
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - began)
            say(f"  {what} {done} of {total}{details()}, {rate * images_per_item:.1f} images/s, "
                f"about {duration((total - done) / rate)} to go")
        yield item
