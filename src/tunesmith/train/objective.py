"""What a training minimises: a sum over units (supervised tokens, or pairs), over all units of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.batch import Batch
from tunesmith.train.loss import loss_sum


class Share(Protocol):
    """A micro-batch that this process computes, and whether it counts (`train.engine.Share`)."""

    @property
    def batch(self) -> Batch: ...

    @property
    def counts(self) -> bool: ...


class Ranks(Protocol):
    """What an objective and the evaluation need of an engine (`train.engine.Engine`)."""

    @property
    def rank(self) -> int: ...

    @property
    def model(self) -> Any: ...

    def shares(self, batches: Sequence[Batch]) -> Sequence[Share]: ...

    def forward(self, batch: Batch) -> Tensor: ...

    def sum(self, values: Sequence[float]) -> list[float]: ...


class Objective(Protocol):
    """measures: names of what is measured beside the loss; units: how many units a micro-batch has; total:
    the loss summed over them, a scalar of at least fp32; drain: sums over units of every measure since the
    last call; prepare: once in every process, before the first step of a run that begins or goes on."""

    measures: tuple[str, ...]

    def prepare(self, engine: Ranks, run: RunFolder, *, begun: bool) -> None: ...

    def units(self, batch: Batch) -> int: ...

    def total(self, model: Any, batch: Batch) -> Tensor: ...

    def drain(self) -> dict[str, float]: ...


class Tally:
    """Sums the loss and the measures of the micro-batches that count, in this process and then over all."""

    def __init__(self, objective: Objective) -> None:
        objective.drain()  # what a forward pass outside of any step has left
        self.objective, self.total = objective, 0.0
        self.measured = dict.fromkeys(objective.measures, 0.0)

    def add(self, loss: Tensor, *, counts: bool) -> None:
        """After each forward pass, counted or not."""
        found = self.objective.drain()
        if counts:
            self.total += float(loss.detach())
            self.measured = {name: value + found[name] for name, value in self.measured.items()}

    def mean(self, engine: Ranks, units: int) -> tuple[float, dict[str, float]]:
        """(loss, measures) over all processes' `units`."""
        total, *sums = engine.sum([self.total, *self.measured.values()])
        return total / units, {name: value / units for name, value in zip(self.measured, sums, strict=True)}


class Supervised:
    """Cross-entropy of the supervised tokens; a unit is one of them."""

    measures: tuple[str, ...] = ()

    def prepare(self, engine: Ranks, run: RunFolder, *, begun: bool) -> None:
        pass

    def units(self, batch: Batch) -> int:
        return batch.num_supervised

    def total(self, model: Any, batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        input_ids = torch.from_numpy(batch.input_ids).to(device)[None]
        positions = torch.from_numpy(batch.positions).to(device)[None]
        layout = attention.PackedLayout(batch.starts, batch.input_ids)
        hidden = attention.hidden_states(model, input_ids, positions, layout)
        return loss_sum(attention.lm_head(model), hidden, torch.from_numpy(batch.labels).to(device))

    def drain(self) -> dict[str, float]:
        return {}
