"""The work of a run: exact tokens, steps and floating-point operations, and what they take in time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.core.units import duration_text


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """Optimizer steps, tokens (none of them padding), operations, and seconds when a rate is known."""

    steps: int
    tokens: int
    supervised_tokens: int
    trained_parameters: int
    total_parameters: int
    flops: int
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        time = f", about {duration_text(self.seconds)}" if self.seconds is not None else ""
        return (
            f"{self.steps} steps, {self.tokens:,} tokens ({self.supervised_tokens:,} supervised), "
            f"{self.trained_parameters:,} of {self.total_parameters:,} parameters trained, "
            f"{self.flops / 1e12:,.0f} TFLOP{time}"
        )


def matmul_flops(
    *, tokens: int, supervised: int, body: int, head: int, trained_body: int, full: bool, recompute: bool
) -> int:
    """Operations of the matrix products of training on `tokens` tokens, attention scores left out.

    body: weights in the layers' matrices; head: weights of the output head, applied to supervised tokens
    only; trained_body: those of them that get a gradient of their own. A product costs 2 operations a weight
    and token forward, 2 for the gradient of its input, 2 for the gradient of its weight (Kaplan et al. 2020,
    arXiv 2001.08361, appendix B), and 2 more forward when activations are recomputed.
    """
    forward = 2 * (body + trained_body * (not full))
    per_token = forward * (2 + recompute) + 2 * trained_body
    per_label = 2 * head * (3 if full else 2)
    return tokens * per_token + supervised * per_label


def seconds_for(flops: int, flops_per_second: float) -> float:
    """Time for `flops` operations at a measured rate. Raises ValueError for a rate that is not positive."""
    if flops_per_second <= 0:
        raise ValueError(f"flops_per_second: {flops_per_second} is not positive")
    return flops / flops_per_second
