"""--accum-iter N: each process takes N batches for one optimizer step, as N processes would.

Four stand-ins for what DeiT's ``train_one_epoch`` is called with. With N = 1 they change nothing.
"""
from typing import Any, Iterator, Tuple

import torch


class Step:
    """Whether the batch that ``Loader`` handed out last completes an optimizer step."""

    def __init__(self, accum_iter: int) -> None:
        self.accum_iter, self.is_complete = accum_iter, False


class Loader:
    """Stands in for the data loader, and tells ``step`` about its batches.

    batches: iterates over the ``length`` batches of one epoch.
    """

    def __init__(self, batches: Iterator[Tuple[torch.Tensor, torch.Tensor]], length: int,
                 model: torch.nn.Module, step: Step) -> None:
        self.batches, self.length, self.model, self.step = batches, length, model, step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.batches, start=1):
            self.step.is_complete = number % self.step.accum_iter == 0
            # DistributedDataParallel.no_sync() sets this, too; other models ignore it.
            self.model.require_backward_grad_sync = self.step.is_complete
            yield batch


class Optimizer:
    """Stands in for the optimizer: ``Scaler`` steps and clears the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # DeiT logs the rate of the first group: with --layer-decay, that of the last layer.
        self.param_groups = sorted(optimizer.param_groups,
                                   key=lambda group: -group.get("lr_scale", 1))
        self.is_second_order = getattr(optimizer, "is_second_order", False)

    def zero_grad(self) -> None:
        """Do nothing: DeiT clears the gradients before every batch."""


class Scaler:
    """Stands in for timm's NativeScaler: lets the optimizer step only with a complete step."""

    def __init__(self, scaler: Any, optimizer: torch.optim.Optimizer, step: Step) -> None:
        self.scaler, self.optimizer, self.step = scaler, optimizer, step

    def __call__(self, loss: torch.Tensor, optimizer: Optimizer, create_graph: bool = False,
                 **options: Any) -> None:
        self.last_loss = loss.detach()  # for the narrator
        loss = loss / self.step.accum_iter
        if self.step.is_complete:
            self.scaler(loss, self.optimizer, create_graph=create_graph, **options)
            self.optimizer.zero_grad()
        else:  # timm before 0.9 cannot do the backward pass alone
            self.scaler._scaler.scale(loss).backward(create_graph=create_graph)


class Ema:
    """Stands in for timm's ModelEma: updates only after an optimizer step."""

    def __init__(self, ema: Any, step: Step) -> None:
        self.ema, self.step = ema, step

    def update(self, model: torch.nn.Module) -> None:
        """Update the EMA if this batch has completed a step."""
        if self.step.is_complete:
            self.ema.update(model)
