"""The unit of training work: documents laid end to end, without one pad token.

Shapes: T tokens of a micro-batch, D documents in it, B answers of a document that has branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as a flat stream.

    input_ids [T] int64; labels [T] int64: `labels[i] == input_ids[i]` where token i is supervised, else
    IGNORE (not shifted; the first token of a document is never supervised); starts [D + 1] int64: document
    d is tokens starts[d]:starts[d+1], so starts[0] == 0 and starts[D] == T; rows: the source row number of
    every document, for error messages. Positions restart at 0 and attention is confined to each document.

    branches [D, 1 + B] int64, or None: document d is a prompt of branches[d, 0] tokens and B answers to it,
    one after the other, of the lengths that follow. Every answer sees the prompt and itself alone, and its
    positions go on from the prompt's: the prompt is computed once for all of them.
    """

    input_ids: Ints
    labels: Ints
    starts: Ints
    rows: tuple[int, ...] = ()
    branches: Ints | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def positions(self) -> Ints:
        """[T]: 0, 1, 2 … within every document; every answer's go on where its prompt ends."""
        lengths = np.diff(self.starts)
        positions = np.arange(self.num_tokens) - np.repeat(self.starts[:-1], lengths)
        if self.branches is not None:
            earlier = np.cumsum(self.branches[:, 1:], axis=1) - self.branches[:, 1:]
            shifts = np.concatenate([np.zeros_like(self.branches[:, :1]), earlier], axis=1)
            positions -= np.repeat(shifts.ravel(), self.branches.ravel())
        return positions

    @property
    def predictors(self) -> Ints:
        """[T]: the index of the token after which each one comes; -1 for the first."""
        before = np.arange(self.num_tokens) - 1
        if self.branches is not None:
            ends = self.starts[:-1, None] + np.cumsum(self.branches, axis=1)
            filled = self.branches[:, 1:] > 0
            before[ends[:, :-1][filled]] = np.broadcast_to(ends[:, :1] - 1, filled.shape)[filled]
        return before

    def part(self, first: int, last: int) -> Batch:
        """The batch of documents first … last-1 alone."""
        begin, end = int(self.starts[first]), int(self.starts[last])
        return Batch(
            self.input_ids[begin:end],
            self.labels[begin:end],
            self.starts[first : last + 1] - begin,
            self.rows[first:last],
            None if self.branches is None else self.branches[first:last],
        )

    def answers(self, first: int, last: int) -> Batch:
        """The batch with the answers first … last-1 of every document alone."""
        assert self.branches is not None
        parts = np.arange(self.branches.shape[1])
        kept = (parts == 0) | ((parts > first) & (parts <= last))
        if kept.all():
            return self
        chosen = np.repeat(np.tile(kept, self.num_documents), self.branches.ravel())
        branches = self.branches[:, kept]
        starts = np.concatenate([[0], np.cumsum(branches.sum(axis=1))]).astype(np.int64)
        return Batch(self.input_ids[chosen], self.labels[chosen], starts, self.rows, branches)


def join(
    documents: list[tuple[Ints, Ints]], rows: tuple[int, ...] = (), branches: Ints | None = None
) -> Batch:
    """Lay (input_ids, labels) documents end to end; the first label of each is masked."""
    ids = np.concatenate([d[0] for d in documents]).astype(np.int64)
    labels = np.concatenate([d[1] for d in documents]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(d[0]) for d in documents])]).astype(np.int64)
    labels[starts[:-1]] = IGNORE
    return Batch(ids, labels, starts, rows, branches)
