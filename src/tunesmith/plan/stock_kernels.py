"""Peaks of benchmarks of a loss alone: forward and backward, again and again, on one GPU (Liger Kernel's).

From the second pass on the gradients of the pass before are still there: nothing clears them.
Its benchmark of the loss with the output layer makes both layers, the plain one and the fused, and runs one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tunesmith.core.units import GIB
from tunesmith.plan.allocator import round_block
from tunesmith.plan.facts_types import Prediction, Row, Skipped, Unknown
from tunesmith.plan.stack import workspace_bytes
from tunesmith.plan.stock_ops import FusedCrossEntropy, LinearCrossEntropy
from tunesmith.plan.trace import Trace

Loss = Callable[[], Tensor]


def predict_kernel(row: Row) -> Prediction | Skipped | None:
    """The peak of one loss, forward and backward; None for rows of other kinds."""
    if row.get("kind") != "kernel":
        return None
    try:
        return Prediction(_peak(row) / GIB)
    except Unknown as unknown:
        return Skipped(str(unknown))


def _peak(row: Row) -> int:
    if "liger" not in str(row.get("source", "")).lower():
        raise Unknown("only the benchmarks of Liger Kernel's losses are known")
    vocab, hidden = _size(row, "vocab"), (row.get("config") or {}).get("hidden")
    tokens = (row.get("seq_len") or 0) * (row.get("micro_batch") or 1)
    if not isinstance(tokens, int) or tokens <= 0:
        raise Unknown("the number of tokens is not told")
    fused, dtype = _fused(row), _dtype(row)
    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        kept = (
            _whole(trace, tokens, hidden, vocab, dtype, fused, str(row.get("gpu", "")).lower())
            if hidden
            else _logits(tokens, vocab, dtype, fused)
        )
        for _ in range(2):
            kept().backward()
    return trace.timeline.peak(round_block).num_bytes


def _logits(tokens: int, vocab: int, dtype: torch.dtype, fused: bool) -> Loss:
    """Cross-entropy of logits [tokens, vocab] that are there."""
    logits = torch.empty(tokens, vocab, dtype=dtype, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    if fused:
        # Its gradient is the logits' own memory, at every pass.
        logits.grad = logits.detach()
        return lambda: FusedCrossEntropy.apply(logits, labels)
    return lambda: functional.cross_entropy(logits, labels)


def _whole(
    trace: Trace, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, fused: bool, gpu: str
) -> Loss:
    """Output layer and cross-entropy of hidden states [tokens, hidden]."""
    both = [nn.Parameter(torch.empty(vocab, hidden, dtype=dtype)) for _ in range(2)]
    workspace = torch.empty(workspace_bytes(gpu), dtype=torch.uint8)
    trace.hold([*both, workspace], "weights")
    states = torch.empty(tokens, hidden, dtype=dtype, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)

    def run() -> Tensor:
        weight, _, _ = *both, workspace
        if fused:
            return LinearCrossEntropy.apply(states, weight, labels)
        logits = states @ weight.t()
        return functional.cross_entropy(logits, labels)

    return run


def _size(row: Row, name: str) -> int:
    value = (row.get("config") or {}).get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Unknown(f"{name} is {value!r}")
    return value


def _fused(row: Row) -> bool:
    told = str(row.get("loss_impl") or "").lower()
    if "liger" in told:
        return True
    if "torch" in told or "hf" in told or "hugging" in told:
        return False
    raise Unknown(f"the loss {row.get('loss_impl')!r} is not traced")


def _dtype(row: Row) -> torch.dtype:
    told = str(row.get("precision") or "").lower()
    if re.search(r"bf16|bfloat16", told):
        return torch.bfloat16
    if re.search(r"fp32|float32", told):
        return torch.float32
    raise Unknown(f"the precision {row.get('precision')!r} is not told")
