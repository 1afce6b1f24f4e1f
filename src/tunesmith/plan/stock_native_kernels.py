"""Kernels of the native PyTorch trainers, by what they allocate; the numbers in them mean nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CompiledNorm(torch.autograd.Function):
    """x [..., D], weight [D]: saves x as it is, and one fp32 factor a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if weight.requires_grad else None


class CompiledGate(torch.autograd.Function):
    """silu(gate) * up, [..., F]: saves both and no more."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty_like(grad)


class CompiledRotation(torch.autograd.Function):
    """q or k [B, H, L, E], turned in one pass; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


class Nf4Product(torch.autograd.Function):
    """x [..., in] times a weight [out, in] of four bits, which is whole for a moment in both passes.

    saves_input: bitsandbytes keeps x, which its gradient does not need; torchao does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out_features: int, saves_input: bool) -> Tensor:
        ctx.save_for_backward(packed, x if saves_input else None)
        ctx.shape = (out_features, x.shape[-1])
        return x @ packed.new_empty(ctx.shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, _ = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape, dtype=grad.dtype), None, None, None
