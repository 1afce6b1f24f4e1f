"""AdamW, the course of the learning rate, and what is done to gradients between backward and step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.recipe.schema import Method, Train
from tunesmith.train.adamw import allocated_adamw
from tunesmith.train.chunked_adamw import ChunkedAdamW
from tunesmith.train.offload import OffloadedAdamW


@dataclass(frozen=True)
class Schedule:
    """Learning rate by optimizer step (0-based): linear warm-up, then `kind`.

    Step s of the warm-up has peak x (s + 1) / (warmup_steps + 1), so the first is never 0 and step
    `warmup_steps` is the first at the peak. After it cosine and linear fall towards peak x min_ratio, which
    they would reach at step `total_steps`, the first that is not taken.
    """

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    total_steps: int
    warmup_steps: int
    min_ratio: float

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        if self.kind == "constant":
            return self.peak
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * left[self.kind])


def make_schedule(train: Train, total_steps: int) -> Schedule:
    """The schedule of a resolved recipe. However few steps there are, the peak is reached."""
    assert train.lr != "auto"
    wanted = train.warmup_steps
    if wanted is None:
        wanted = math.ceil(train.warmup_ratio * total_steps) if train.warmup_ratio else 0
    warmup = min(wanted, total_steps - 1)
    return Schedule(train.schedule, train.lr, total_steps, warmup, train.min_lr_ratio)


def make_optimizer(model: nn.Module, train: Train, method: Method) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on what requires a gradient; only matrices decay.

    Every group's `lr_scale` is its learning rate over the schedule's: `method.lora_plus_ratio` for the B
    matrices of adapters (LoRA+, Hayou et al. 2024, arXiv:2402.12354), else 1. Its state is allocated.
    """
    groups = parameter_groups(model, train.weight_decay, method.lora_plus_ratio or 1.0)
    stochastic, eight_bit = train.stochastic_rounding is True, train.optimizer == "adamw-8bit"
    if train.optimizer == "adamw-offload":
        return OffloadedAdamW(groups, betas=train.betas, eps=train.eps)
    if eight_bit or stochastic:
        return ChunkedAdamW(
            groups, betas=train.betas, eps=train.eps, eight_bit=eight_bit, stochastic=stochastic
        )
    return allocated_adamw(groups, betas=train.betas, eps=train.eps)


def parameter_groups(model: nn.Module, weight_decay: float, b_ratio: float) -> list[dict[str, Any]]:
    """Trained parameters by learning rate and decay; a group that would be empty is left out."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = b_ratio if is_lora_b(name) else 1.0
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": members, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in groups.items()
    ]


def is_lora_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def begin_step(optimizer: torch.optim.Optimizer, lr: float, seed: int) -> None:
    """Give every group the schedule's rate times its own scale, and the rounding its seed."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if isinstance(optimizer, ChunkedAdamW):
        optimizer.seed = seed


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def scale_and_clip(grads: list[Tensor], *, divide_by: float, max_norm: float | None) -> float:
    """Divide gradients by the loss scale and scale them down to `max_norm`, in place, if they are finite.

    Returns their L2 norm after the division, before the clipping; when it is not finite nothing is changed.
    """
    norm = total_norm(grads) / divide_by
    if not math.isfinite(norm):
        return norm
    factor = clip_factor(norm, divide_by=divide_by, max_norm=max_norm)
    if factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return norm


def clip_factor(norm: float, *, divide_by: float, max_norm: float | None) -> float:
    """What gradients are multiplied with. norm: their L2 norm after the division by the loss scale."""
    return (1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))) / divide_by


def total_norm(grads: list[Tensor]) -> float:
    """L2 norm of all elements, summed in fp32 at least: in bf16 it would be off in its third digit."""
    low = any(grad.dtype in (torch.bfloat16, torch.float16) for grad in grads)
    if not low:
        return float(torch.nn.utils.get_total_norm(grads))
    return float(torch.stack(torch._foreach_norm(grads, 2.0, torch.float32)).norm())
