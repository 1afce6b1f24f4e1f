"""The course of the learning rate by hand, decay on matrices only, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.recipe.schema import Method, Train
from tunesmith.train.chunked_adamw import ChunkedAdamW
from tunesmith.train.offload import OffloadedAdamW
from tunesmith.train.optim import (
    begin_step,
    gradients,
    make_optimizer,
    make_schedule,
    scale_and_clip,
    total_norm,
)


def lrs(total: int, **settings: object) -> list[float]:
    schedule = make_schedule(Train.model_validate({"lr": 1.0} | settings), total)
    return [schedule.lr(step) for step in range(total)]


def test_cosine_by_hand() -> None:
    found = lrs(10, warmup_steps=2)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[6] == pytest.approx(0.5)  # half way from step 2 to step 10
    assert found[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_linear_by_hand() -> None:
    assert lrs(5, warmup_steps=1, schedule="linear") == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])


def test_constant_by_hand() -> None:
    assert lrs(4, warmup_steps=1, schedule="constant") == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_the_end_is_the_given_share_of_the_peak() -> None:
    found = lrs(1000, warmup_ratio=0.0, min_lr_ratio=0.1)
    assert found[0] == 1.0 and found[-1] == pytest.approx(0.1, abs=1e-5)
    assert min(found) >= 0.1


def test_warmup_ratio_counts_optimizer_steps() -> None:
    found = lrs(100, warmup_ratio=0.03)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 500}, {"warmup_ratio": 0.03}, {"warmup_ratio": 0.99}])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_tiny_data_still_reaches_the_peak_and_never_starts_at_zero(
    total: int, warmup: dict[str, float], kind: str
) -> None:
    found = lrs(total, schedule=kind, **warmup)
    assert found[0] > 0 and max(found) == 1.0 and all(value > 0 for value in found)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, Train(weight_decay=0.5), Method())
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[p] for name, p in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_frozen_weights_are_left_out() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    optimizer = make_optimizer(model, Train(), Method())
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.bias]


def test_clipping_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    norm = scale_and_clip(gradients(torch.optim.SGD(ours.parameters(), lr=1.0)), divide_by=1.0, max_norm=0.7)
    assert norm == pytest.approx(float(wanted), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_loss_scale_is_divided_out() -> None:
    grads = [torch.tensor([3.0, 4.0]) * 1024]
    assert scale_and_clip(grads, divide_by=1024.0, max_norm=None) == pytest.approx(5.0)
    torch.testing.assert_close(grads[0], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_left_alone(bad: float) -> None:
    grads = [torch.tensor([1.0, bad])]
    assert not math.isfinite(scale_and_clip(grads, divide_by=2.0, max_norm=1.0))
    assert grads[0][0] == 1.0


def test_the_norm_of_bf16_gradients_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(300, 70).bfloat16(), torch.randn(90).bfloat16()]
    wanted = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert total_norm(grads) == pytest.approx(wanted, rel=1e-5)
    assert float(torch.nn.utils.get_total_norm(grads)) != pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("train", "kind"),
    [
        ({}, torch.optim.AdamW),
        ({"optimizer": "adamw-8bit"}, ChunkedAdamW),
        ({"precision": "bf16-pure", "stochastic_rounding": True}, ChunkedAdamW),
        ({"optimizer": "adamw-offload"}, OffloadedAdamW),
    ],
)
def test_every_optimizer_has_its_state_before_the_first_step(train: dict[str, object], kind: type) -> None:
    model = nn.Linear(80, 80)
    optimizer = make_optimizer(model, Train.model_validate(train), Method())
    assert type(optimizer) is kind
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert {"step", "exp_avg", "exp_avg_sq"} <= set(state) and state["step"] == 0
        assert state["exp_avg"].shape == parameter.shape and not state["exp_avg"].any()


def test_the_b_matrices_have_a_rate_and_all_groups_a_seed_of_their_own() -> None:
    model = nn.ModuleDict({"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)})
    whole = nn.ModuleDict({"q": model, "norm": nn.LayerNorm(4)})
    settings = Train(weight_decay=0.5, optimizer="adamw-8bit")
    optimizer = make_optimizer(whole, settings, Method(lora_plus_ratio=16))
    begin_step(optimizer, 1e-3, seed=77)
    found = {
        p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found[model["lora_A"].weight] == (1e-3, 0.5)
    assert found[model["lora_B"].weight] == (16e-3, 0.5)
    assert found[whole["norm"].weight] == (1e-3, 0.0)
    assert isinstance(optimizer, ChunkedAdamW) and optimizer.seed == 77
