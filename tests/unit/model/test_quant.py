"""A base in four bits: which layers, where, and what stays."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tests.reference.test_methods import dequantized
from tunesmith.core.errors import MissingExtra
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.quant import quantize
from tunesmith.model.scoring import document_losses
from tunesmith.train.fast_lora import speed_up

HOW: dict[str, Any] = {"device": "cpu", "compute_dtype": torch.float32, "double_quant": True}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False, "seed": 7}


def four_bits(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("bitsandbytes")


def test_all_linear_layers_but_the_head() -> None:
    model: Any = make_model("qwen2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert quantize(model, **HOW) == 14
    assert len(four_bits(model)) == 14 and "lm_head.weight" not in four_bits(model)
    for name in four_bits(model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        difference = (dequantized(layer) - before[name]).abs().max() / before[name].abs().max()
        assert 0 < difference < 0.2, name
    for name, parameter in model.named_parameters():
        if name not in four_bits(model):
            assert torch.equal(parameter, before[name]), name


def test_modules_that_are_trained_whole_stay_as_they_are() -> None:
    model: Any = make_model("qwen2")
    quantize(model, **HOW, keep=["mlp"])
    assert len(four_bits(model)) == 8 and not any("mlp" in name for name in four_bits(model))
    wrapped = attach_lora(model, **LORA, dropout=0.0, modules_to_save=["mlp"])
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("mlp.modules_to_save.default.up_proj.weight" in name for name in trained)


@pytest.mark.parametrize("dora", [False, True])
def test_an_evaluation_leaves_the_weights_and_their_products(dora: bool) -> None:
    """bitsandbytes may lay weights out anew for inference; a resumed run must not see another rounding."""
    model = make_model("qwen2")
    attention.install(model)
    quantize(model, **HOW)
    wrapped: Any = attach_lora(model, **LORA, dropout=0.0, dora=dora)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    batch = one_batch(make_documents(3))
    first = document_losses(wrapped.eval(), batch)
    wrapped.train()
    assert document_losses(wrapped.eval(), batch) == first
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())


def test_the_faster_lora_product_leaves_quantised_and_dora_layers_to_peft() -> None:
    plain = attach_lora(make_model("qwen2"), **LORA, dropout=0.0)
    assert speed_up(plain) == 14
    assert speed_up(attach_lora(make_model("qwen2"), **LORA, dropout=0.0, dora=True)) == 0
    model = make_model("qwen2")
    quantize(model, **HOW)
    assert speed_up(attach_lora(model, **LORA, dropout=0.0)) == 0


def test_the_package_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        """Finds bitsandbytes nowhere."""

        def find_spec(self, name: str, *rest: object) -> None:
            if name == "bitsandbytes":
                raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(MissingExtra, match="bitsandbytes") as caught:
        quantize(make_model("qwen2"), **HOW)
    assert "tunesmith[qlora]" in str(caught.value.hint)
