"""The chunked loss against torch's cross-entropy in float64: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tunesmith.model.batch import IGNORE
from tunesmith.train import loss as module
from tunesmith.train.loss import loss_sum

TOKENS, HIDDEN, VOCABULARY = 37, 12, 50


def plain(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)[0, :-1]
    return F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum")


def example(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    hidden = (3 * torch.randn(1, TOKENS, HIDDEN, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[torch.rand(TOKENS) < 0.4] = IGNORE
    labels[0] = IGNORE
    return hidden, labels


@pytest.fixture(params=[1, 7, 10_000], ids=lambda rows: f"chunks of {rows}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param * VOCABULARY)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_cross_entropy_in_float64(bias: bool, frozen: bool) -> None:
    hidden, labels = example()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours, theirs = loss_sum(head, hidden, labels), plain(head, hidden, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-12)
    found = torch.autograd.grad(ours / 7, inputs)
    wanted = torch.autograd.grad(theirs / 7, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("chunk")
def test_tied_head_gets_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    labels = ids[0].clone()
    labels[:5] = IGNORE
    found = torch.autograd.grad(loss_sum(head, embedding(ids).tanh(), labels), embedding.weight)
    wanted = torch.autograd.grad(plain(head, embedding(ids).tanh(), labels), embedding.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("chunk")
def test_a_head_that_is_more_than_a_matrix() -> None:
    hidden, labels = example()
    head: Any = nn.Sequential(
        nn.Linear(HIDDEN, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, VOCABULARY, dtype=torch.float64)
    )
    inputs = [hidden, *head.parameters()]
    ours, theirs = loss_sum(head, hidden, labels), plain(head, hidden, labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    found, wanted = torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden, labels = example(dtype=torch.float32)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.mul_(1e4)
    found = loss_sum(head, hidden, labels)
    assert torch.isfinite(found)
    torch.testing.assert_close(found, plain(head, hidden, labels))


def test_no_gradient_is_prepared_without_grad_mode() -> None:
    hidden, labels = example()
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        found = loss_sum(head, hidden, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(head, hidden, labels).detach())


def test_no_logits_beyond_a_chunk_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors kept for the backward pass: of the hidden states' and the head's size, not [N, V]."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    hidden, labels = example()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.float64).requires_grad_(False)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_sum(head, hidden, labels).backward()
    assert max(sizes) <= TOKENS * HIDDEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_format_and_keeps_fp32_gradients(dtype: torch.dtype) -> None:
    hidden, labels = example(dtype=torch.float32)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.autocast("cpu", dtype=dtype):
        found = loss_sum(head, hidden, labels)
    found.backward()
    assert found.dtype == torch.float32 and head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    wanted = plain(head, hidden.detach(), labels)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0.1)
