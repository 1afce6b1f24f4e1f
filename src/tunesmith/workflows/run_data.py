"""What the data of a run comes to, whoever prepared it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.data.batches import Totals
from tunesmith.data.prepare import Prepared
from tunesmith.model.batch import Batch
from tunesmith.train.objective import Objective


class Steps(Protocol):
    """The micro-batches of every optimizer step: `data.batches.StepPlan`, or another tool's order."""

    @property
    def total_steps(self) -> int: ...

    @property
    def warnings(self) -> list[str]: ...

    def __call__(self, step: int) -> list[Batch]: ...

    def totals(self) -> Totals: ...

    def longest(self) -> Batch: ...

    def epochs_after(self, step: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class RunData:
    """prepared: the rows and their counts; steps: the micro-batches of every optimizer step; eval_batches:
    held out; objective: made once the model is there (adapters attached, weights loaded); lr: learning rate
    of a 0-based step, if it is not the recipe's schedule."""

    prepared: Prepared
    steps: Steps
    eval_batches: list[Batch]
    objective: Callable[[Any], Objective]
    lr: Callable[[int], float] | None = None
