"""A stand-in for a trace that hears real operations."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.plan.operations import Calls


class Hearing(TorchDispatchMode):
    """A trace that only has a phase and a listener."""

    phase = "forward"

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls(func, args, kwargs or {}, out)
        return out
