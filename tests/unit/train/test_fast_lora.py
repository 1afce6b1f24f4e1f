"""The faster LoRA layer against peft's own: outputs and gradients, in every number format."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tunesmith.train.fast_lora import speed_up


def layers(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """A PeftModel over two linear layers, and its faster copy; B is not zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=True), nn.Tanh(), nn.Linear(40, 8, bias=False)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, copy.deepcopy(model)


def output_and_gradients(model: Any, x: torch.Tensor, context: Any) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with context:
        y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft_in_float64(rslora: bool) -> None:
    plain, fast = layers(torch.float64, use_rslora=rslora)
    plain, fast = plain.double(), fast.double()
    assert speed_up(fast) == 2
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    wanted = output_and_gradients(plain, x, nullcontext())
    found = output_and_gradients(fast, x, nullcontext())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_peft_under_autocast(dtype: torch.dtype) -> None:
    plain, fast = layers(dtype)
    speed_up(fast)
    x = torch.randn(1, 5, 24).to(dtype)
    wanted = output_and_gradients(plain, x, torch.autocast("cpu", dtype=dtype))
    found = output_and_gradients(fast, x, torch.autocast("cpu", dtype=dtype))
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        scale = float(theirs.float().abs().max())
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0.03 * scale)


def test_what_it_does_not_know_is_left_to_peft() -> None:
    plain, fast = layers(lora_dropout=0.5)
    speed_up(fast)
    x = torch.randn(1, 5, 24)
    torch.manual_seed(1)
    wanted = plain.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fast.train()(x), wanted)
    with plain.disable_adapter(), fast.disable_adapter():
        torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(fast.merge_and_unload()(x), plain.merge_and_unload()(x))
    assert speed_up(layers(use_dora=True)[0]) == 0
