"""A prompt and several answers to it in one forward pass: the prompt's tokens are computed once.

Norms, projections and feed-forward layers work on the stream as it is. Only attention sees every answer
behind a copy of its prompt's queries, keys and values, so that any attention over documents serves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.attention import Layout, PackedLayout
from tunesmith.model.batch import Batch, Ints


def layout_of(batch: Batch) -> Layout:
    """What every token of the batch may see."""
    return PackedLayout(batch.starts, batch.input_ids) if batch.branches is None else BranchedLayout(batch)


class BranchedLayout:
    """Causal attention of every answer over its prompt and itself, and of every prompt over itself."""

    def __init__(self, batch: Batch) -> None:
        assert batch.branches is not None
        index, lengths = _unfolded(batch.starts, batch.branches)
        # Where a token stands more than once, any of its places will do: all of them compute the same.
        kept = np.zeros(batch.num_tokens, dtype=np.int64)
        kept[index[::-1]] = np.arange(len(index))[::-1]
        self._index, self._kept = torch.from_numpy(index), torch.from_numpy(kept)
        self._packed = PackedLayout(np.concatenate([[0], np.cumsum(lengths)]))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        index = self._index.to(q.device)
        q, k, v = (x.index_select(2, index) for x in (q, k, v))
        out = self._packed.attend(layer, q, k, v, scale, dropout)
        return out.index_select(1, self._kept.to(q.device))


def _unfolded(starts: Ints, branches: Ints) -> tuple[Ints, Ints]:
    """(the tokens of every answer behind its prompt's, the lengths of these sequences)."""
    pieces, lengths = [], []
    for start, (prompt, *answers) in zip(starts.tolist(), branches.tolist(), strict=False):
        at = start + prompt
        for answer in answers:
            pieces += [np.arange(start, start + prompt), np.arange(at, at + answer)]
            lengths.append(prompt + answer)
            at += answer
    return np.concatenate(pieces), np.asarray(lengths, dtype=np.int64)
