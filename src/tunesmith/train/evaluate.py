"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.model.batch import Batch
from tunesmith.model.generate import evaluating
from tunesmith.model.scoring import document_losses


def evaluation_loss(model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
    """(mean loss over all supervised tokens, their number); NaN for none. Every module's mode is restored."""
    with evaluating(model):
        found = [pair for batch in batches for pair in document_losses(model, batch)]
    tokens = sum(count for _, count in found)
    return (sum(loss for loss, _ in found) / tokens if tokens else float("nan")), tokens
