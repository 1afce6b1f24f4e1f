"""What the real engines send each other, as the trace hears it, beside the formulas of `plan.scale`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunesmith.plan.cards import card_named
from tunesmith.plan.duration import Arithmetic, Load, Pass, StepTime
from tunesmith.plan.scale import (
    Link,
    MeasuredNetwork,
    Traffic,
    card_network,
    data_parallel,
    sharded,
)
from tunesmith.recipe.schema import Recipe
from tunesmith.train.parallel import BUCKET_BYTES
from tunesmith.workflows.plan_link import COLLECTIVES, assumed_network, measured_network
from tunesmith.workflows.plan_memory import full_batch
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import Traced, exchange_of, together, trace_calls, traffic_of

LAYERS = 4
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=512,
    tie_word_embeddings=True,
)


def recipe(engine: str, processes: int, *, stage: int = 3, accumulation: int | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"sources": [{"path": "d"}], "max_length": 64},
            "method": {"type": "full"},
            "train": {
                "precision": "fp32",
                "optimizer": "adamw",
                "kernels": "torch",
                "compile": False,
                "lr": 1e-3,
                "optimizer_in_backward": False,
                "stochastic_rounding": False,
                "gradient_checkpointing": "none",
                "grad_accumulation": accumulation or processes,
                "save_every": 10,
            },
            "eval": {"every": 0},
            "parallel": {"engine": engine, "zero_stage": stage},
            "hardware": {"processes": processes, "device": "cpu", "threads": 1},
        }
    )


def traced(given: Recipe) -> Traced:
    return trace_calls(given, CONFIG, Work(batch=full_batch(64, 1)), device="cpu")


def model_bytes() -> int:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(CONFIG)
    return sum(4 * p.numel() for p in model.parameters())


def by_kind(*parts: Traffic) -> dict[str, tuple[float, float]]:
    return {part.collective: (part.messages, part.num_bytes) for part in parts}


def test_data_parallel_sends_what_the_formula_says() -> None:
    found = by_kind(*traffic_of(traced(recipe("ddp", 4)), "forward", "backward", "update"))
    (said,) = data_parallel(model_bytes(), bucket_bytes=BUCKET_BYTES)
    assert found["all_reduce"] == (said.messages, said.num_bytes)


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_send_what_the_formula_says(stage: Any) -> None:
    found = by_kind(*traffic_of(traced(recipe("fsdp", 4, stage=stage)), "forward", "backward"))
    weights = model_bytes()
    (gathers, gathered), (reduces, reduced) = (
        (part.messages, part.num_bytes) for part in sharded(weights, weights, units=LAYERS + 1, stage=stage)
    )
    assert found["reduce_scatter"] == (reduces, reduced)
    # What is around the layers, embeddings here, is kept for the backward pass by stage 3 too.
    around = (stage == 3) * (4 * 512 * 64 + 4 * 64)
    assert found["all_gather"] == (gathers - (stage == 3), gathered - around)


def test_two_micro_batches_gather_twice_and_gradients_of_copies_go_once() -> None:
    link = Link(latency_s=0.0, bytes_per_s=float(model_bytes()))
    network = MeasuredNetwork(
        processes=2, links=dict.fromkeys(COLLECTIVES, link), copy_bytes_per_s=float("inf")
    )
    copies = exchange_of(traced(recipe("ddp", 2, accumulation=4)), recipe("ddp", 2), network)
    assert copies.pass_s == 0 and copies.step_s == pytest.approx(1.0, rel=1e-3)
    assert copies.waited_s(2, 10.0) == pytest.approx(1.0, rel=1e-3)
    shards = exchange_of(
        traced(recipe("fsdp", 2, stage=2, accumulation=4)), recipe("fsdp", 2, stage=2), network
    )
    assert shards.waited_s(2, 10.0) == pytest.approx(2 * 2.0, rel=1e-3)


def test_processes_on_the_same_cores_slow_each_other_and_share_the_update_of_shards() -> None:
    load = Load(tokens=64, squares=64 * 64, labels=64)
    step = StepTime(
        arithmetic=Arithmetic(per_token=1, per_square=0, per_label=0),
        one=Pass(load=load, seconds=1.0),
        update_s=1.0,
    )
    network = replace(assumed_network(2), crowding=1.5)
    copies = together(step, traced(recipe("ddp", 2)), recipe("ddp", 2), network)
    assert (copies.one.seconds, copies.update_s) == (1.5, 1.5)
    shards = together(step, traced(recipe("fsdp", 2)), recipe("fsdp", 2), network)
    assert (shards.one.seconds, shards.update_s) == (1.5, 0.75)
    assert shards.exchange.pass_s > copies.exchange.pass_s == 0


def test_cards_send_while_they_compute() -> None:
    given = recipe("fsdp", 8)
    hardware = given.hardware.model_copy(update={"device": "cuda"})
    found = exchange_of(
        traced(given), given.model_copy(update={"hardware": hardware}), card_network(card_named("h100"), 8)
    )
    assert found.overlaps and found.pass_s > 0
    assert found.waited_s(1, 100.0) < found.pass_s


@pytest.mark.slow
def test_two_processes_time_their_messages() -> None:
    found = measured_network(2, threads=1, hidden=32, intermediate=64)
    assert found.processes == 2 and set(found.links) == set(COLLECTIVES)
    assert found != assumed_network(2)
    assert min(link.bytes_per_s for link in found.links.values()) > 1e6
    assert found.copy_bytes_per_s > 1e6 and found.crowding >= 1
