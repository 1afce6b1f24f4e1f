"""Products made fast for decoding give the values that they gave before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tunesmith.model.fast_linear import BlockedLinear, fast_head, use_blocks
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


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (1, 8), (3, 4), (1, 12), (1, 40)])
@pytest.mark.parametrize("outputs", [96, 48, 30])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_equal_the_plain_product(rows: tuple[int, int], outputs: int, bias: bool) -> None:
    plain = nn.Linear(24, outputs, bias=bias)
    part = nn.Sequential(copy.deepcopy(plain))
    use_blocks(part)
    assert (type(part[0]) is BlockedLinear) == (outputs != 30), "30 outputs have no block"
    hidden = torch.randn(*rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(part(hidden), plain(hidden), atol=1e-5, rtol=1e-5)


def test_blocks_are_used_for_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    part = nn.Sequential(nn.Linear(24, 64))
    use_blocks(part)
    calls: list[int] = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (calls.append(a.shape[1]), real(a, b))[1])
    with torch.inference_mode():
        for rows in (1, 2, 3, 12, 13):
            part(torch.randn(rows, 24))
    assert calls == [3, 12]


def test_blocks_change_no_weight_and_keep_the_tie(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    before = copy.deepcopy(model)
    use_blocks(model)
    assert type(model.model.layers[0].mlp.up_proj) is BlockedLinear
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for (name, old), (_, new) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(old, new), name
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)


def test_blocks_leave_other_kinds_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 32).to(torch.bfloat16), nn.Bilinear(8, 8, 32))
    use_blocks(model)
    assert [type(part) for part in model] == [nn.Linear, nn.Bilinear]
