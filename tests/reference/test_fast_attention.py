"""Attention within documents against torch's own with one mask over all of them, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.model.fast_attention import SHORT, attend_documents

LENGTHS = [3, 1, SHORT, 40, SHORT + 1, 7]


def tensors(heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [1, heads, T, 16] laid out as a projection leaves them; two key/value heads."""
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), count, 16) for count in (heads, 2, 2)]
    return [torch.randn(shape, dtype=dtype).transpose(0, 1)[None].requires_grad_() for shape in shapes]


def masked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    allowed = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool().tril()
    k, v = (x.repeat_interleave(q.shape[1] // 2, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=scale).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("heads", [2, 6])
def test_values_and_gradients(heads: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = tensors(heads, dtype)
    weights = torch.randn(1, sum(LENGTHS), heads, 16, dtype=dtype)
    found = attend_documents(q, k, v, LENGTHS, 0.3)
    wanted = masked(q, k, v, 0.3)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("heads", [2, 6])
def test_queries_of_the_ends_of_documents(heads: int) -> None:
    q, k, v = tensors(heads, torch.float64)
    own = [3, 0, SHORT - 100, 1, 300, 7]
    ends = np.cumsum(LENGTHS)
    asked = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, own, strict=True)])
    weights = torch.randn(1, sum(own), heads, 16, dtype=torch.float64)
    found = attend_documents(q[:, :, asked], k, v, LENGTHS, 0.3, own=own)
    wanted = attend_documents(q, k, v, LENGTHS, 0.3)[:, asked]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def test_in_bf16_it_is_as_near_to_fp32_as_torchs_own() -> None:
    exact = tensors(6, torch.float32)
    rounded = [x.detach().bfloat16() for x in exact]
    wanted = masked(*exact, 0.3)
    ours = (attend_documents(*rounded, LENGTHS, 0.3).float() - wanted).abs().max()
    theirs = (masked(*rounded, 0.3).float() - wanted).abs().max()
    assert float(ours) <= 1.5 * float(theirs)


def test_dropout_is_handed_on() -> None:
    q, k, v = (x.detach() for x in tensors(6, torch.float32))
    kept = attend_documents(q, k, v, LENGTHS, 0.3)
    assert not torch.equal(attend_documents(q, k, v, LENGTHS, 0.3, dropout=0.5), kept)
