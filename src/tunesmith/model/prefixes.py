"""Documents that begin alike, such as with one system prompt, share the tokens of their common beginning.

What a causal model computes for a token depends on the tokens up to it alone: so equal beginnings, at equal
positions, are computed once for all documents of a batch. Norms and projections work on the shorter stream;
attention sees every document whole. The gradients of all copies are summed where the token stands.

Shapes: T tokens of a batch, U of them computed, N features of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.model.fast_attention import can_attend_from_ends

Ints = NDArray[np.int64]
# Below this share of tokens spared, gathering them costs more than computing them.
LEAST_SPARED = 0.04


@dataclass(frozen=True)
class Shared:
    """kept [U]: the tokens that are computed, ascending; places [T]: where in them each token is found;
    copies: the tokens that stand for another one, which was computed; own: how many of each document's
    tokens, its last, are computed."""

    kept: Tensor
    places: Tensor
    copies: Tensor
    own: tuple[int, ...]

    def to(self, device: torch.device) -> Shared:
        return Shared(self.kept.to(device), self.places.to(device), self.copies.to(device), self.own)

    def spread(self, x_UN: Tensor) -> Tensor:
        """[U, N] -> [T, N]: every token's row."""
        out: Tensor = _Spread.apply(x_UN, self.kept, self.places, self.copies)
        return out

    def pick(self, x_TN: Tensor) -> Tensor:
        """[T, N] -> [U, N]: the rows of the tokens that are computed."""
        return x_TN.index_select(0, self.kept)


def find_shared(input_ids: Ints, lengths: Sequence[int]) -> Shared | None:
    """The equal beginnings of documents laid end to end; None where they are too short to pay."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = [input_ids[a:b] for a, b in pairwise(starts.tolist())]
    order = sorted(range(len(documents)), key=lambda d: documents[d].tolist())
    owners = np.arange(len(input_ids))
    for earlier, later in pairwise(order):
        same = _common(documents[earlier], documents[later])
        # In this order a document's longest common beginning is the one with its neighbour.
        owners[starts[later] : starts[later] + same] = owners[starts[earlier] : starts[earlier] + same]
    kept, places = np.unique(owners, return_inverse=True)
    if len(kept) > (1 - LEAST_SPARED) * len(input_ids):
        return None
    copied = owners != np.arange(len(owners))
    own = tuple(int(b - a) - int(copied[a:b].sum()) for a, b in pairwise(starts.tolist()))
    copies = torch.from_numpy(np.flatnonzero(copied))
    return Shared(torch.from_numpy(kept), torch.from_numpy(places), copies, own)


def _common(one: Ints, other: Ints) -> int:
    """How many tokens two documents have in common at their beginnings."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


class SharedLayout:
    """Attention over whole documents for a stream in which their common beginnings stand once.

    layout: of the whole documents; its `attend` takes `own`.
    """

    def __init__(self, layout: Any, shared: Shared) -> None:
        self._layout, self._shared = layout, shared

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        k, v = self._whole(k), self._whole(v)
        if can_attend_from_ends(q, dropout):
            found: Tensor = self._layout.attend(layer, q, k, v, scale, dropout, self._shared.own)
            return found
        out = self._layout.attend(layer, self._whole(q), k, v, scale, dropout)
        return self._shared.pick(out[0].flatten(1)).view(1, -1, *out.shape[2:])

    def _whole(self, x: Tensor) -> Tensor:
        """[1, H, U, Dh] -> [1, H, T, Dh]."""
        rows = x[0].transpose(0, 1)
        return self._shared.spread(rows.flatten(1)).view(-1, *rows.shape[1:]).transpose(0, 1)[None]


class _Spread(torch.autograd.Function):
    """index_select, whose own backward pass would add row by row; here only the copies are added."""

    @staticmethod
    def forward(ctx: Any, x_UN: Tensor, kept: Tensor, places: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(kept, places, copies)
        return x_UN.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, places, copies = ctx.saved_tensors
        dx_UN = grads[0].index_select(0, kept)
        dx_UN.index_add_(0, places[copies], grads[0].index_select(0, copies))
        return dx_UN, None, None, None
