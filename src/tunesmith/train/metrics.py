"""What is measured during training, and the reader of the finished loss curve."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import MissingExtra
from tunesmith.core.events import read_events
from tunesmith.core.units import GIB

if TYPE_CHECKING:
    import torch


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: of the GPU's allocator, or on a CPU of the whole process."""
    if device.type == "cuda":
        import torch  # slow to load: who only reads curves does not need it

        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def final_events(path: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind as if the run had never been interrupted, in order of their step.

    What a killed part did beyond the checkpoint from which it was resumed was done again, and counts once.
    """
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    for event in read_events(path):
        if event["event"] == "resume":
            kept = {key: old for key, old in kept.items() if key[0] <= int(event["step"])}
        elif event["event"] == kind:
            kept[int(event["step"]), str(event.get("prompt"))] = event
    return [kept[key] for key in sorted(kept, key=lambda key: key[0])]


def loss_curve(path: Path) -> dict[int, float]:
    """Step: training loss, of the run as if it had never been interrupted."""
    return {int(event["step"]): float(event["loss"]) for event in final_events(path, "step")}


class TensorBoard:
    """Writes numbers for TensorBoard into `folder`. Raises MissingExtra when it is not installed."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step or None)

    def add(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        for name, value in values:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
