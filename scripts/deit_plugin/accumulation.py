"""--accum-iter N: each process takes N batches for one optimizer step, as N processes would.

Four stand-ins for what DeiT's ``train_one_epoch`` is called with. With N = 1 they change nothing.
"""
from typing import Any, Iterator, Tuple

import torch


class Loader:
    """Stands in for the data loader, and knows which batches complete an optimizer step.

    batches: iterates over the ``length`` batches of one epoch.
    """

    def __init__(self, batches: Iterator[Tuple[torch.Tensor, torch.Tensor]], length: int,
                 model: torch.nn.Module, accum_iter: int) -> None:
        self.batches, self.length, self.model = batches, length, model
        self.accum_iter = accum_iter
        self.completes_step = False  # whether the batch that was handed out last does

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.batches, start=1):
            self.completes_step = number % self.accum_iter == 0
            # DistributedDataParallel.no_sync() sets this, too; other models ignore it.
            self.model.require_backward_grad_sync = self.completes_step
            yield batch


class Optimizer:
    """Stands in for the optimizer: ``Scaler`` steps and clears the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups  # DeiT logs the learning rate
        self.is_second_order = getattr(optimizer, "is_second_order", False)

    def zero_grad(self) -> None:
        """Do nothing: DeiT clears the gradients before every batch."""


class Scaler:
    """Stands in for timm's NativeScaler: steps only when ``loader`` has completed a step."""

    def __init__(self, scaler: Any, optimizer: torch.optim.Optimizer, loader: Loader) -> None:
        self.scaler, self.optimizer, self.loader = scaler, optimizer, loader

    def __call__(self, loss: torch.Tensor, optimizer: Optimizer, create_graph: bool = False,
                 **options: Any) -> None:
        self.last_loss = loss.detach()  # for Run, which says it from time to time
        loss = loss / self.loader.accum_iter
        if self.loader.completes_step:
            self.scaler(loss, self.optimizer, create_graph=create_graph, **options)
            self.optimizer.zero_grad()
        else:  # timm before 0.9 cannot do the backward pass alone
            self.scaler._scaler.scale(loss).backward(create_graph=create_graph)


class Ema:
    """Stands in for timm's ModelEma: updates only after an optimizer step."""

    def __init__(self, ema: Any, loader: Loader) -> None:
        self.ema, self.loader = ema, loader

    def update(self, model: torch.nn.Module) -> None:
        """Update the EMA if this batch has completed a step."""
        if self.loader.completes_step:
            self.ema.update(model)
