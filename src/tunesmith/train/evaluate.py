"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.model.batch import Batch
from tunesmith.model.generate import evaluating
from tunesmith.train.objective import Objective, Ranks, Tally


@dataclass(frozen=True)
class Evaluation:
    """loss and measures: means over all units of the batches, NaN for none."""

    loss: float
    supervised_tokens: int
    measures: dict[str, float] = field(default_factory=dict)


def evaluate(objective: Objective, engine: Ranks, batches: Sequence[Batch]) -> Evaluation:
    """The objective on held-out batches, shared by all processes. Every module's mode is restored.

    Not in torch's inference mode, whose tensors sharded weights could not be gathered into.
    """
    tally = Tally(objective)
    with evaluating(engine.model), torch.no_grad():
        for share in engine.shares(batches):
            tally.add(engine.forward(share.batch), counts=share.counts)
    units = sum(objective.units(batch) for batch in batches)
    loss, measures = tally.mean(engine, units) if units else (float("nan"), {})
    return Evaluation(loss, sum(batch.num_supervised for batch in batches), measures)
