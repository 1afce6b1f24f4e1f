"""Which rows make up each optimizer step: a pure function of (seed, step), whatever the machine.

The same global batch comes out for every split of it into micro-batches: step s of an epoch takes the next
micro_batch_size x grad_accumulation packs of that epoch's order, and only then cuts them up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import UserError
from tunesmith.data.pack import Indices, best_fit, shuffled
from tunesmith.data.store import TokenStore
from tunesmith.model.batch import Batch, join

PICK, TIES, ORDER, EVAL = range(4)


@dataclass(frozen=True)
class Totals:
    """What a number of optimizer steps holds."""

    packs: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.packs + other.packs,
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.supervised + other.supervised,
        )


class StepPlan:
    """The micro-batches of every optimizer step of a run.

    An epoch takes each row of a source `weight` times, in an order of its own; its last step has fewer
    packs if they do not come out even, and nothing is left out. Training runs for `epochs` (the last one in
    part, if it is fractional), or for `max_steps`, going on into further epochs as needed.

    total_steps: optimizer steps of the run. steps_per_epoch: of the first epoch. warnings: what a person
    should know, such as data so small that an epoch is one step.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        packing: bool,
        max_length: int,
        micro_batch_size: int,
        grad_accumulation: int,
        seed: int,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        if not len(store):
            raise UserError(
                "the training split has no rows", hint="check data.sources and data.eval_fraction"
            )
        self.store, self.packing, self.max_length = store, packing, max_length
        self.micro_batch_size, self.grad_accumulation, self.seed = micro_batch_size, grad_accumulation, seed
        self._even = all(group.weight.is_integer() for group in store.groups)
        self._packs_of = lru_cache(maxsize=2)(self._make_packs)
        self._counts: list[int] = []
        self.steps_per_epoch = self._steps_of(0)
        self.total_steps = max_steps if max_steps is not None else self._steps_until(epochs)
        self.warnings = self._warnings()

    @property
    def packs_per_step(self) -> int:
        return self.micro_batch_size * self.grad_accumulation

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of the 0-based optimizer step; their gradients are summed."""
        packs = self.documents(step)
        size = self.micro_batch_size
        return [self._batch(packs[at : at + size]) for at in range(0, len(packs), size)]

    def documents(self, step: int) -> list[list[int]]:
        """The store's document numbers of the step, pack by pack."""
        epoch, first = self.epoch_of(step)
        at = (step - first) * self.packs_per_step
        return self._packs_of(epoch)[at : at + self.packs_per_step]

    def longest(self) -> Batch:
        """The micro-batch with the most tokens of the whole run."""

        def largest(step: int) -> tuple[int, int, int]:
            packs = [int(self.store.lengths[pack].sum()) for pack in self.documents(step)]
            size = self.micro_batch_size
            sums = [sum(packs[at : at + size]) for at in range(0, len(packs), size)]
            return max(sums), step, sums.index(max(sums))

        _, step, number = max(largest(step) for step in range(self.total_steps))
        return self(step)[number]

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(the epoch that the step lies in, the first step of that epoch), both 0-based."""
        ends = list(accumulate(self._counts))
        while not ends or ends[-1] <= step:
            ends.append((ends[-1] if ends else 0) + self._steps_of(len(ends)))
        epoch = bisect_right(ends, step)
        return epoch, ends[epoch - 1] if epoch else 0

    def epochs_after(self, step: int) -> float:
        """How many passes over the data are done after `step` optimizer steps."""
        epoch, first = self.epoch_of(step)
        return epoch + (step - first) / self._steps_of(epoch)

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps of the run."""
        return self.totals().tokens

    @property
    def total_supervised(self) -> int:
        """Supervised tokens of all steps of the run."""
        return self.totals().supervised

    def totals(self, first: int = 0, last: int | None = None) -> Totals:
        """What the steps first … last-1 (default: all of the run) hold together."""
        last = self.total_steps if last is None else last
        total, step = Totals(), first
        while step < last:
            epoch, begin = self.epoch_of(step)
            count = self._steps_of(epoch)
            stop = min(last, begin + count)
            whole = self._even and step == begin and stop == begin + count
            total += self._whole_epoch if whole else self._totals_of(epoch, step - begin, stop - begin)
            step = stop
        return total

    @property
    def pack_efficiency(self) -> float:
        """Tokens of the first epoch over the room of its packs; 1.0 without packing."""
        packs = self._packs_of(0)
        tokens = sum(int(self.store.lengths[pack].sum()) for pack in packs)
        return tokens / (len(packs) * self.max_length) if self.packing else 1.0

    # -- one epoch -----------------------------------------------------------------------------------

    def _make_packs(self, epoch: int) -> list[list[int]]:
        rows = epoch_rows(self.store, self.seed, epoch)
        rows = rows[shuffled(len(rows), self.seed, epoch, TIES)]
        if not self.packing:
            return [[row] for row in rows.tolist()]
        packs = best_fit(self.store.lengths[rows].astype(np.int64), self.max_length)
        order = shuffled(len(packs), self.seed, epoch, ORDER)
        return [rows[packs[i]].tolist() for i in order.tolist()]

    def _steps_of(self, epoch: int) -> int:
        while len(self._counts) <= epoch:
            # The number of packs depends on the lengths alone: the same every epoch if the rows are.
            known = self._counts[0] if self._even and self._counts else None
            packs = 0 if known else len(self._packs_of(len(self._counts)))
            self._counts.append(known or math.ceil(packs / self.packs_per_step))
        return self._counts[epoch]

    def _steps_until(self, epochs: float) -> int:
        whole = sum(self._steps_of(epoch) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        # 0.1 epochs of 30 steps is 3.0000000000000004 of them in binary.
        return whole + (max(1, math.ceil(part * self._steps_of(int(epochs)) - 1e-9)) if part > 0 else 0)

    @property
    def _whole_epoch(self) -> Totals:
        return self._totals_of(0, 0, self._steps_of(0))

    def _totals_of(self, epoch: int, first: int, last: int) -> Totals:
        packs = self._packs_of(epoch)[first * self.packs_per_step : last * self.packs_per_step]
        rows = np.fromiter((row for pack in packs for row in pack), dtype=np.int64)
        tokens, supervised = self.store.lengths[rows].sum(), self.store.supervised[rows].sum()
        return Totals(len(packs), len(rows), int(tokens), int(supervised))

    def _batch(self, packs: list[list[int]]) -> Batch:
        return _joined(self.store, [row for pack in packs for row in pack])

    def _warnings(self) -> list[str]:
        packs = len(self._packs_of(0))
        if packs >= self.packs_per_step:
            return []
        kind = f"packs of {self.max_length} tokens" if self.packing else "rows"
        remedy = "data.packing=false or a smaller data.max_length" if self.packing else "a smaller batch"
        return [
            f"an epoch has {packs} {kind}, fewer than the {self.packs_per_step} of one optimizer step "
            f"(train.micro_batch_size x train.grad_accumulation): every epoch is a single step; "
            f"{remedy} gives more steps"
        ]


def epoch_rows(store: TokenStore, seed: int, epoch: int) -> Indices:
    """The document numbers that an epoch uses, each as often as the weight of its source says.

    A source of n rows and weight w is an endless stream of passes, each in its own order; epoch e takes its
    places ceil(e w n) … ceil((e+1) w n) - 1. So weight 2 takes every row twice, and weight 0.5 half of them,
    the other half in the next epoch.
    """
    chosen = [_stream(g.rows, g.weight, seed, number, epoch) for number, g in enumerate(store.groups)]
    return np.concatenate(chosen)


def _stream(rows: Indices, weight: float, seed: int, group: int, epoch: int) -> Indices:
    count = len(rows)
    begin, end = (math.ceil(round(e * weight * count, 6)) for e in (epoch, epoch + 1))
    if not count or begin == end:
        return rows[:0]
    passes = range(begin // count, (end - 1) // count + 1)
    stream = np.concatenate([rows[shuffled(count, seed, group, number, PICK)] for number in passes])
    offset = passes[0] * count
    return stream[begin - offset : end - offset]


def eval_batches(store: TokenStore, *, max_tokens: int, max_rows: int | None = None) -> list[Batch]:
    """Held-out rows in flat batches of at most `max_tokens` tokens; a longer row stands alone.

    With `max_rows`, the same rows every time. An empty store gives no batches.
    """
    rows = shuffled(len(store), EVAL)[:max_rows] if max_rows is not None else np.arange(len(store))
    return list(_sorted(store, rows, max_tokens))


def sweep(store: TokenStore, *, max_tokens: int) -> Iterator[Batch]:
    """Every row once, in flat batches of at most `max_tokens` tokens; a longer row stands alone."""
    return _sorted(store, np.arange(len(store)), max_tokens)


def _sorted(store: TokenStore, rows: Indices, max_tokens: int) -> Iterator[Batch]:
    ordered = rows[np.argsort(store.lengths[rows], kind="stable")]
    return (_joined(store, group) for group in _grouped(ordered, store.lengths, max_tokens))


def _grouped(rows: Indices, lengths: NDArray[np.int32], max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for row in rows.tolist():
        length = int(lengths[row])
        if length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(row)
        room -= length
    return groups


def _joined(store: TokenStore, rows: Sequence[int]) -> Batch:
    branches = np.stack([store.branches_of(row) for row in rows])
    documents, numbers = [store[row] for row in rows], tuple(store.row(row) for row in rows)
    return join(documents, numbers, branches if branches.any() else None)
