"""Where gradients are computed and weights are updated: one process here, several in `train.parallel`.

The loop hands over the micro-batches of a whole optimizer step, whatever the number of processes: every
process takes its share, so that the same recipe makes the same steps on one of them as on eight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import states
from tunesmith.train.activations import OffloadedActivations
from tunesmith.train.in_backward import UpdateInBackward
from tunesmith.train.objective import Objective
from tunesmith.train.optim import begin_step, gradients, make_optimizer, scale_and_clip
from tunesmith.train.precision import autocast


@dataclass(frozen=True)
class Share:
    """A micro-batch that this process computes. number: its place in the step, over all processes; counts:
    False where it is only computed because every process must take part."""

    number: int
    batch: Batch
    counts: bool = True


class Engine(Protocol):
    """One process's part in a training. Every method is called by all processes, in the same order.

    retries: whether a step that ran out of memory in one process can be taken again; lockstep: whether every
    forward pass needs all processes, so that none can repeat one, or leave one out, by itself.
    """

    rank: int
    num_ranks: int
    device: torch.device
    model: Any
    retries: bool
    lockstep: bool

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        """This process's part of a step's micro-batches."""
        ...

    def begin(self, lr: float, seed: int) -> None:
        """Before the first backward pass of a step: its learning rate, and the seed of rounding."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """The objective's total of a micro-batch."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last`: the step's last one in this process."""
        ...

    def update(self, *, divide_by: float, max_norm: float | None) -> float:
        """Divide the summed gradients, clip them and take the optimizer step.

        Returns the gradients' norm over all processes; when it is not finite nothing was changed.
        """
        ...

    def drop_gradients(self) -> None: ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in an order that does not depend on their speed."""
        ...

    def whole_model(self) -> Any:
        """A context in which `model` can generate in this process."""
        ...

    def num_bytes(self) -> int:
        """Bytes of the tensors that `write` puts into a checkpoint once every weight has been updated."""
        ...

    def write(self, folder: Path | None) -> None:
        """Weights and optimizer state into a checkpoint's folder, which only rank 0 is given."""
        ...

    def read(self, folder: Path) -> None:
        """Weights and optimizer state of a whole checkpoint, by whatever engine and number of ranks."""
        ...


class SingleEngine:
    """All in this process."""

    rank, num_ranks = 0, 1
    lockstep = False

    def __init__(self, model: Any, objective: Objective, recipe: Recipe) -> None:
        assert recipe.train.precision != "auto"
        self.model, self.objective, self.precision = model, objective, recipe.train.precision
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, recipe.train, recipe.method)
        self.in_backward = (
            UpdateInBackward(self.optimizer) if recipe.train.optimizer_in_backward is True else None
        )
        self.retries = self.in_backward is None
        self.offload = OffloadedActivations(model) if recipe.train.activation_offload else None

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        return [Share(number, batch) for number, batch in enumerate(batches)]

    def begin(self, lr: float, seed: int) -> None:
        begin_step(self.optimizer, lr, seed)
        if self.in_backward is not None:
            self.in_backward.begin()

    def forward(self, batch: Batch) -> Tensor:
        saved = self.offload.context() if self.offload else nullcontext()
        with autocast(self.precision, self.device), saved:
            return self.objective.total(self.model, batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last or self.in_backward is None
        # Weights that are updated in the backward pass would be lost to a loss that is not finite.
        if self.in_backward is None or math.isfinite(float(loss.detach())):
            loss.backward()

    def update(self, *, divide_by: float, max_norm: float | None) -> float:
        if self.in_backward is not None:
            return self.in_backward.end()
        norm = scale_and_clip(gradients(self.optimizer), divide_by=divide_by, max_norm=max_norm)
        if norm < float("inf"):
            self.optimizer.step()
        return norm

    def drop_gradients(self) -> None:
        if self.in_backward is not None:
            self.in_backward.end()
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        yield self.model

    def num_bytes(self) -> int:
        return states.weights_bytes(self.model) + states.optimizer_bytes(self.optimizer)

    def write(self, folder: Path | None) -> None:
        assert folder is not None
        states.write_weights(self.model, folder)
        states.write_optimizer(folder, self.model, self.optimizer)

    def read(self, folder: Path) -> None:
        states.read_adapter(folder, self.model)
        states.read_optimizer(folder, self.model, self.optimizer)
