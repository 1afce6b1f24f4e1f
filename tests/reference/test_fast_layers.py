"""The fast decoder layers against transformers' and peft's own: outputs and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.conftest import MODELS, OTHERS, make_documents, make_model, one_batch
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.attention import PackedLayout
from tunesmith.model.fast_layers import use_fast_layers

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
KINDS = [*MODELS, *OTHERS]


def model_of(kind: str, method: str) -> Any:
    torch.manual_seed(0)
    model = make_model(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # all ones and zeros else
            torch.nn.init.normal_(parameter.data, 0.5, 0.5)
    attention.install(model)
    if method == "lora":
        model = attach_lora(model, **LORA, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, 0, 0.1)
    return model.train()


def outcome(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(final hidden states [1, T, D], gradients by name) of a made-up batch and loss."""
    batch = one_batch(make_documents(5))
    ids, positions = (torch.from_numpy(x)[None] for x in (batch.input_ids, batch.positions))
    hidden = attention.hidden_states(model, ids, positions, PackedLayout(batch.starts))
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, change: Callable[[Any], Any], tolerance: float) -> None:
    fast = copy.deepcopy(model)
    assert change(fast)
    wanted, wanted_grads = outcome(model)
    found, found_grads = outcome(fast)
    assert found_grads.keys() == wanted_grads.keys()
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in wanted_grads.values())
    for name, gradient in wanted_grads.items():
        off = float((found_grads[name] - gradient).abs().max()) / largest
        assert off < tolerance, f"{name}: off by {off:.1e} of the largest gradient"


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_transformers(kind: str, method: str) -> None:
    compare(model_of(kind, method), use_fast_layers, 1e-5)


@pytest.mark.parametrize(("method", "base"), [("full", torch.float32), ("lora", torch.bfloat16)])
def test_in_bf16_they_are_as_near_to_fp32_as_transformers(method: str, base: torch.dtype) -> None:
    exact = model_of("qwen3", method)
    wanted, wanted_grads = outcome(exact)
    errors = []
    for change in (lambda model: None, use_fast_layers):
        exact.zero_grad()
        rounded = copy.deepcopy(exact)
        for parameter in rounded.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else base)
        change(rounded)
        with torch.autocast("cpu", torch.bfloat16):
            found, grads = outcome(rounded)
        assert grads.keys() == wanted_grads.keys()
        assert all(gradient.dtype == torch.float32 for gradient in grads.values())
        off = sum(float((grads[n] - g).norm()) for n, g in wanted_grads.items())
        errors.append((float((found.float() - wanted).norm()), off))
    (plain_off, plain_grads_off), (off, grads_off) = errors
    assert off <= 1.2 * plain_off
    assert grads_off <= 1.2 * plain_grads_off


def test_everything_in_bf16() -> None:
    model = model_of("llama-tied", "full").bfloat16()
    fast = copy.deepcopy(model)
    use_fast_layers(fast)
    wanted, wanted_grads = outcome(model)
    found, grads = outcome(fast)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    for name, gradient in wanted_grads.items():
        assert grads[name].dtype == torch.bfloat16
        near = torch.cosine_similarity(grads[name].float().flatten(), gradient.float().flatten(), dim=0)
        assert float(near) > 0.99, name


def test_dropout_and_hooks_are_left_to_transformers() -> None:
    for settings in ({"dropout": 0.5}, {"dropout": 0.0}):
        torch.manual_seed(0)
        model = attach_lora(make_model("qwen2"), **(LORA | settings), seed=0).train()
        attention.install(model)
        fast = copy.deepcopy(model)
        use_fast_layers(fast)
        if not settings["dropout"]:
            for part in (model, fast):
                mlp = part.get_base_model().model.layers[0].mlp
                mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
        torch.manual_seed(1)
        wanted, _ = outcome(model)
        torch.manual_seed(1)
        torch.testing.assert_close(outcome(fast)[0], wanted, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_off_and_activations_that_are_recomputed() -> None:
    model = model_of("llama-tied", "lora")
    fast = copy.deepcopy(model)
    use_fast_layers(fast)
    with model.disable_adapter(), fast.disable_adapter(), torch.no_grad():
        batch = one_batch(make_documents(3))
        ids, positions = (torch.from_numpy(x)[None] for x in (batch.input_ids, batch.positions))
        hidden = [
            attention.hidden_states(m, ids, positions, PackedLayout(batch.starts)) for m in (model, fast)
        ]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    wanted, wanted_grads = outcome(fast)
    again = copy.deepcopy(model)
    use_fast_layers(again)
    again.enable_input_require_grads()
    again.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found, grads = outcome(again)
    assert torch.equal(found, wanted)
    assert all(torch.equal(grads[name], gradient) for name, gradient in wanted_grads.items())
