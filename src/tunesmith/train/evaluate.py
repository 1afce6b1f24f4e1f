"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tunesmith.model.batch import Batch
from tunesmith.model.generate import evaluating
from tunesmith.train import faults
from tunesmith.train.objective import Objective, Ranks, Tally


@dataclass(frozen=True)
class Evaluation:
    """loss and measures: means over all units of the batches, NaN for none. max_tokens: what batches were cut
    to in this process, since memory ran out."""

    loss: float
    supervised_tokens: int
    measures: dict[str, float] = field(default_factory=dict)
    max_tokens: int | None = None


def evaluate(
    objective: Objective,
    engine: Ranks,
    batches: Sequence[Batch],
    *,
    max_tokens: int | None = None,
    can_cut: bool = True,
) -> Evaluation:
    """The objective on held-out batches, shared by all processes. Every module's mode is restored.

    A batch of more than `max_tokens`, or that memory does not hold, is cut at borders of documents, which
    changes the result by rounding only. can_cut: False where every forward pass needs all processes. Raises
    RunFailed for what cannot be cut. Not in torch's inference mode, whose tensors sharded weights could not
    be gathered into.
    """
    tally = Tally(objective)
    waiting = _cut([(share.batch, share.counts) for share in engine.shares(batches)], max_tokens)
    with evaluating(engine.model), torch.no_grad():
        while waiting:
            batch, counts = waiting[0]
            found = faults.attempt(partial(engine.forward, batch))
            if isinstance(found, faults.NoMemory):
                objective.drain()
                max_tokens = faults.smaller([batch])
                if max_tokens is None or not can_cut:
                    raise faults.too_large_to_evaluate(batch, found.reason)
                waiting = _cut(waiting, max_tokens)
            else:
                tally.add(found, counts=counts)
                del waiting[0]
    units = sum(objective.units(batch) for batch in batches)
    loss, measures = tally.mean(engine, units) if units else (float("nan"), {})
    return Evaluation(loss, sum(batch.num_supervised for batch in batches), measures, max_tokens)


def _cut(waiting: Sequence[tuple[Batch, bool]], max_tokens: int | None) -> list[tuple[Batch, bool]]:
    return [(piece, counts) for batch, counts in waiting for piece in faults.cut([batch], max_tokens)]
