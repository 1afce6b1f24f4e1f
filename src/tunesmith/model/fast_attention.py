"""Causal attention within each of several documents, in the fastest exact form for where it runs.

On a GPU in 16 bits torch's variable-length flash attention takes them all at once. On a CPU each document is
computed alone and written straight to its place; short ones in fp32 by plain batched products, which there
beat flash attention's blocks up to about 256 tokens. Nothing of size tokens x tokens is kept for the
backward pass.

Shapes: T tokens, L of one document, H query heads, Hkv key/value heads, G = H / Hkv, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

SHORT = 256


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float = 0.0
) -> Tensor:
    """q [1, H, T, Dh], k and v [1, Hkv, T, Dh], documents of `lengths` end to end -> [1, T, H, Dh]."""
    if torch.is_autocast_enabled(q.device.type):  # rotated q and k may be fp32 beside a v of 16 bits
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if dropout == 0.0 and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, lengths, scale)
    if dropout == 0.0 and q.device.type == "cpu":
        out: Tensor = _Documents.apply(q, k, v, tuple(lengths), scale)
        return out
    return _one_by_one(q, k, v, lengths, scale, dropout)


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


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        out = torch.empty((1, q.shape[2], q.shape[1], q.shape[3]), dtype=q.dtype)
        heads_first, sums, at = out.transpose(1, 2), [], 0
        for length in lengths:
            part = slice(at, at + length)
            document = q[:, :, part], k[:, :, part], v[:, :, part]
            if _is_short(q, length):
                _short_forward(*document, scale, heads_first[0, :, part])
            else:
                found, log_sum = _flash(*document, 0.0, True, scale=scale)
                heads_first[:, :, part] = found
                sums.append(log_sum)
            at += length
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, *sums = ctx.saved_tensors
        d_out, heads_first = grads[0].transpose(1, 2), out.transpose(1, 2)
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        logs, at = iter(sums), 0
        for length in ctx.lengths:
            part = slice(at, at + length)
            document = q[:, :, part], k[:, :, part], v[:, :, part]
            if _is_short(q, length):
                found = _short_backward(d_out[:, :, part], *document, ctx.scale)
            else:
                rest = (heads_first[:, :, part], next(logs), 0.0, True)
                found = _flash_backward(d_out[:, :, part], *document, *rest, scale=ctx.scale)
            for whole, gradient in zip((dq, dk, dv), found, strict=True):
                whole[:, :, part] = gradient
            at += length
        return dq, dk, dv, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_short(q: Tensor, length: int) -> bool:
    """Scores of 16 bits would be rounded before the softmax; flash attention keeps them in fp32."""
    return q.dtype in (torch.float32, torch.float64) and length <= SHORT


def _probabilities(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax of the masked scores [Hkv, G·L, L], the scaled queries [Hkv, G·L, Dh])."""
    heads, length = k.shape[1], q.shape[2]
    queries = torch.mul(q[0], scale).reshape(heads, -1, q.shape[3])
    scores = torch.bmm(queries, k[0].transpose(1, 2)).view(-1, length, length)
    scores += _future(length, q.dtype)
    return torch.softmax(scores, -1).view(heads, -1, length), queries


@lru_cache(maxsize=2 * SHORT)
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """[L, L]: minus infinity where a key comes after the query."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def _short_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, out_HLDh: Tensor) -> None:
    chances, _ = _probabilities(q, k, scale)
    out_HLDh.copy_(torch.bmm(chances, v[0]).view(out_HLDh.shape))


def _short_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    chances, queries = _probabilities(q, k, scale)
    d_seen = d_out[0].reshape(queries.shape)
    dv = torch.bmm(chances.transpose(1, 2), d_seen)
    d_chances = torch.bmm(d_seen, v[0].transpose(1, 2))
    # d_scores = chances * (d_chances - sum over keys of chances * d_chances)
    d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype)
    dq = torch.bmm(d_scores, k[0]).mul_(scale)
    dk = torch.bmm(d_scores.transpose(1, 2), queries)
    return dq.view(q.shape), dk[None], dv[None]
