"""Several processes that train one model: who computes what, and gradients summed over all of them.

Every process gets whole micro-batches of the step and the loss is divided by the units of the whole step, so
gradients are summed, never averaged: the same step as one process makes, but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import Share, SingleEngine
from tunesmith.train.group import sum_over
from tunesmith.train.objective import Objective
from tunesmith.train.ranks import Ranks, deal

BUCKET_BYTES = 32 * 1024**2


def shares_of(batches: Sequence[Batch], ranks: Ranks, *, even: bool) -> list[Share]:
    """This rank's micro-batches. even: every rank takes part in every round, with the step's smallest
    micro-batch, which does not count, where it has none of its own."""
    hands = deal([batch.num_tokens for batch in batches], ranks.size)
    mine = [Share(number, batches[number]) for number in hands[ranks.rank]]
    if even and batches:
        smallest = min(range(len(batches)), key=lambda number: batches[number].num_tokens)
        filler = Share(smallest, batches[smallest], counts=False)
        mine += [filler] * (max(map(len, hands)) - len(mine))
    return mine


class Buckets:
    """Sums gradients over the ranks, many parameters in one message.

    The last parameters come first, as their gradients do. overlap: once `last` has been called, a bucket is
    sent as soon as the backward pass has filled it, while that goes on. Every rank sends all of them in the
    same order, those of a step that is not made too: otherwise the others would wait for ever.
    """

    def __init__(self, parameters: Sequence[Tensor], *, overlap: bool, num_bytes: int = BUCKET_BYTES) -> None:
        self.buckets = _buckets([p for p in parameters if p.requires_grad][::-1], num_bytes)
        self.overlap, self._open = overlap, False
        self._place = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._left: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []
        for parameter in self._place:
            parameter.register_post_accumulate_grad_hook(self._came)

    def start(self) -> None:
        """A step begins."""
        self._open = True

    def last(self) -> None:
        """The next backward pass is the step's last."""
        if self.overlap:
            self._left = [len(bucket) for bucket in self.buckets]

    def finish(self) -> None:
        """Wait until every gradient is the sum over all ranks."""
        while len(self._sent) < len(self.buckets):
            self._send()
            if not self.overlap:  # nothing is computed meanwhile: one bucket's memory at a time
                self._take(len(self._sent) - 1)
        for number in range(len(self._sent)):
            self._take(number)
        self._sent, self._left, self._open = [], [], False

    def forget(self) -> None:
        """The step is not made, in no rank; what was sent is dropped."""
        while self._open and self.overlap and len(self._sent) < len(self.buckets):
            self._send()
        for _, work in self._sent:
            work.wait()
        self._sent, self._left, self._open = [], [], False

    def _came(self, parameter: Tensor) -> None:
        if not self._left:
            return
        self._left[self._place[parameter]] -= 1
        while len(self._sent) < len(self._left) and self._left[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def _take(self, number: int) -> None:
        flat, work = self._sent[number]
        if work is None:
            return
        work.wait()
        bucket = self.buckets[number]
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(part.view_as(parameter))
        self._sent[number] = (flat.new_empty(0), None)


def _buckets(parameters: Sequence[Tensor], num_bytes: int) -> list[list[Tensor]]:
    """The parameters in order, cut where a bucket is full or the number format changes."""
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or room < size or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            room = num_bytes
        buckets[-1].append(parameter)
        room -= size
    return buckets


class DdpEngine:
    """Every process holds the whole model; gradients are summed before the step, which all take alike."""

    retries = True
    lockstep = False

    def __init__(self, model: Any, objective: Objective, recipe: Recipe, ranks: Ranks) -> None:
        self.single = SingleEngine(model, objective, recipe)
        self.model, self.device = self.single.model, self.single.device
        self.ranks, self.rank, self.num_ranks = ranks, ranks.rank, ranks.size
        # On a CPU sending while computing gains nothing: both need the same cores.
        self.buckets = Buckets(list(model.parameters()), overlap=self.device.type == "cuda")

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        self.buckets.start()
        return shares_of(batches, self.ranks, even=False)

    def begin(self, lr: float, seed: int) -> None:
        self.single.begin(lr, seed)

    def forward(self, batch: Batch) -> Tensor:
        return self.single.forward(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            self.buckets.last()
        self.single.backward(loss, last=last)

    def update(self, *, divide_by: float, max_norm: float | None) -> float:
        self.buckets.finish()
        return self.single.update(divide_by=divide_by, max_norm=max_norm)

    def drop_gradients(self) -> None:
        self.buckets.forget()
        self.single.drop_gradients()

    def sum(self, values: Sequence[float]) -> list[float]:
        return sum_over(self.ranks, values)

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        yield self.model

    def num_bytes(self) -> int:
        return self.single.num_bytes()

    def write(self, folder: Path | None) -> None:
        if folder is not None:
            self.single.write(folder)

    def read(self, folder: Path) -> None:
        self.single.read(folder)
