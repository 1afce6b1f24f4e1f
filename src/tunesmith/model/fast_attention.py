"""Causal attention within each of several documents, in the fastest exact form for where it runs.

On a GPU in 16 bits torch's variable-length flash attention takes them all at once. On a CPU each document is
computed alone and written straight to its place; in fp32, up to about a thousand tokens, by
`model.block_attention`, which there beats flash attention. Nothing of size tokens x tokens is kept for the
backward pass.

Shapes: T tokens, U of them that ask, L of one document, H query heads, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from tunesmith.model import block_attention
from tunesmith.model.hardware import computes_on

# Tokens of a document up to which blocks of queries are the fastest.
SHORT = 1024
# Scores of 16 bits would be rounded before the softmax; flash attention keeps them in fp32.
EXACT = (torch.float32, torch.float64)


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    dropout: float = 0.0,
    own: Sequence[int] | None = None,
) -> Tensor:
    """q [1, H, U, Dh], k and v [1, Hkv, T, Dh], documents of `lengths` end to end -> [1, U, H, Dh].

    own: how many last tokens of each document q has, where `can_attend_from_ends`; default: all, U = T.
    """
    if torch.is_autocast_enabled(q.device.type):  # rotated q and k may be fp32 beside a v of 16 bits
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    kind = computes_on(q.device)
    if dropout == 0.0 and kind == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, lengths, scale)
    if dropout == 0.0 and kind == "cpu":
        parts = _parts(lengths, lengths if own is None else own)
        out: Tensor = _Documents.apply(q, k, v, parts, scale)
        return out
    return _one_by_one(q, k, v, lengths, scale, dropout)


def can_attend_from_ends(q: Tensor, dropout: float) -> bool:
    """True where q may hold the last tokens of each document alone."""
    autocast = torch.is_autocast_enabled(q.device.type)
    return computes_on(q.device) == "cpu" and dropout == 0.0 and not autocast and q.dtype in EXACT


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float
) -> Tensor:
    queries, keys, values = (x.split(list(lengths), dim=2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    documents = [
        F.scaled_dot_product_attention(
            queries[d], keys[d], values[d], is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=gqa
        )
        for d in range(len(lengths))
    ]
    return torch.cat(documents, dim=2).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    places, longest = starts.to(q.device), max(lengths)
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    out = varlen_attn(
        queries, keys, values, places, places, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


class _Part(NamedTuple):
    """One document: where its queries stand in q, and its tokens in k and v."""

    queries: slice
    tokens: slice

    def by_blocks(self, q: Tensor) -> bool:
        num_queries, length = (part.stop - part.start for part in self)
        return q.dtype in EXACT and (length <= SHORT or num_queries < length)


def _parts(lengths: Sequence[int], own: Sequence[int]) -> list[_Part]:
    parts, begin, at = [], 0, 0
    for length, count in zip(lengths, own, strict=True):
        parts.append(_Part(slice(begin, begin + count), slice(at, at + length)))
        begin, at = begin + count, at + length
    return parts


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[_Part], scale: float) -> Tensor:
        out = torch.empty((1, q.shape[2], q.shape[1], q.shape[3]), dtype=q.dtype)
        heads_first, sums = out.transpose(1, 2), []
        for part in parts:
            asked, tokens = part
            document = q[:, :, asked], k[:, :, tokens], v[:, :, tokens]
            if part.by_blocks(q):
                q_part, k_part, v_part = (x[0] for x in document)
                block_attention.forward(q_part, k_part, v_part, scale, heads_first[0, :, asked])
            else:
                found, log_sum = _flash(*document, 0.0, True, scale=scale)
                heads_first[:, :, asked] = found
                sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out if sums else None, *sums)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, *sums = ctx.saved_tensors
        d_out, logs = grads[0].transpose(1, 2), iter(sums)
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        for part in ctx.parts:
            asked, tokens = part
            document = q[:, :, asked], k[:, :, tokens], v[:, :, tokens]
            into = dq[:, :, asked], dk[:, :, tokens], dv[:, :, tokens]
            if part.by_blocks(q):
                q_part, k_part, v_part = (x[0] for x in document)
                places = [x[0] for x in into]
                block_attention.backward(d_out[0, :, asked], q_part, k_part, v_part, ctx.scale, places)
            else:
                seen = out.transpose(1, 2)[:, :, asked]
                rest = (seen, next(logs), 0.0, True)
                found = _flash_backward(d_out[:, :, asked], *document, *rest, scale=ctx.scale)
                for place, gradient in zip(into, found, strict=True):
                    place.copy_(gradient)
        return dq, dk, dv, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
