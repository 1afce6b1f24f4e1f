"""RMSNorm, SwiGLU and rotary embedding, forward and backward, in few passes over memory.

Plain functions on tensors, for the autograd functions of `model.fast_layers`: none of them records a graph.
What is not needed for a product is worked out in blocks of rows that stay in a core's cache.

Shapes: T tokens, D hidden size, I intermediate size, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model.hardware import abridged, computes_on

# 128 rows of 1,536 fp32 numbers are 0.75 MiB; for each thread that works on a block.
BLOCK_ELEMENTS = 128 * 1536


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices over the rows of x [T, N]: few for a GPU, whose launches cost more than its passes."""
    threads = torch.get_num_threads() if computes_on(x.device) == "cpu" else len(x)
    rows = max(1, BLOCK_ELEMENTS * threads // x.shape[-1])
    return abridged([slice(at, at + rows) for at in range(0, len(x), rows)])


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight as `dtype` [T, D], 1 / rms(x) [T, 1] fp32), after Zhang & Sennrich 2019,
    arXiv:1910.07467; rms² is the mean square plus eps."""
    x = x_TD.float()
    inverse_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_T1 = inverse_T1.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return normalised(x_TD, inverse_T1, weight_D, dtype), inverse_T1


def normalised(x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output again, from what is kept of it."""
    out = torch.empty_like(x_TD, dtype=dtype)
    for rows in row_blocks(x_TD):
        # Rounded to x's format before the weight, as transformers does.
        scaled = (x_TD[rows].float() * inverse_T1[rows]).to(x_TD.dtype)
        torch.mul(scaled, weight_D, out=out[rows])
    return out


def rms_norm_backward(
    d_out_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, plus_TD: Tensor | None, train: bool
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, plus `plus_TD`, the gradient that goes around the norm; gradient of the weight)."""
    weight = weight_D.float()
    dx = torch.empty_like(x_TD)
    d_weight = torch.zeros_like(weight) if train else None
    for rows in row_blocks(x_TD):
        x, d_out, inverse = x_TD[rows].float(), d_out_TD[rows].float(), inverse_T1[rows]
        product = d_out * x
        slope = torch.mv(product, weight)[:, None].mul_(inverse.pow(3)).mul_(-1 / x.shape[-1])
        if d_weight is not None:
            d_weight.addmv_(product.T, inverse[:, 0])
        d = torch.mul(d_out, weight, out=product).mul_(inverse)
        if plus_TD is not None:
            d += plus_TD[rows]
        torch.addcmul(d, x, slope, out=dx[rows])
    return dx, None if d_weight is None else d_weight.to(weight_D.dtype)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate_TI).mul_(up_TI)


def swiglu_backward(d_out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up again); d_out_TI may be overwritten."""
    d_gate, d_up = torch.empty_like(gate_TI), torch.empty_like(up_TI)
    for rows in row_blocks(gate_TI):
        gate, up, d_out = gate_TI[rows].float(), up_TI[rows].float(), d_out_TI[rows].float()
        d_silu = d_out * up
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate[rows])
        silu = torch.ops.aten.silu.out(gate, out=d_silu)
        torch.mul(d_out, silu, out=d_up[rows])
        torch.mul(silu, up, out=d_out_TI[rows])
    return d_gate, d_up, d_out_TI


def rotate(x_THDh: Tensor, cos_TDh: Tensor, sin_TDh: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of [T, H, Dh], as a new tensor.

    Pairs are (i, i + Dh/2), as in transformers; cos and sin [T, Dh] have equal halves. back: the inverse
    rotation times cos² + sin² of the scaled tables, which is the gradient.
    """
    half = x_THDh.shape[-1] // 2
    cos, sin = cos_TDh[:, None], sin_TDh[:, None, :half]
    out = x_THDh * cos
    sign = -1 if back else 1
    out[..., :half].addcmul_(x_THDh[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x_THDh[..., :half], sin, value=sign)
    return out.to(x_THDh.dtype)


@dataclass(frozen=True, kw_only=True)
class Math:
    """One way of computing the functions above; their signatures and results are these."""

    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    normalised: Callable[..., Tensor]
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor | None]]
    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[..., Tensor]


IN_BLOCKS = Math(
    rms_norm=rms_norm,
    normalised=normalised,
    rms_norm_backward=rms_norm_backward,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    rotate=rotate,
)
