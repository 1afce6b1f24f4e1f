"""AdamW in host memory: torch's own steps, its fp32 weights, and its state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tunesmith.train.offload import OffloadedAdamW


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "weight_decay": 0.1, "lr_scale": 1.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            draw = torch.Generator().manual_seed(10 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def test_fp32_weights_become_torchs_bit_for_bit() -> None:
    ours = nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Linear(20, 7))
    theirs = copy.deepcopy(ours)
    train(ours, OffloadedAdamW(groups(ours), betas=(0.9, 0.99), eps=1e-8))
    reference = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.99), eps=1e-8, fused=True)
    train(theirs, reference)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bf16_weights_are_the_rounded_masters() -> None:
    model = nn.Linear(30, 20).bfloat16()
    optimizer = OffloadedAdamW(groups(model), betas=(0.9, 0.99), eps=1e-8)
    train(model, optimizer)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
        )
        assert torch.equal(parameter, state["master"].bfloat16())
        assert not torch.equal(parameter.float(), state["master"])


def test_weights_without_a_gradient_stay() -> None:
    model = nn.Linear(4, 4)
    optimizer = OffloadedAdamW(groups(model), betas=(0.9, 0.99), eps=1e-8)
    before = model.bias.detach().clone()
    model.weight.grad = torch.ones(4, 4)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    assert torch.equal(model.bias, before) and optimizer.state[model.bias]["step"] == 0
    assert optimizer.state[model.weight]["step"] == 1
