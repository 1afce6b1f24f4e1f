from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.plan.work import matmul_flops, seconds_for


@pytest.mark.parametrize("full", [True, False])
def test_flops_equal_what_torch_counts(full: bool) -> None:
    """A stack of matrices, with low-rank ones beside them when not all is trained, and a head on some tokens."""
    tokens, supervised, width, vocab, rank = 12, 5, 16, 40, 2
    base = [torch.randn(width, width, requires_grad=full) for _ in range(3)]
    low = [
        (torch.randn(rank, width, requires_grad=True), torch.randn(width, rank, requires_grad=True))
        for _ in base
    ]
    head = torch.randn(vocab, width, requires_grad=full)
    x = torch.randn(tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = x
        for weight, (a, b) in zip(base, low, strict=True):
            out = hidden @ weight.T
            hidden = out if full else out + (hidden @ a.T) @ b.T
        (hidden[:supervised] @ head.T).sum().backward()
    body, adapters = 3 * width * width, 3 * 2 * width * rank
    assert counter.get_total_flops() == matmul_flops(
        tokens=tokens,
        supervised=supervised,
        body=body,
        head=vocab * width,
        trained_body=body if full else adapters,
        full=full,
        recompute=False,
    )


def test_seconds() -> None:
    assert seconds_for(10, 5.0) == 2.0
    with pytest.raises(ValueError, match="not positive"):
        seconds_for(10, 0.0)
