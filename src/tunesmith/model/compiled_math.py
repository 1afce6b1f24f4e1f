"""The functions of `model.fast_math` as plain formulas, each compiled by torch into one pass over memory.

Compiling needs a C++ compiler on a CPU and seconds of time, or less where torch's own cache on disk has the
result. Numbers differ from those of `fast_math` by rounding alone.

Shapes: T tokens, D hidden size, I intermediate size, H heads, Dh head size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.fast_math import Math


def has_compiler() -> bool:
    """True when torch's CPU backend can find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


@cache
def compiled_math() -> Math:
    """`fast_math`'s functions, compiled at their first call for batches of any length."""

    def compiled(function: Callable[..., Any]) -> Any:
        return torch.compile(function, dynamic=True, fullgraph=True)

    return Math(
        rms_norm=compiled(_rms_norm),
        normalised=compiled(_normalised),
        rms_norm_backward=compiled(_rms_norm_backward),
        swiglu=compiled(_swiglu),
        swiglu_backward=compiled(_swiglu_backward),
        rotate=compiled(_rotate),
    )


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x_TD.float()
    inverse_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return _normalised(x_TD, inverse_T1, weight_D, dtype), inverse_T1


def _normalised(x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    return ((x_TD.float() * inverse_T1).to(x_TD.dtype) * weight_D).to(dtype)


def _rms_norm_backward(
    d_out_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, plus_TD: Tensor | None, train: bool
) -> tuple[Tensor, Tensor | None]:
    x, d_out, weight = x_TD.float(), d_out_TD.float(), weight_D.float()
    scaled = d_out * weight
    slope_T1 = (scaled * x).sum(-1, keepdim=True) * inverse_T1.pow(3) * (-1 / x.shape[-1])
    dx = scaled * inverse_T1 + x * slope_T1
    if plus_TD is not None:
        dx = dx + plus_TD
    d_weight = (d_out * x * inverse_T1).sum(0).to(weight_D.dtype) if train else None
    return dx.to(x_TD.dtype), d_weight


def _swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    gate = gate_TI.float()
    # Rounded to gate's format between the two, as transformers does.
    return (gate * torch.sigmoid(gate)).to(gate_TI.dtype) * up_TI


def _swiglu_backward(d_out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = gate_TI.dtype
    d_out, gate, up = d_out_TI.float(), gate_TI.float(), up_TI.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    return (slope * d_out * up).to(dtype), (d_out * silu).to(dtype), (silu * up).to(dtype)


def _rotate(x_THDh: Tensor, cos_TDh: Tensor, sin_TDh: Tensor, *, back: bool = False) -> Tensor:
    half = x_THDh.shape[-1] // 2
    sign = -1 if back else 1
    cos, sin = cos_TDh[:, None, :half], sign * sin_TDh[:, None, :half]
    one, other = x_THDh[..., :half], x_THDh[..., half:]
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x_THDh.dtype)
