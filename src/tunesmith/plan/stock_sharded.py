"""Peaks of Hugging Face trainings on several GPUs: the stock step, of which every process has its share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tunesmith.core.units import GIB
from tunesmith.plan.facts_types import Prediction, Row, Skipped, Unknown
from tunesmith.plan.memory import Peaks, trace_step
from tunesmith.plan.stack import Stack, parse_stack
from tunesmith.plan.stock_model import check_count
from tunesmith.plan.stock_sharded_fsdp import Kind, ShardedModel, Sharding, reserved_bytes
from tunesmith.plan.stock_step import StockStep
from tunesmith.plan.trace import Trace


class ShardedStep(StockStep):
    """One process' share of a step under FSDP: gathered layer by layer, its part updated."""

    def __init__(self, stack: Stack, layers: int, sharding: Sharding) -> None:
        super().__init__(stack, layers)
        self.sharding = sharding

    def divide(self, trace: Trace, layers: Sequence[nn.Module]) -> list[nn.Parameter]:
        self.shared = ShardedModel(trace, self.model, layers, self.sharding)
        return self.shared.parts

    def enter_forward(self) -> None:
        self.shared.begin()

    def enter_backward(self) -> None:
        self.shared.turn()

    def leave_backward(self) -> None:
        self.shared.finish()


class ReplicatedStep(StockStep):
    """DDP: every process holds all, and buckets as large as the gradients beside them."""

    def divide(self, trace: Trace, layers: Sequence[nn.Module]) -> list[nn.Parameter]:
        trained = super().divide(trace, layers)
        self.buckets = [torch.empty_like(parameter) for parameter in trained]
        trace.hold(self.buckets, "communication")
        return trained


def predict_sharded(row: Row) -> Prediction | Skipped | None:
    """The peak of one GPU of several in a Hugging Face training; None for rows of one GPU or no training.

    Answers `Skipped` with what is missing or not traced.
    """
    if row.get("kind") != "train" or not _many(row):
        return None
    try:
        stack, sharding = parse_sharded(row)
        check_count(stack.shape)
    except Unknown as unknown:
        return Skipped(str(unknown))
    peaks = sharded_peaks(stack, sharding, exact=stack.metric != "allocated")
    num_bytes = peaks.peak.num_bytes
    if stack.metric != "allocated" and peaks.timeline is not None:
        num_bytes = reserved_bytes(peaks.timeline)
    return Prediction(num_bytes / GIB, detail(peaks))


def detail(peaks: Peaks) -> dict[str, Any]:
    """The fullest moment of every phase, and of what the fullest of all is made."""
    return {
        "binding": peaks.peak.phase,
        "phases_gib": {m.phase: round(m.num_bytes / GIB, 3) for m in peaks.by_phase},
        "parts_gib": {name: round(size / GIB, 3) for name, size in peaks.peak.parts.items()},
    }


@lru_cache(maxsize=256)
def sharded_peaks(stack: Stack, sharding: Sharding | None, *, exact: bool) -> Peaks:
    """The fullest moments of one process; sharding: None for DDP."""

    def make(layers: int) -> StockStep:
        return ReplicatedStep(stack, layers) if sharding is None else ShardedStep(stack, layers, sharding)

    return trace_step(make, stack.shape.layers, exact=exact, device="cuda")


def _many(row: Row) -> bool:
    return isinstance(row.get("num_gpus"), int) and row["num_gpus"] > 1


def parse_sharded(row: Row) -> tuple[Stack, Sharding | None]:
    """The row's stack, and how its model is divided: None under DDP. Raises Unknown."""
    if "xtuner" in str(row.get("source")).lower():
        raise Unknown("XTuner's own models and the chunks of its loss are not traced")
    kind = _kind(row)
    metric = str(row.get("peak_metric") or "").lower()
    if re.search(r"\b(sum|total|all gpus|node)\b", metric) or "process" in metric or "smi" in metric:
        raise Unknown(f"the metric {row['peak_metric']!r} is not of one process' tensors")
    if kind is None:
        return parse_stack({**row, "num_gpus": 1}), None
    # Earlier micro-batches' gradients are the sharding's. A sharded quantised base is not prepared: TRL
    # leaves its formats as they are.
    stack = parse_stack({**row, "num_gpus": 1, "grad_accum": 1})
    return dataclasses.replace(stack, upcast="none"), _sharding(row, kind)


def _sharding(row: Row, kind: Kind) -> Sharding:
    precision = str(row.get("precision") or "").lower()
    upcast = re.search(r"upcast\w* [^;,]*fp32|fp32 (?:master|flat)", precision)
    return Sharding(
        kind=kind,
        ranks=row["num_gpus"],
        stored=torch.float32 if upcast else None,
        reduced=None,
        accumulates=row.get("grad_accum") not in (None, 1),
    )


def _kind(row: Row) -> Kind | None:
    """None: DDP."""
    told = str(row.get("parallelism") or "").lower()
    if re.search(r"tensor|pipeline|context|sequence|\b[tpc]p\b|expert|async|hybrid|grad_op|offload", told):
        raise Unknown(f"the parallelism {row['parallelism']!r} is not traced")
    if "fsdp2" in told or "fully_shard" in told:
        return "fsdp2"
    if "fsdp" in told:
        return "fsdp1"
    if re.search(r"\bddp\b|^data.parallel", told):
        return None
    if told in ("", "none"):
        raise Unknown(f"how {row['num_gpus']} GPUs share the training is not told")
    raise Unknown(f"the parallelism {row['parallelism']!r} is not traced")
