"""Peaks of Hugging Face trainings on one GPU, as rows tell them."""

from __future__ import annotations

from functools import lru_cache

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.allocator import simulate
from tunesmith.plan.cards import Card, card_named
from tunesmith.plan.facts_types import Prediction, Row, Skipped, Unknown, low
from tunesmith.plan.memory import Peaks, trace_step
from tunesmith.plan.stack import OLD, Stack, parse_stack, version
from tunesmith.plan.stock_model import check_count
from tunesmith.plan.stock_sharded import detail
from tunesmith.plan.stock_step import StockStep


def predict_stock(row: Row) -> Prediction | Skipped | None:
    """The peak of a Hugging Face Trainer, TRL or PEFT row of one GPU; None for rows that are no training.

    Answers `Skipped` with what is not told, or not traced.
    """
    if row.get("kind") != "train":
        return None
    try:
        stack = parse_stack(row)
        check_count(stack.shape)
        return _prediction(row, stack)
    except Unknown as unknown:
        return Skipped(str(unknown))


def _prediction(row: Row, stack: Stack) -> Prediction:
    peaks = stock_peaks(stack, exact=stack.metric != "allocated")
    num_bytes = peaks.peak.num_bytes
    if stack.metric != "allocated":
        assert peaks.exact
        num_bytes = simulate(peaks.timeline.events()).reserved_bytes
    if stack.metric == "process":
        num_bytes += int(_card(row).context_mib * 1024**2)
    return Prediction(num_bytes / GIB, detail(peaks), _assumed(row))


def _assumed(row: Row) -> tuple[str, ...]:
    """What the row leaves open and was taken to be so."""
    found = []
    metric = low(row, "peak_metric")
    if not metric or "not stated" in metric:
        found.append("what was measured is not told: taken to be what nvidia-smi shows of the process")
    if version("transformers", low(row, "notes")) is None:
        at = ".".join(str(part) for part in OLD)
        found.append(f"no version of transformers is told: taken to be the Trainer's step as of {at}")
    return tuple(found)


def _card(row: Row) -> Card:
    if not low(row, "gpu"):
        raise Unknown("the GPU is not told, and with it its context")
    try:
        return card_named(str(row["gpu"]))
    except UserError as error:
        raise Unknown(f"the GPU is not known, and with it its context: {error.what}") from error


@lru_cache(maxsize=256)
def stock_peaks(stack: Stack, *, exact: bool) -> Peaks:
    """The fullest moments of the stack's step."""
    return trace_step(lambda layers: StockStep(stack, layers), stack.shape.layers, exact=exact, device="cuda")
