"""Causal attention of one document by plain batched products: a block of queries with the keys up to its end.

What a causal mask would hide is mostly not computed. The queries may be the document's last tokens alone.

Shapes: L tokens, N of them that ask, n of a block, m keys up to its end; H query heads, Hkv key/value heads,
G = H / Hkv, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tunesmith.model.hardware import made_once

# Queries of a block, about: smaller ones skip more of the mask, larger ones are fewer products.
BLOCK = 96


def forward(q_HNDh: Tensor, k: Tensor, v: Tensor, scale: float, out_HNDh: Tensor) -> None:
    """Writes attention of the last N of the L tokens to out. k, v [Hkv, L, Dh]."""
    before = k.shape[1] - q_HNDh.shape[1]
    for begin, end in _blocks(q_HNDh.shape[1]):
        queries, num_keys = _by_kv_head(q_HNDh[:, begin:end], len(k)), before + end
        chances = _probabilities(queries, k[:, :num_keys], before + begin, scale)
        seen = torch.bmm(chances, v[:, :num_keys])
        out_HNDh[:, begin:end] = seen.view(len(out_HNDh), end - begin, -1)


def backward(
    d_out: Tensor, q_HNDh: Tensor, k: Tensor, v: Tensor, scale: float, into: Sequence[Tensor]
) -> None:
    """Writes the gradients of q, k and v to the places `into`; d_out [H, N, Dh]."""
    dq, dk, dv = into
    if not q_HNDh.shape[1]:
        dk.zero_()
        dv.zero_()
        return
    before = k.shape[1] - q_HNDh.shape[1]
    # The last block sees all keys: it makes the sums to which those before it add.
    sums: list[Tensor] = []
    for begin, end in reversed(_blocks(q_HNDh.shape[1])):
        rows, num_keys = slice(begin, end), before + end
        block = _by_kv_head(d_out[:, rows], len(k)), _by_kv_head(q_HNDh[:, rows], len(k))
        dq_block, *found = _block_backward(*block, k[:, :num_keys], v[:, :num_keys], before + begin, scale)
        dq[:, rows] = dq_block.view(len(dq), end - begin, -1)
        for whole, part in zip(sums, found, strict=False):
            whole[:, :num_keys] += part
        sums = sums or found
    dk.copy_(sums[0])
    dv.copy_(sums[1])


def _block_backward(
    d_seen: Tensor, queries: Tensor, k: Tensor, v: Tensor, begin: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block's queries [Hkv, G·n, Dh], and of keys and values [Hkv, m, Dh]."""
    chances = _probabilities(queries, k, begin, scale)
    dv = torch.bmm(chances.transpose(1, 2), d_seen)
    d_chances = torch.bmm(d_seen, v.transpose(1, 2))
    # d_scores = chances * (d_chances - sum over keys of chances * d_chances)
    d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype)
    return _scaled(d_scores, k, scale), _scaled(d_scores.transpose(1, 2), queries, scale), dv


def _blocks(count: int) -> list[tuple[int, int]]:
    """Where each block of queries begins and ends: equal parts of about BLOCK."""
    parts = -(-count // BLOCK)
    return list(pairwise(count * part // parts for part in range(parts + 1))) if count else []


def _by_kv_head(x_HnDh: Tensor, kv_heads: int) -> Tensor:
    """[Hkv, G·n, Dh]: the rows of all query heads that share a key head."""
    return x_HnDh.reshape(kv_heads, -1, x_HnDh.shape[-1])


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale · x y, batch by batch."""
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)


def _probabilities(queries: Tensor, k: Tensor, begin: int, scale: float) -> Tensor:
    """Softmax [Hkv, G·n, m] of the masked scores of queries that stand at `begin` to the last of m keys."""
    scores = _scaled(queries, k.transpose(1, 2), scale)
    num_keys = k.shape[1]
    block = num_keys - begin
    scores.view(-1, block, num_keys)[:, :, begin:] += _future(block, k.dtype)
    return torch.softmax(scores, -1)


@made_once
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """[n, n]: minus infinity where a key comes after the query."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
