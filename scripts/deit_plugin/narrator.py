"""Prints what a run is, how far it is, and what it found."""
import time
from argparse import Namespace
from collections import Counter
from typing import Any, Dict, Iterable, Iterator, List

import torch

from datasets import left_out_in_words

from .data import Data, describe, evaluated_on, kind_of_accuracy
from .options import Plan
from .output import Start
from .progress import duration, follow
from .recipe import Comparison, describe_batch
from .weights import HEAD
from .words import BATCH, count, differing


class Narrator:
    """Prints in rank 0, for all processes."""

    def __init__(self, args: Namespace, plan: Plan, data: Data, comparison: Comparison,
                 start: Start) -> None:
        self.args, self.plan, self.data, self.comparison = args, plan, data, comparison
        self.start, self.began = start, time.monotonic()
        self.seconds_before = sum(row.get("train_seconds", 0) + row.get("test_seconds", 0)
                                  for row in start.rows)

    def say(self, text: str) -> None:
        """Print, in rank 0 only."""
        if self.args.rank == 0:
            print(text, flush=True)

    def begin(self) -> None:
        """Describe the run, and start its clock."""
        self.say(self.describe())
        self.began = time.monotonic()

    def describe(self) -> str:
        """What is trained from what and how, in lines. Reads the start's state."""
        args, plan, origin = self.args, self.plan, self.start.path
        if self.start.epoch >= args.epochs:
            origin += f", which has all {args.epochs} epochs: nothing is left to train"
        elif self.start.epoch:
            origin += f", resumed: epoch {self.start.epoch + 1} of {args.epochs} comes next"
        elif not self.start.origin["is_moco_v3"]:
            origin += (" (these are not MoCo v3's pretrained weights: their position embedding is "
                       "learned, as in supervised or fine-tuned models)")
        elif HEAD[0] not in self.start.state["model"]:
            origin += " (the classifier head is new)"
        return "\n  ".join([
            f"Fine-tuning {args.model} on {args.data_set}: {describe(self.data, args)}",
            f"start: {origin}",
            *([f"output: {args.output_dir}"] if args.output_dir else []),  # --check needs none
            f"effective batch size: {describe_batch(self.comparison, args, plan)}",
            f"learning rate: {self._describe_rate()}",
            f"evaluation on {evaluated_on(self.data, args)} every "
            f"{count(plan.eval_freq, 'epoch')}, checkpoint.pth every "
            f"{count(plan.save_freq, 'epoch')} and when the accuracy is the best so far",
            *self._left_out(), *self._differences()])

    def _describe_rate(self) -> str:
        args, rate, text = self.args, self.args.lr, f"{self.args.lr:g}"
        if not getattr(args, "unscale_lr", False):  # which only DeiT HEAD has
            size = self.comparison.settings[BATCH]
            rate = args.lr * size / 512
            text += f" x {size} / 512 = {rate:g}"
        if rate < args.min_lr and args.sched != "step":  # which never reaches --min-lr
            text += (f"; it will rise to --min-lr {args.min_lr:g}, which is larger: pass a larger "
                     "--lr or a smaller --min-lr")
        return text

    def _left_out(self) -> List[str]:
        left_out = sum((getattr(split, "left_out", Counter()) for split in self.data), Counter())
        return [left_out_in_words(left_out)] if left_out else []

    def _differences(self) -> List[str]:
        lines = []
        if self.comparison.published:
            lines.append("settings that differ from the published recipe: "
                         f"{', '.join(self.comparison.differs) or 'none'}")
        before = self.start.state.get("settings")
        if before and self.start.epoch and not self.start.continues:
            changed = differing(self.comparison.settings, before, "there")
            lines.append(f"changed since {self.start.path}: {', '.join(changed) or 'nothing'}")
        return lines

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
        to_go = duration(elapsed / (done - self.start.epoch) * (epochs - done))
        so_far = duration(self.seconds_before + elapsed)
        self.say(f"Epoch {done} of {epochs}: loss {row['train_loss']:.4f}, learning rate "
                 f"{row['train_lr']:.3g}; {tested}{so_far} so far, about {to_go} to go")

    def in_words(self, stats: Dict[str, float], prefix: str = "") -> str:
        """The accuracies and the loss of an evaluation."""
        names = ("acc1", "acc5", "acc_per_class", "loss")
        return (kind_of_accuracy(self.args) + " {:.2f} %, top-5 {:.2f} %, mean per class {:.2f} %, "
                "loss {:.4f}".format(*(stats[prefix + name] for name in names)))
