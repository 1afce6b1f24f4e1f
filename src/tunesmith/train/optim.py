"""AdamW, the course of the learning rate, and what is done to gradients between backward and step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tunesmith.recipe.schema import Train


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


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on what requires a gradient; only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def scale_and_clip(grads: list[Tensor], *, divide_by: float, max_norm: float | None) -> float:
    """Divide gradients by the loss scale and scale them down to `max_norm`, in place, if they are finite.

    Returns their L2 norm after the division, before the clipping; when it is not finite nothing is changed.
    """
    norm = float(torch.nn.utils.get_total_norm(grads)) / divide_by
    if not math.isfinite(norm):
        return norm
    factor = 1.0 / divide_by
    if max_norm is not None:
        factor *= min(1.0, max_norm / (norm + 1e-6))
    if factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return norm
