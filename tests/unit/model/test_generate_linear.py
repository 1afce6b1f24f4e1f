"""Weights laid out for decoding give the values that they gave before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tunesmith.model.fast_linear import fast_head, store_by_input
from tunesmith.model.load import load_model


@pytest.mark.parametrize("rows", [1, 5, 8, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_head_equals_the_head(rows: int, bias: bool) -> None:
    head = nn.Linear(48, 1000, bias=bias)
    hidden = torch.randn(rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(fast_head(head)(hidden), head(hidden), atol=1e-5, rtol=1e-5)


def test_fast_head_of_other_kinds_is_the_head() -> None:
    half = nn.Linear(8, 16).to(torch.bfloat16)
    more = nn.Sequential(nn.Linear(8, 16))
    assert fast_head(half) is half
    assert fast_head(more) is more


def test_store_by_input_changes_no_value_and_keeps_the_tie(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    before = copy.deepcopy(model)
    store_by_input(model)
    linear = model.model.layers[0].mlp.up_proj.weight
    assert linear.t().is_contiguous()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.is_contiguous()
    for (name, old), (_, new) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(old, new), name
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)
