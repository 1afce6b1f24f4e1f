"""Pairs with a third answer, to another prompt: what KTO measures the drift of the model with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.store import TokenStore
from tunesmith.model.batch import IGNORE


class MismatchedStore(TokenStore):
    """The pairs of a store; behind each an answer to the prompt half the store away, chosen or rejected.

    A pure function of the rows, so that every epoch and every number of processes sees the same. An answer
    that leaves the prompt no room within `max_length` tokens is cut.
    """

    def __init__(self, store: TokenStore) -> None:
        super().__init__(store.picks, store.max_length)
        self._pairs = store
        count = len(self)
        self._branches = np.array([store.branches_of(i) for i in range(count)], dtype=np.int64).reshape(-1, 3)
        own = np.arange(count)
        self._others = (own + count // 2) % max(1, count)
        answers = self._branches[self._others, 1 + own % 2]
        self._taken = np.minimum(answers, self.max_length - self._branches[:, 0]).astype(np.int64)
        self.lengths = (self.lengths + self._taken).astype(np.int32)
        self.supervised = np.array([_labelled(self[i][1]) for i in range(count)], dtype=np.int32)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, labels = self._pairs[index]
        other_ids, other_labels = self._pairs[int(self._others[index])]
        prompt, chosen, _ = self._branches[self._others[index]]
        begin = int(prompt + (chosen if index % 2 else 0))
        end = begin + int(self._taken[index])
        return np.concatenate([ids, other_ids[begin:end]]), np.concatenate([labels, other_labels[begin:end]])

    def branches_of(self, index: int) -> NDArray[np.int64]:
        return np.append(self._branches[index], self._taken[index])


def _labelled(labels: NDArray[np.int64]) -> int:
    return int((labels != IGNORE).sum())
