"""Which parameters a pattern takes out of the training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reference.conftest import make_model
from tunesmith.core.errors import UserError
from tunesmith.model.freeze import freeze


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_patterns_name_layers_and_parts() -> None:
    model: Any = make_model("qwen2")
    everything = trained(model)
    frozen = freeze(model, ["model.embed_tokens.*", "model.layers.0.*", "*.k_proj.bias"])
    gone = everything - trained(model)
    assert {name for name in everything if ".layers.0." in name} < gone
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias"} < gone
    assert "model.layers.1.self_attn.k_proj.weight" in trained(model) and "lm_head.weight" in trained(model)
    assert frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_nothing_named_freezes_nothing() -> None:
    model: Any = make_model("qwen2")
    assert freeze(model, []) == 0 and trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("pattern", ["lm_head.*", "model.embed_tokens.*"])
def test_a_shared_weight_goes_by_either_name(pattern: str) -> None:
    model: Any = make_model("llama-tied")
    freeze(model, [pattern])
    assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"'model\.layer\.0\.\*'") as caught:
        freeze(make_model("qwen2"), ["model.layer.0.*"])
    assert "model.layers.*" in str(caught.value.hint)


def test_something_must_be_left() -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(make_model("qwen2"), ["*"])
