"""The plan of a training's time against the real training step, of small models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.unit.plan.hearing import Hearing
from tunesmith.model import attention
from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.plan.cards import card_named
from tunesmith.plan.duration import Load
from tunesmith.plan.operations import Calls
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.train.speed import speed_up
from tunesmith.workflows.plan_probe import load_of
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import (
    arithmetic_of,
    card_step,
    plan_time,
    probed_step,
    real_steps,
    run_load,
    trace_calls,
)
from tunesmith.workflows.train_model import adapted, finish

D, INNER, LAYERS, HEADS, VOCABULARY, RANK = 64, 160, 3, 4, 512, 8
CONFIG = LlamaConfig(
    hidden_size=D,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
)
# Weights of all matrices of the layers.
BODY = LAYERS * (4 * D * D + 3 * D * INNER)


def recipe(method: str = "full", checkpointing: str = "none", **train: Any) -> Recipe:
    settings = {
        "precision": "fp32",
        "optimizer": "adamw",
        "kernels": "torch",
        "compile": False,
        "lr": 1e-3,
        "optimizer_in_backward": False,
        "stochastic_rounding": False,
        "gradient_checkpointing": checkpointing,
        "save_every": 10,
    }
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"sources": [{"path": "d"}], "max_length": 256},
            "method": {"type": method, "rank": RANK, "alpha": 16.0},
            "train": settings | train,
            "eval": {"every": 4},
            "parallel": {"engine": "single"},
            "hardware": {"processes": 1, "device": "cpu", "threads": 1},
        }
    )


def batch(*lengths: int, seed: int = 0) -> Batch:
    """Documents of these lengths, the second half of each with labels."""
    draw = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        ids = draw.integers(0, VOCABULARY, length)
        documents.append((ids, np.where(np.arange(length) < length // 2, IGNORE, ids)))
    return join(documents)


def engine_of(given: Recipe) -> SingleEngine:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG)
    attention.install(model, max_length=256)
    if given.method.type != "full":
        model = adapted(model, given, [])
    finish(model, given)
    speed_up(model, given.train)
    model.train()
    return SingleEngine(model, Supervised(), given)


@pytest.mark.parametrize(("method", "checkpointing"), [("full", "none"), ("lora", "full")])
def test_the_traced_products_are_those_of_the_real_step(method: str, checkpointing: str) -> None:
    given, one = recipe(method, checkpointing), batch(200, 48)
    traced = trace_calls(given, CONFIG, Work(batch=one), device="cpu")
    engine = engine_of(given)
    real_steps(engine, [[one]], max_norm=1.0)
    with Hearing() as hearing:
        engine.backward(engine.forward(one) / one.num_supervised, last=True)
        hearing.phase = "update"
        engine.update(divide_by=1.0, max_norm=1.0)
    assert products(traced.calls) == products(hearing.calls)
    assert sum(products(traced.calls).values()) > 10 * LAYERS


def products(calls: Calls) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for (_, call), count in calls.counts.items():
        if calls.operations[call].flops:
            found[calls.operations[call]] += count
    return found


def test_arithmetic_of_a_full_fine_tune_worked_out_by_hand() -> None:
    """2 operations a weight forward, 4 backward; the head's for labels alone; and of attention, in blocks of
    queries, two products forward and five backward over what the mask leaves and half a block more."""
    one = batch(192)
    traced = trace_calls(recipe(), CONFIG, Work(batch=one), device="cpu")
    found = arithmetic_of(traced, VOCABULARY)
    assert found.per_label == 6 * D * VOCABULARY
    # Norms are multiplied with a vector now and then: a few operations a token and hidden unit.
    assert found.per_token == pytest.approx(6 * BODY, rel=0.01)
    seen = 96 * 96 + 96 * 192
    assert found.per_square == pytest.approx(LAYERS * 2 * D * 7 * seen / 192**2)


def test_arithmetic_of_lora_leaves_out_the_gradients_of_the_base() -> None:
    one = batch(192)
    traced = trace_calls(recipe("lora"), CONFIG, Work(batch=one), device="cpu")
    adapters = LAYERS * RANK * (4 * 2 * D + 3 * (D + INNER))
    found = arithmetic_of(traced, VOCABULARY)
    assert found.per_label == 4 * D * VOCABULARY
    # The first layer's input needs no gradient: its three products by q, k and v, and by their adapters.
    spared = 3 * D * D * 2 + 3 * D * RANK * 2
    assert found.per_token == pytest.approx(4 * BODY + 6 * adapters - spared, rel=0.01)


def test_recomputing_costs_another_forward_pass_of_the_layers() -> None:
    one = batch(192)
    plain, again = (
        arithmetic_of(trace_calls(recipe("full", kind), CONFIG, Work(batch=one), device="cpu"), VOCABULARY)
        for kind in ("none", "full")
    )
    assert again.per_token - plain.per_token == pytest.approx(2 * BODY, rel=0.02)
    assert again.per_label == plain.per_label


def test_a_run_is_counted_and_its_typical_micro_batch_found() -> None:
    lengths = [32, 64, 64, 128]
    given = recipe()
    run, typical = run_load(
        given,
        10,
        lambda step: [batch(lengths[step % 4], seed=step)],
        tokens=672,
        labels=336,
        eval_batches=[batch(20), batch(30)],
        save_bytes=7,
    )
    assert run.load == Load(tokens=672, squares=pytest.approx(56320), labels=336)
    assert (run.steps, run.passes, run.evaluations, run.saves) == (10, 10, 4, 2)
    assert run.eval_load == Load(tokens=50, squares=1300, labels=25)
    assert typical.num_tokens == 64


def test_a_plan_by_the_probe_holds_together(tmp_path: Path) -> None:
    given, one = recipe(grad_accumulation=2), batch(128)
    run, typical = run_load(given, 200, lambda step: [one, one], tokens=51200, labels=25600, save_bytes=1000)
    work = Work(batch=typical)
    traced = trace_calls(given, CONFIG, work, device="cpu")
    step = probed_step(given, CONFIG, work, traced, run, device="cpu")
    plan = plan_time(run, step, device="cpu", folder=tmp_path)
    assert plan.source == "probe"
    assert plan.tokens_per_s == pytest.approx(256 / plan.step_s)
    assert plan.flops == round(arithmetic_of(traced, VOCABULARY).flops(load_of(one)) * 400)
    parts = plan.train_s + plan.eval_s + plan.save_s + plan.start_s
    assert plan.total_s == pytest.approx(parts)
    assert plan.save_s > 0


def test_real_steps_take_the_place_of_the_sum(tmp_path: Path) -> None:
    given, one = recipe(), batch(128)
    run, _ = run_load(given, 10, lambda step: [one], tokens=1280, labels=640)
    work = Work(batch=one)
    traced = trace_calls(given, CONFIG, work, device="cpu")
    step = probed_step(given, CONFIG, work, traced, run, device="cpu")
    measured = [([one], seconds) for seconds in real_steps(engine_of(given), [[one]] * 3, max_norm=1.0)]
    plan = plan_time(run, step, device="cpu", folder=tmp_path, measured=measured)
    assert plan.source == "probe + steps"
    assert plan.step_s == pytest.approx(sorted(seconds for _, seconds in measured)[1])


def test_real_steps_at_a_learning_rate_of_zero_leave_the_weights(tmp_path: Path) -> None:
    engine = engine_of(recipe())
    before = [p.clone() for p in engine.model.parameters()]
    real_steps(engine, [[batch(32)]] * 2, max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_a_card_from_the_table_needs_no_machine() -> None:
    given, one = recipe(precision="bf16"), batch(128)
    run, _ = run_load(given, 100, lambda step: [one], tokens=12800, labels=6400)
    # So large that arithmetic takes longer than starting its kernels.
    large = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, vocab_size=VOCABULARY)
    traced = trace_calls(given, large, Work(batch=one), device="cuda")
    slow, fast = (
        plan_time(
            run,
            card_step(traced, card, VOCABULARY),
            device="cuda",
            card=card,
            price_per_hour=2.0,
        )
        for card in map(card_named, ("t4", "a100-80"))
    )
    assert slow.source == fast.source == "card table"
    assert slow.total_s > fast.total_s
    assert fast.cost == pytest.approx(2.0 * fast.total_s / 3600)
