"""The weights of real models of every family, once each."""

from __future__ import annotations

import pytest

from tests.tiny_models import FAMILIES, make
from tunesmith.plan.model_weights import model_weights, weights_of
from tunesmith.plan.serving import FORMATS, weight_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_once(family: str) -> None:
    model = make(family)
    weights = weights_of(model)
    assert sum(w.count for w in weights if not w.tied) == sum(p.numel() for p in model.parameters())
    assert weight_bytes(weights, FORMATS["fp32"]) == sum(p.nbytes for p in model.parameters())
    assert model_weights(model.config) == weights


def test_kinds() -> None:
    tied = {w.name: w for w in weights_of(make("llama-mha"))}
    assert tied["model.embed_tokens.weight"].kind == "embedding"
    assert (tied["lm_head.weight"].kind, tied["lm_head.weight"].tied) == ("head", True)
    last = tied["model.layers.1.mlp.down_proj.weight"]
    assert (last.kind, last.layer, last.module) == ("linear", 1, "down_proj")
    assert tied["model.norm.weight"].kind == "other"
    assert not weights_of(make("llama"))[-1].tied
