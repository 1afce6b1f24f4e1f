"""Seconds of operations on a card that is not there, from its data sheet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tunesmith.plan.cards import Card
from tunesmith.plan.duration import Kind, Operation

# Share of a card's peak at its data sheet that products reach, and of its memory bandwidth that all else
# does; the least that a kernel takes, and what Python and torch take to start one. Of an A100: round numbers
# near the least error over its published rates of training (`bench/plan/time.py --facts`).
PEAK_SHARE: dict[Kind, float] = {"matmul": 0.8, "attention": 0.4}
BANDWIDTH_SHARE = 0.65
KERNEL_S, START_S = 5e-6, 20e-6
# From Hopper on memory and power grow less than the peak does: MosaicML's llm-foundry publishes 41 to 57% of
# an H100's peak beside 60 to 77% of an A100's for short sequences, 38 beside 63% for 65,536 tokens.
HOPPER = 9
HOPPER_SHARE: dict[Kind, float] = {"matmul": 0.59, "attention": 0.23}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card does. flops_per_s: at most, by format of the operands; peak_share: what of it training
    reaches, 1 where nothing is said; bytes_per_s: of its memory, at most."""

    name: str
    flops_per_s: Mapping[str, float]
    peak_share: Mapping[Kind, float]
    bytes_per_s: float

    def seconds(self, operation: Operation) -> float:
        """The longer of arithmetic and memory traffic (Williams et al. 2009, the roofline model), and never
        less than a kernel takes to start; 0.0 for what computes nothing and for messages."""
        if operation.kind in ("none", "message"):
            return 0.0
        traffic = operation.num_bytes / (self.bytes_per_s * BANDWIDTH_SHARE)
        return max(self.product_s(operation.kind, operation.dtype, operation.flops), traffic, KERNEL_S)

    def all_s(self, counts: Iterable[tuple[Operation, float]], *, more_s: float = 0.0) -> float:
        """Seconds of a step's operations, each so many times, one after the other, and of `more_s` beside
        them: never less than it takes to start them all."""
        computed = [(operation, count) for operation, count in counts if self.seconds(operation)]
        total = more_s + sum(self.seconds(operation) * count for operation, count in computed)
        return max(total, START_S * sum(count for _, count in computed))

    def product_s(self, kind: Kind, dtype: str, flops: float) -> float:
        """Seconds of a product's arithmetic alone."""
        peak = self.flops_per_s.get(dtype) or min(self.flops_per_s.values())
        return flops / (peak * self.peak_share.get(kind, 1.0))


def card_rates(card: Card) -> Rates:
    """A card's rates. Formats that it does not multiply are computed as its slowest."""
    peaks: dict[str, float] = {dtype: rate * 1e12 for dtype, rate in card.tflops.items() if rate}
    return Rates(
        name=card.name,
        flops_per_s=peaks,
        peak_share=HOPPER_SHARE if card.capability[0] >= HOPPER else PEAK_SHARE,
        bytes_per_s=card.memory_gb_s * 1e9,
    )
