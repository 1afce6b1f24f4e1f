"""Shared beginnings change no result: against every document computed alone, gradients included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.conftest import make_model
from tunesmith.model import attention
from tunesmith.model.attention import PackedLayout
from tunesmith.model.prefixes import find_shared

ROWS = [
    [5, 6, 7, 8, 20, 21, 22],
    [5, 6, 7, 8, 30, 31],
    [9, 9],
    [5, 6, 7, 8, 20, 21, 40, 41],
    [5, 6, 7],
    [5, 6, 7, 8, 30, 31],
]


def hidden_of(model: Any, rows: list[list[int]]) -> Tensor:
    ids = torch.tensor([token for row in rows for token in row])[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return attention.hidden_states(model, ids, positions, PackedLayout(starts))[0]


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_token_is_computed_once() -> None:
    ids = np.array([token for row in ROWS for token in row])
    shared = find_shared(ids, [len(row) for row in ROWS])
    assert shared is not None
    distinct = {tuple(row[: n + 1]) for row in ROWS for n in range(len(row))}
    assert len(shared.kept) == len(distinct)
    assert np.array_equal(ids[shared.kept[shared.places].numpy()], ids)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
def test_hidden_states_and_gradients(kind: str) -> None:
    model = make_model(kind)
    attention.install(model)
    found = hidden_of(model, ROWS)
    wanted = torch.cat([hidden_of(model, [row]) for row in ROWS])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, found), gradients(model, wanted)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        off = float((ours[name] - gradient).abs().max()) / largest
        assert off < 1e-5, f"{name}: off by {off:.1e} of the largest gradient"


def test_documents_that_differ_at_once_share_nothing() -> None:
    assert find_shared(np.array([1, 2, 3, 2, 2, 3]), [3, 3]) is None


def test_random_numbers_are_drawn_for_every_token() -> None:
    model = make_model("llama-tied")
    model.config.attention_dropout = 0.1
    assert attention._draws(model.train())
    assert not attention._draws(model.eval())
