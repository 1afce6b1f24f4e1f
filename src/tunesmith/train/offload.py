"""AdamW whose fp32 weights and averages are in host memory, where it also computes.

The device holds the weights in the format that they are multiplied in, and their gradients: 4 bytes a weight
in bf16, in place of 16 with fp32 weights (Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.train.adamw import allocated_adamw

# Gradients that are on their way to the host while another's weight is updated there.
COPIES_AHEAD = 2


class OffloadedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on fp32 copies in host memory; "master" in the state is the weight itself."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.masters = {
            p: nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self._parameters()
        }
        copies = [
            group | {"params": [self.masters[p] for p in group["params"]]} for group in self.param_groups
        ]
        self.host = allocated_adamw(copies, betas=betas, eps=eps)
        for parameter, master in self.masters.items():
            self.state[parameter] = self.host.state[master] | {"master": master.data}

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group, copies in zip(self.param_groups, self.host.param_groups, strict=True):
            copies["lr"] = group["lr"]
        for parameter, gradient in self._arriving():
            master = self.masters[parameter]
            master.grad = gradient.float()
            self.host.step()  # passes over the weights without a gradient, that is all others
            master.grad = None
            parameter.copy_(_staged(master.to(parameter.dtype), parameter.device), non_blocking=True)

    def _arriving(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight with its gradient in host memory, the next ones' copies having been begun."""
        begun: deque[tuple[nn.Parameter, Tensor, torch.cuda.Event | None]] = deque()
        for parameter in self._parameters():
            if parameter.grad is not None:
                begun.append((parameter, *_copy_to_host(parameter.grad)))
            if len(begun) > COPIES_AHEAD:
                yield _arrived(*begun.popleft())
        while begun:
            yield _arrived(*begun.popleft())


def _copy_to_host(gradient: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The gradient in host memory, and the event after which it is there."""
    if not gradient.is_cuda:
        return gradient, None
    host = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
    host.copy_(gradient, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(
    parameter: nn.Parameter, gradient: Tensor, event: torch.cuda.Event | None
) -> tuple[nn.Parameter, Tensor]:
    if event is not None:
        event.synchronize()
    return parameter, gradient


def _staged(weight: Tensor, device: torch.device) -> Tensor:
    """Pinned where it goes to a GPU: only then does the copy not hold up the host."""
    return weight.pin_memory() if device.type == "cuda" else weight
