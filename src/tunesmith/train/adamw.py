"""torch's own fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), with its memory taken at once."""

from __future__ import annotations

from typing import Any

import torch


def allocated_adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW whose averages are there from the start: where memory lacks, it lacks before the first step."""
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return optimizer
