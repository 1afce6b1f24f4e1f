"""8-bit and rounded AdamW: against torch's, bitsandbytes', and the resumed self."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.train import chunked_adamw
from tunesmith.train.chunked_adamw import ChunkedAdamW, adamw_
from tunesmith.train.stored import dynamic_map

BETAS, EPS = (0.9, 0.999), 1e-8
GROUP = {"lr": 1e-2, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}


def optimizer_of(weights: list[nn.Parameter], *, eight_bit: bool, stochastic: bool) -> ChunkedAdamW:
    groups: list[dict[str, Any]] = [{"params": weights, "lr": 1e-2, "weight_decay": 0.1, "lr_scale": 1.0}]
    return ChunkedAdamW(groups, betas=BETAS, eps=EPS, eight_bit=eight_bit, stochastic=stochastic)


def gradient(step: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def stepped(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: range) -> Tensor:
    for step in steps:
        if isinstance(optimizer, ChunkedAdamW):
            optimizer.seed = 1000 * step
        weight.grad = gradient(step, weight.shape).to(weight.dtype)
        optimizer.step()
    return weight.detach()


def test_the_formula_is_that_of_torch() -> None:
    ours = nn.Parameter(gradient(99, torch.Size([300])).double())
    theirs = copy.deepcopy(ours)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    mean, square = torch.zeros_like(ours.data), torch.zeros_like(ours.data)
    for step in range(1, 11):
        theirs.grad = gradient(step, ours.shape).double()
        adamw_(ours.data, mean, square, theirs.grad, GROUP, step=step)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_fp32_weights_and_averages_are_torchs_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_adamw.CHUNK, "cpu", 512)
    ours = nn.Parameter(gradient(99, torch.Size([30, 41])))
    theirs = copy.deepcopy(ours)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    stepped(optimizer_of([ours], eight_bit=False, stochastic=False), ours, range(10))
    torch.testing.assert_close(
        ours, nn.Parameter(stepped(reference, theirs, range(10))), rtol=1e-5, atol=1e-6
    )


def test_averages_of_8_bits_stay_close_to_exact_ones() -> None:
    exact, small = (nn.Parameter(torch.zeros(64, 100)) for _ in range(2))
    stepped(torch.optim.AdamW([exact], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1), exact, range(50))
    stepped(optimizer_of([small], eight_bit=True, stochastic=False), small, range(50))
    apart = (exact - small).norm() / exact.norm()
    assert 0 < apart < 0.05, f"{apart}"


def test_a_step_is_that_of_bitsandbytes() -> None:
    """From the same codes: the same weights. (New codes differ by one where bitsandbytes' are not nearest.)"""
    pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(gradient(99, torch.Size([50, 100])))
    optimizer = optimizer_of([weight], eight_bit=True, stochastic=False)
    stepped(optimizer, weight, range(5))
    state, theirs = copy.deepcopy(optimizer.state[weight]), weight.detach().clone()
    stepped(optimizer, weight, range(5, 6))
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", gradient(5, weight.shape), theirs, state["exp_avg"], state["exp_avg_sq"], *BETAS, 0.0, 0.0,
        EPS, 6, 1e-2, dynamic_map(True, theirs.device), dynamic_map(False, theirs.device),
        state["exp_avg_scale"], state["exp_avg_sq_scale"], 0.1, 1.0, False,
    )  # fmt: skip
    torch.testing.assert_close(weight.detach(), theirs, rtol=1e-6, atol=1e-7)
    ours = optimizer.state[weight]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[f"{name}_scale"], state[f"{name}_scale"], rtol=1e-6, atol=0)
        same = (ours[name].int() - state[name].int()).abs() <= 1
        assert same.float().mean() > 0.95, name


def test_small_tensors_keep_fp32_averages() -> None:
    norm, matrix = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64, 64))
    optimizer = optimizer_of([norm, matrix], eight_bit=True, stochastic=False)
    assert optimizer.state[norm]["exp_avg"].dtype == torch.float32
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("eight_bit", [True, False])
def test_rounding_by_chance_depends_on_the_seed_and_the_weights_number_alone(eight_bit: bool) -> None:
    def trained(order: tuple[int, int]) -> list[Tensor]:
        weights = [nn.Parameter(torch.ones(80, 80).bfloat16()) for _ in range(2)]
        optimizer = optimizer_of(weights, eight_bit=eight_bit, stochastic=True)
        for number in order:  # as a backward pass would bring them
            stepped(optimizer, weights[number], range(3))
            weights[number].grad = None
        return [weight.detach() for weight in weights]

    one, other = trained((0, 1)), trained((1, 0))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(one[0], one[1])  # same gradients, other chances


@pytest.mark.parametrize(("eight_bit", "stochastic"), [(True, True), (True, False), (False, True)])
def test_going_on_from_a_copy_of_the_state_changes_no_bit(eight_bit: bool, stochastic: bool) -> None:
    first = nn.Parameter(gradient(99, torch.Size([70, 90])).bfloat16())
    optimizer = optimizer_of([first], eight_bit=eight_bit, stochastic=stochastic)
    stepped(optimizer, first, range(4))
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer_of([second], eight_bit=eight_bit, stochastic=stochastic)
    for name, value in optimizer.state[first].items():
        resumed.state[second][name].copy_(value)
    assert torch.equal(stepped(optimizer, first, range(4, 8)), stepped(resumed, second, range(4, 8)))
