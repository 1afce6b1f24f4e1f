"""Operations of other people's kernels, by what they allocate: for tracing on fake tensors.

Each makes and saves what the kernel of that name makes and saves; the numbers in them mean nothing.

Shapes: B batch, S length, H query heads, Hkv key/value heads, D head size, N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# FlashAttention-2 computes head sizes in steps of 32 and lengths in blocks of 128.
HEAD_STEP, LENGTH_BLOCK = 32, 128


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


class FlashAttention(torch.autograd.Function):
    """q [B, H, S, D], k and v [B, Hkv, S, D] -> [B, S, H, D] (Dao 2023, arXiv 2307.08691).

    Saved: q, k, v, the result, and the log of every row's sum in fp32. The backward pass accumulates the
    gradient of q in fp32 and, where heads share keys, has keys' gradients of every query head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        step = 8 if q.shape[-1] % 8 else 1
        if step > 1:
            q, k, v = (torch.nn.functional.pad(t, (0, -t.shape[-1] % step)) for t in (q, k, v))
        batch, heads, length, size = q.shape
        out = q.new_empty(batch, length, heads, size)
        sums = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _, _, sums = ctx.saved_tensors
        batch, heads, length, size = q.shape
        accumulated = q.new_empty(
            batch, _up(length, LENGTH_BLOCK), heads, _up(size, HEAD_STEP), dtype=torch.float32
        )
        dots = torch.empty_like(sums)
        dq = q.new_empty(batch, length, heads, size).transpose(1, 2)
        dk, dv = (k.new_empty(batch, length, k.shape[1], size).transpose(1, 2) for _ in range(2))
        if k.shape[1] != heads:
            expanded = [k.new_empty(batch, length, heads, size) for _ in range(2)]
            del expanded
        del accumulated, dots
        return dq, dk, dv


class MemoryEfficientAttention(torch.autograd.Function):
    """The same shapes as `FlashAttention`, heads not shared (xFormers' kernel: for cards before Ampere)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        out = q.new_empty(batch, length, heads, size)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, _up(length, 32), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, sums = ctx.saved_tensors
        delta = torch.empty_like(sums)
        # The gradient of q is accumulated in fp32; those of k and v lie in registers up to heads of 128.
        wide = (q,) if q.shape[-1] <= 128 else (q, k, v)
        work = [torch.empty_like(t, dtype=torch.float32) for t in wide if t.dtype != torch.float32]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del delta, work
        return grads


class FusedRmsNorm(torch.autograd.Function):
    """x [..., D], weight [D]: saves x and an fp32 factor a row; the gradient is the result's, overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        _, weight, _ = ctx.saved_tensors
        return grad.contiguous(), torch.empty_like(weight) if weight.requires_grad else None


class Dropped(torch.autograd.Function):
    """Dropout: the result, and a mask of one byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


class FusedCrossEntropy(torch.autograd.Function):
    """logits [N, V] -> loss; the gradient is written over the logits (Unsloth's and Liger's kernels)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        sums = logits.new_empty(logits.shape[0], dtype=torch.float32)
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        ctx.save_for_backward(logits.detach(), sums, labels)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def liger_chunk(tokens: int, hidden: int, vocabulary: int) -> int:
    """Tokens at a time of Liger's fused linear cross-entropy: as much memory as the hidden states take."""
    factor = -(-vocabulary // hidden)
    return 1 << (max(1, -(-tokens // factor)) - 1).bit_length()


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, D], weight [V, D] -> loss, without ever all logits (Liger Kernel, arXiv 2410.10989).

    The gradients are made in the forward pass, chunk by chunk; the weight's only where it is trained.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        chunk = liger_chunk(hidden.shape[0], hidden.shape[1], weight.shape[0])
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for start in range(0, min(hidden.shape[0], 2 * chunk), chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            logits = logits.float()
            logits = logits.to(hidden.dtype)
            grads = logits * 0.5  # lives on while the next chunk's logits are made
            grad_hidden[start : start + chunk] = grads @ weight
            if grad_weight is not None:
                torch.addmm(grad_weight, grads.t(), part, out=grad_weight)
        del part, logits, grads
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None


class DequantisedProduct(torch.autograd.Function):
    """x [..., in] times a quantised weight [out, in]: the weight is whole for a moment, forward and backward.

    scratch: fp32 numbers that unpacking needs beside it (scales that are themselves quantised).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out_features: int, scratch: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.scratch, ctx.dtype = (out_features, x.shape[-1]), scratch, x.dtype
        return x @ unpacked(packed, ctx.shape, scratch, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grad @ unpacked(packed, ctx.shape, ctx.scratch, grad.dtype), None, None, None


def unpacked(packed: Tensor, shape: tuple[int, int], scratch: int, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised layer in the format that is computed in."""
    scales = packed.new_empty(scratch, dtype=torch.float32) if scratch else None
    weight = packed.new_empty(shape, dtype=dtype)
    del scales
    return weight


class FusedLora(torch.autograd.Function):
    """x times a quantised weight, plus its adapter, in one: saved are x and, with dropout, what it left of x,
    in the format computed in (Unsloth's fast LoRA, as fms-acceleration's fused operations take it over).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, a: Tensor, b: Tensor, scratch: int, dropout: bool
    ) -> Tensor:
        kept = torch.empty_like(x) if dropout else x
        ctx.save_for_backward(x, kept, packed, a, b)
        ctx.scratch = scratch
        out = x @ unpacked(packed, (b.shape[0], x.shape[-1]), scratch, x.dtype).t()
        out += (kept @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, packed, a, b = ctx.saved_tensors
        grad, rows = grad.reshape(-1, b.shape[0]), kept.reshape(-1, x.shape[-1])
        low = grad @ b.to(x.dtype)
        grad_a, grad_b = (low.t() @ rows).to(a.dtype), (grad.t() @ (rows @ a.to(x.dtype).t())).to(b.dtype)
        grad_x = grad @ unpacked(packed, (b.shape[0], x.shape[-1]), ctx.scratch, x.dtype)
        grad_x += low @ a.to(x.dtype)
        return grad_x.view(x.shape), None, grad_a, grad_b, None, None
