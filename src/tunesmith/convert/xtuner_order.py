"""Which tokens make up each micro-batch of an xtuner 0.1 run, and its learning rates: numbers alone.

One iteration is one micro-batch on every GPU. Packs are cut out of rows laid end to end, wherever the border
falls, and a plain causal mask lies over all of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.core.errors import UserError

BATCH_ROWS = 1000  # rows that datasets.map hands to the packer at a time
STATE_WORDS = 624  # of the Mersenne Twister


@dataclass(frozen=True)
class Piece:
    """Tokens start … stop-1 of a row."""

    row: int
    start: int
    stop: int


Pack = list[Piece]


def shuffle_seeds(seed: int) -> Iterator[int]:
    """Seeds of one dataset.shuffle() after the other, in a process that began with np.random.seed(seed).

    Each takes the next word of numpy's global state (the first if all are used) and burns one draw.
    """
    state = np.random.RandomState(seed)
    while True:
        held: Any = state.get_state(legacy=True)
        words, place = held[1], held[2]
        yield int(words[place] if place < STATE_WORDS else words[0])
        state.random_sample()


def shuffled_rows(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count).astype(np.int64)


def shards(count: int, workers: int) -> list[range]:
    """The contiguous parts of `count` rows that the processes of datasets.map get."""
    workers = max(1, min(workers, count))
    each, more = divmod(count, workers)
    starts = [each * k + min(k, more) for k in range(workers + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def pack_rows(order: Sequence[int], lengths: Sequence[int], size: int, workers: int) -> list[Pack]:
    """Cut the rows in this order into packs of `size` tokens, shard by shard.

    A batch that does not fill one pack makes a short one; what is left over at the end of a shard is lost.
    """
    packs: list[Pack] = []
    for shard in shards(len(order), workers):
        rest: Pack = []
        for first in range(shard.start, shard.stop, BATCH_ROWS):
            rows = order[first : min(first + BATCH_ROWS, shard.stop)]
            stream = rest + [Piece(int(row), 0, int(lengths[row])) for row in rows]
            full, rest = _cut(stream, size)
            packs += full if full else [stream]
            rest = rest if full else []
    return packs


def _cut(stream: Pack, size: int) -> tuple[list[Pack], Pack]:
    """(whole packs, what is left)"""
    packs: list[Pack] = []
    pack: Pack = []
    room = size
    for piece in stream:
        while piece.stop - piece.start >= room:
            packs.append([*pack, Piece(piece.row, piece.start, piece.start + room)])
            piece, pack, room = Piece(piece.row, piece.start + room, piece.stop), [], size
        if piece.stop > piece.start:
            pack.append(piece)
            room -= piece.stop - piece.start
    return packs, pack


@dataclass(frozen=True, kw_only=True)
class Iterations:
    """The micro-batches of a run over `count` packs (or rows): iteration t of GPU r takes `at(t)[r]`.

    epochs: passes; seed: of the run; accumulation: iterations of an optimizer step; drop_last: whether the
    iterations after the last whole step are never applied (DeepSpeed).
    """

    count: int
    epochs: int
    seed: int
    batch_size: int
    accumulation: int
    gpus: int = 1
    drop_last: bool = False

    @property
    def per_epoch(self) -> int:
        return math.ceil(math.ceil(self.count / self.gpus) / self.batch_size)

    @property
    def total(self) -> int:
        return self.epochs * self.per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps that are applied."""
        whole, more = divmod(self.total, self.accumulation)
        return whole + (1 if more and not self.drop_last else 0)

    def window(self, step: int) -> range:
        """The iterations of an optimizer step; windows run across the ends of epochs."""
        first = step * self.accumulation
        return range(first, min(first + self.accumulation, self.total))

    def at(self, iteration: int) -> list[list[int]]:
        """[gpu][number in the micro-batch]: the packs of one iteration."""
        epoch, number = divmod(iteration, self.per_epoch)
        first = number * self.batch_size
        orders = epoch_orders(self.count, self.seed + epoch, self.gpus)
        return [order[first : first + self.batch_size] for order in orders]


@lru_cache(maxsize=4)
def epoch_orders(count: int, seed: int, gpus: int) -> list[list[int]]:
    """mmengine's DefaultSampler, GPU by GPU: every so-manieth of a permutation that is begun again until it
    divides by the GPUs."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    whole = math.ceil(count / gpus) * gpus
    padded = (order * (whole // count + 1))[:whole]
    return [padded[rank::gpus] for rank in range(gpus)]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rate of every iteration: linear warm-up, then a cosine (or a constant).

    The schedulers multiply the rate that they find. So a warm-up of one iteration, which ends at its first
    value, leaves `start_factor` in all that follows: the rate stays at 1e-5 of what was asked for.
    """

    peak: float
    warmup_epochs: float
    epochs: int
    per_epoch: int
    start_factor: float = 1e-5
    lowest: float = 0.0
    cosine: bool = True

    def __post_init__(self) -> None:
        if self.warmup_epochs and not self.warmup:
            raise UserError(
                f"compat: xtuner stops here with 'end should be larger than begin': a warm-up of "
                f"{self.warmup_epochs:g} epochs is less than one of its {self.per_epoch} iterations an epoch",
                hint="without compat the warm-up is counted in optimizer steps, and training starts",
            )

    @property
    def warmup(self) -> int:
        return int(self.warmup_epochs * self.per_epoch)

    def lr(self, iteration: int) -> float:
        """Of the 0-based iteration."""
        if iteration < self.warmup:
            done = iteration / (self.warmup - 1) if self.warmup > 1 else 0.0
            return self.peak * (self.start_factor + (1 - self.start_factor) * done)
        peak = self.peak * (self.start_factor if self.warmup == 1 else 1.0)
        if not self.cosine:
            return peak
        length = int(self.epochs * self.per_epoch) - self.warmup
        course = 0.5 * (1 + math.cos(math.pi * (iteration - self.warmup) / length))
        return self.lowest + (peak - self.lowest) * course
