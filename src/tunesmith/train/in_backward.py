"""The optimizer's step inside the backward pass: no two gradients exist at the same time.

Each weight is updated as soon as its gradient is whole, and that gradient is freed before the next one comes
(Lv et al. 2023, LOMO, arXiv:2306.09782, here with AdamW). So there is nothing left to clip, and nothing to
add a second micro-batch's gradient to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class UpdateInBackward:
    """Between `begin` and `end`, every gradient that a backward pass yields updates its weight; outside of
    that it is dropped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.updates, self.finite, self.squares = False, True, 0.0
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def begin(self) -> None:
        self.updates, self.finite, self.squares = True, True, 0.0

    def end(self) -> float:
        """The gradients' L2 norm; when it is not finite, no weight was updated from the first such one on."""
        self.updates = False
        return math.sqrt(self.squares) if self.finite else math.nan

    def _arrived(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self.updates and self.finite:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            self.squares += norm * norm
            self.finite = math.isfinite(norm)
            if self.finite:
                self.optimizer.step()  # passes over the weights without a gradient, that is all others
        parameter.grad = None
