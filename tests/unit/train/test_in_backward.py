"""Updates inside the backward pass: never two gradients at once, none for a trial, none after a bad one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.train.adamw import allocated_adamw
from tunesmith.train.in_backward import UpdateInBackward


def layers() -> tuple[nn.Module, UpdateInBackward, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    optimizer = allocated_adamw([{"params": list(model.parameters())}], betas=(0.9, 0.99), eps=1e-8)
    optimizer.param_groups[0]["lr"] = 1e-2
    return model, UpdateInBackward(optimizer), optimizer


def test_at_most_one_gradient_exists_and_none_stays() -> None:
    model, updates, optimizer = layers()
    seen: list[int] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(sum(p.grad is not None for p in model.parameters()))
    )
    before = [p.detach().clone() for p in model.parameters()]
    updates.begin()
    model(torch.ones(3, 16)).square().sum().backward()
    assert seen == [1] * 8
    assert updates.end() > 0
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_norm_is_that_of_all_gradients() -> None:
    model, updates, _ = layers()
    other, _, _ = layers()
    handles = [p.register_post_accumulate_grad_hook(lambda p: None) for p in other.parameters()]
    loss = nn.Sequential(*other)(torch.ones(3, 16)).square().sum()  # type: ignore[arg-type]
    wanted = torch.autograd.grad(loss, list(other.parameters()))
    assert handles
    updates.begin()
    model(torch.ones(3, 16)).square().sum().backward()
    assert updates.end() == pytest.approx(float(torch.nn.utils.get_total_norm(wanted)), rel=1e-6)


def test_a_trial_changes_nothing_and_leaves_no_gradient() -> None:
    model, _, optimizer = layers()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(3, 16)).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_from_the_first_gradient_that_is_not_finite_on_nothing_is_updated() -> None:
    model, updates, optimizer = layers()
    updates.begin()
    (model(torch.ones(3, 16)) * math.inf).sum().backward()
    assert math.isnan(updates.end())
    assert all(state["step"] == 0 for state in optimizer.state.values())
