"""The probe of a step's time: what it leaves alone, what it cuts, and what it carries on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3MoeConfig

from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.plan.duration import Arithmetic, Load
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows import plan_probe
from tunesmith.workflows.plan_probe import Clock, Probed, probe, within
from tunesmith.workflows.plan_step import Work

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
# Of one operation a token alone.
ARITHMETIC = Arithmetic(per_token=1.0, per_square=0.0, per_label=0.0)


def recipe(method: str = "lora", **train: Any) -> Recipe:
    settings = {"precision": "fp32", "optimizer": "adamw", "gradient_checkpointing": "none", "lr": 1e-3}
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"sources": [{"path": "d"}], "max_length": 256},
            "method": {"type": method, "alpha": 16.0, "dropout": 0.1 if method == "lora" else 0.0},
            "train": settings | {"kernels": "torch", "compile": False, "stochastic_rounding": False} | train,
            "parallel": {"engine": "single"},
            "hardware": {"processes": 1, "device": "cpu", "threads": 1},
        }
    )


def batch(*lengths: int) -> Batch:
    documents = []
    for length in lengths:
        ids = np.arange(length, dtype=np.int64) % 256
        documents.append((ids, np.where(np.arange(length) < length // 2, IGNORE, ids)))
    return join(documents)


def probed(given: Recipe, config: Any, one: Batch) -> Probed:
    return probe(given, config, Work(batch=one), ARITHMETIC, device="cpu", budget_s=0.0)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("lora", {}),
        ("lora", {"gradient_checkpointing": "full", "grad_accumulation": 4}),
        ("qlora", {}),
        ("full", {"optimizer": "adamw-8bit"}),
        ("full", {"optimizer_in_backward": True, "max_grad_norm": None}),
    ],
)
def test_every_kind_of_step_is_timed(method: str, train: dict[str, Any]) -> None:
    found = probed(recipe(method, **train), LlamaConfig(num_hidden_layers=6, **SMALL), batch(40, 24))
    assert found.load == Load(tokens=64, squares=40**2 + 24**2, labels=32)
    assert 0 < found.forward_s < found.pass_s
    assert found.update_s > 0


def test_layers_that_differ_are_all_there() -> None:
    config = Qwen3MoeConfig(
        **SMALL,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
        head_dim=16,
    )
    assert probed(recipe("full"), config, batch(32)).pass_s > 0


def test_random_numbers_of_the_process_are_left_as_they_are() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probed(recipe(), LlamaConfig(num_hidden_layers=2, **SMALL), batch(32))
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_are_not_there_take_as_long_as_those_behind_the_first() -> None:
    """Of seven layers three were timed: four more at the mean of the second and the third."""
    step = plan_probe._Short(
        recipe(), LlamaConfig(num_hidden_layers=3, **SMALL), Work(batch=batch(32)), layers=3, device="cpu"
    )
    times: dict[Any, float] = {("forward", None): 1.0, ("backward", None): 2.0, ("update", None): 3.0}
    times |= {("forward", number): seconds for number, seconds in enumerate((0.1, 0.2, 0.4))}
    times |= {("backward", number): seconds for number, seconds in enumerate((0.3, 0.4, 0.6))}
    found = plan_probe._carried(times, step, Load(tokens=32, squares=1024, labels=16), passes=2, total=7)
    assert found.forward_s == pytest.approx((1.0 + 0.7 + 4 * 0.3) / 2)
    assert found.pass_s == pytest.approx(found.forward_s + (2.0 + 1.3 + 4 * 0.5) / 2)
    # Adapters are in the layers alone, and all alike.
    assert found.update_s == pytest.approx(3.0 * 7 / 3)


class _Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        time.sleep(self.seconds)
        out: Tensor = _SlowBack.apply(hidden * self.weight, 2 * self.seconds)  # type: ignore[no-untyped-call]
        return out


class _SlowBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None


def test_the_clock_tells_layers_apart_forward_and_backward() -> None:
    layers, clock = [_Slow(0.02), _Slow(0.1)], Clock("cpu")
    for number, layer in enumerate(layers):
        clock.watch(layer, number)
    began = time.perf_counter()
    clock.at("forward")
    hidden = torch.ones(4, requires_grad=True)
    for layer in layers:
        hidden = layer(hidden)
    clock.at("backward")
    hidden.sum().backward()
    clock.at("update")
    found = clock.stop()
    assert sum(found.values()) == pytest.approx(time.perf_counter() - began, abs=0.01)
    for phase, times in (("forward", 1), ("backward", 2)):
        assert found[phase, 0] >= 0.02 * times
        assert found[phase, 1] >= 0.1 * times
        assert found[phase, 0] < found[phase, 1]
    assert clock.stop() == {}


def test_a_batch_that_is_too_much_keeps_a_part_of_all_its_documents() -> None:
    whole = batch(3000, 1000)
    assert within(whole, ARITHMETIC, 1.0, 4000.0) is whole
    cut = within(whole, ARITHMETIC, 1.0, 2000.0)
    assert np.diff(cut.starts).tolist() == [1500, 500]
    assert cut.num_supervised == whole.num_supervised / 2
    assert within(whole, ARITHMETIC, 0.25, 1000.0) is whole  # a quarter of the layers is there
    assert within(whole, ARITHMETIC, 1.0, 1.0).num_tokens == plan_probe.LEAST_TOKENS


def test_answers_to_one_prompt_are_not_cut() -> None:
    ids = np.arange(400, dtype=np.int64)
    branches = np.array([[200, 100, 100]])
    one = Batch(ids, ids.copy(), np.array([0, 400]), (0,), branches)
    assert within(one, ARITHMETIC, 1.0, 100.0) is one
