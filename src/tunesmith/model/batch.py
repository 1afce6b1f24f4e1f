"""The unit of training work: documents laid end to end, without one pad token.

Shapes: T tokens of a micro-batch, D documents in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch as a flat stream.

    input_ids [T] int64; labels [T] int64: `labels[i] == input_ids[i]` where token i is supervised, else
    IGNORE (not shifted; the first token of a document is never supervised); starts [D + 1] int64: document
    d is tokens starts[d]:starts[d+1], so starts[0] == 0 and starts[D] == T; rows: the source row number of
    every document, for error messages. Positions restart at 0 and attention is confined to each document.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def positions(self) -> NDArray[np.int64]:
        """[T]: 0, 1, 2 … within every document."""
        lengths = np.diff(self.starts)
        return np.arange(self.num_tokens) - np.repeat(self.starts[:-1], lengths)


def join(documents: list[tuple[NDArray[np.int64], NDArray[np.int64]]], rows: tuple[int, ...] = ()) -> Batch:
    """Lay (input_ids, labels) documents end to end; the first label of each is masked."""
    ids = np.concatenate([d[0] for d in documents]).astype(np.int64)
    labels = np.concatenate([d[1] for d in documents]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(d[0]) for d in documents])]).astype(np.int64)
    labels[starts[:-1]] = IGNORE
    return Batch(ids, labels, starts, rows)
