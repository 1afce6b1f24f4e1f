"""AdamW that never holds more than a chunk in fp32: 8-bit averages, and bf16 weights rounded by chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.optional import load
from tunesmith.model.hardware import abridged, computes_on
from tunesmith.recipe.memory import BLOCK_8BIT, MIN_8BIT
from tunesmith.train.stored import Blocks8, Plain, Rounded, Stored, blocks, dynamic_map

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}


class ChunkedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), its averages and weights kept in few bits.

    eight_bit: averages in blocks of 8 bits (Dettmers et al. 2021, arXiv:2110.02861), else in the weights'
    format; stochastic: what is kept in bf16 is rounded by chance, from `seed` and the weight's number alone.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        eight_bit: bool,
        stochastic: bool,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.eight_bit, self.stochastic, self.seed = eight_bit, stochastic, 0
        for _, parameter in self._members():
            self._allocate(parameter)

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    def _allocate(self, parameter: Tensor) -> None:
        """Averages at 0. A name ending in _scale holds the blocks' largest magnitudes."""
        state = self.state[parameter]
        state["step"] = torch.zeros(())
        small = self.eight_bit and parameter.numel() < MIN_8BIT
        dtype = torch.float32 if small else torch.uint8 if self.eight_bit else parameter.dtype
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            if dtype == torch.uint8:
                state[f"{name}_scale"] = torch.zeros(
                    -(-parameter.numel() // BLOCK_8BIT), device=parameter.device
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for number, (group, parameter) in enumerate(self._members()):
            if parameter.grad is not None:
                self._update(number, group, parameter)

    def _update(self, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] += 1
        draw = self._generator(number, parameter.device) if self.stochastic else None
        weights = _stored(parameter.detach(), draw)
        mean, square = (self._average(state, name, draw) for name in ("exp_avg", "exp_avg_sq"))
        flat, size = gradient.reshape(-1), CHUNK[computes_on(parameter.device)]
        count = flat.numel()
        for at in abridged([slice(start, min(start + size, count)) for start in range(0, count, size)]):
            update_chunk(weights, mean, square, flat[at].float(), at, group, step=int(state["step"]))

    def _generator(self, number: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed + number)

    def _average(self, state: dict[str, Tensor], name: str, draw: torch.Generator | None) -> Stored:
        if state[name].dtype == torch.uint8:
            return Blocks8(state[name].view(-1), state[f"{name}_scale"], signed=name == "exp_avg")
        return _stored(state[name], draw)


def _stored(values: Tensor, draw: torch.Generator | None) -> Stored:
    flat = values.view(-1)
    return Rounded(flat, draw) if draw is not None and values.dtype == torch.bfloat16 else Plain(flat)


def update_chunk(
    weights: Stored,
    mean: Stored,
    square: Stored,
    gradient_n: Tensor,
    at: slice,
    group: dict[str, Any],
    *,
    step: int,
) -> None:
    """One AdamW step of the elements `at`. gradient_n: fp32; step: 1 at the first."""
    weight_n = weights.read(at)
    kernel = _cuda_kernel() if computes_on(weight_n.device) == "cuda" else None
    if kernel is not None and isinstance(mean, Blocks8) and isinstance(square, Blocks8):
        _update_by_kernel(kernel, weight_n, mean, square, gradient_n, at, group, step)
    else:
        mean_n, square_n = mean.read(at), square.read(at)
        adamw_(weight_n, mean_n, square_n, gradient_n, group, step=step)
        mean.write(at, mean_n)
        square.write(at, square_n)
    weights.write(at, weight_n)


def adamw_(
    weight: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, group: dict[str, Any], *, step: int
) -> None:
    """AdamW on fp32 tensors of one shape, in place. group: "lr", "betas", "eps", "weight_decay"."""
    beta1, beta2 = group["betas"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


@cache
def _cuda_kernel() -> Callable[..., None] | None:
    """bitsandbytes' fused update of the same 8-bit format; None where it is not installed."""
    try:
        load("bitsandbytes")
    except ImportError:
        return None
    kernel: Callable[..., None] = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise
    return kernel


def _update_by_kernel(
    kernel: Callable[..., None],
    weight_n: Tensor,
    mean: Blocks8,
    square: Blocks8,
    gradient_n: Tensor,
    at: slice,
    group: dict[str, Any],
    step: int,
) -> None:
    beta1, beta2 = group["betas"]
    kernel(
        "adam", gradient_n, weight_n, mean.codes[at], square.codes[at],
        beta1, beta2, 0.0, 0.0, group["eps"], step, group["lr"],
        dynamic_map(True, weight_n.device), dynamic_map(False, weight_n.device),
        mean.scales[blocks(at)], square.scales[blocks(at)],
        group["weight_decay"], 1.0,
    )  # fmt: skip
