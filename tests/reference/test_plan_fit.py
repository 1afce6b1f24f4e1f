"""The remedies, choices and tables of a plan, each against the memory plan of the real training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunesmith.core.units import GIB
from tunesmith.plan.cards import CARDS
from tunesmith.plan.changes import applied
from tunesmith.plan.sizes import config_of, num_parameters
from tunesmith.recipe.load import check
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_fit import (
    Case,
    count_parameters,
    find_remedy,
    resolve_auto,
    smallest_card,
    target_of,
)
from tunesmith.workflows.plan_machine import named_machine
from tunesmith.workflows.plan_memory import full_batch, plan_memory, worst_batch
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_tables import CHART, card_table, method_table

QWEN, SMOL = "qwen1.5-0.5b", "smollm2-135m"
MANY = {"train": {"micro_batch_size": 2}, "data": {"max_length": 256}}


def recipe(**sections: Any) -> Recipe:
    data = {"sources": [{"path": "a", "format": "text"}]} | sections.pop("data", {})
    return check({"model": {"path": "x"}, "data": data} | sections, "r")


def case_of(model: str, given: Recipe, *, layers: int | None = None, num_bytes: int | None = None) -> Case:
    """On an RTX 3090, or one that has less memory; the model whole, or with a few layers."""
    machine, config = named_machine("rtx3090"), config_of(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if num_bytes is not None:
        machine = replace(machine, capacity_bytes=num_bytes)
    return Case(recipe=given, machine=machine, config=config, work=Work(batch=full_batch(8, 1)))


def small(given: Recipe, num_bytes: int | None = None) -> Case:
    """Of a model so small that every layer is traced."""
    return case_of(SMOL, given, layers=4, num_bytes=num_bytes)


def needed(case: Case, given: Recipe) -> int:
    """Planned anew."""
    resolved = target_of(case).resolve(given)
    work, context = Work(batch=worst_batch(resolved)), case.machine.context_bytes
    assert context is not None
    return plan_memory(
        resolved, case.config, work, device="cuda", exact=False, context_bytes=context
    ).needed_bytes


def test_the_tutorials_full_fine_tune_fits_24_gb() -> None:
    """Qwen1.5-0.5B, length 2048, micro-batch 1 x 16, fp16 there and bf16 here, AdamW in fp32."""
    given = recipe(method={"type": "full"}, train={"grad_accumulation": 16}, data={"max_length": 2048})
    case = case_of(QWEN, given)
    remedy = find_remedy(case)
    assert remedy.fix is not None and remedy.fix.changes == {} and remedy.least is None
    # 464 M weights of 4 bytes, their gradients and two averages are 6.9 GiB of it.
    assert 6.9 * GIB < remedy.fix.needed_bytes < 13 * GIB < case.machine.capacity_bytes


def test_a_remedy_applied_fits() -> None:
    given = recipe(method={"type": "full"}, **MANY)
    room = int(0.97 * needed(small(given), given))
    case = small(given, room)
    fix = find_remedy(case).fix
    assert fix is not None and fix.changes
    assert needed(case, applied(given, fix.settings)) == fix.needed_bytes <= room


def test_what_fits_nowhere_has_no_remedy_and_says_the_least() -> None:
    given = recipe(method={"type": "qlora"}, data={"max_length": 256})
    remedy = find_remedy(small(given, 300 << 20))
    assert remedy.fix is None and remedy.least is not None
    assert remedy.least.needed_bytes > 300 << 20 and remedy.model is None
    assert remedy.as_dict()["least"]["needed_bytes"] == remedy.least.needed_bytes
    assert remedy.card == smallest_card(1 << 30) == "rtx4060ti-8"


def test_auto_takes_what_fits_and_keeps_the_step() -> None:
    train = {"micro_batch_size": "auto", "grad_accumulation": 2, "gradient_checkpointing": "none"}
    given = recipe(method={"type": "auto"}, train=train, data={"max_length": 256})
    one = {"train.micro_batch_size": 1}
    for kind in ("full", "lora"):
        room = needed(small(given), applied(given, {"method.type": kind} | one))
        case = small(given, room)
        chosen = resolve_auto(case).recipe
        size = chosen.train.micro_batch_size
        assert size != "auto" and size * chosen.train.grad_accumulation == 2
        assert chosen.method.type == kind and needed(case, chosen) <= room


@pytest.mark.parametrize("name", [QWEN, "llama-3.1-8b", "qwen3-8b"])
def test_weights_counted_from_two_layers_are_those_of_all(name: str) -> None:
    assert count_parameters(config_of(name)) == num_parameters(config_of(name))


def test_methods_side_by_side() -> None:
    given = recipe(data={"max_length": 256})
    room = int(1.01 * needed(small(given), recipe(data={"max_length": 256}, train={"micro_batch_size": 3})))
    case = small(given, room)
    table = method_table(case, ("full, fp32", "LoRA"))
    rows = {(row.method, row.checkpointing): row for row in table.rows}
    assert len(rows) == 4 and len(table.cells()) == 5 and table.length == 256
    for row in table.rows:
        assert row.fits == (row.micro_batch_size > 0) == (row.tokens_per_s is not None)
    assert rows["full, fp32", "none"].at_least and rows["full, fp32", "none"].cells()[2] == "> 1.0"
    assert rows["LoRA", "none"].micro_batch_size == 3


def test_the_chart_of_sizes_and_cards() -> None:
    chart = card_table(("qwen2.5-7b",), ("rtx3060", "rtx3090"), length=512)
    assert chart.cells() == [("model", "rtx3060", "rtx3090"), ("qwen2.5-7b", "QLoRA", "LoRA")]
    needs = chart.needs["qwen2.5-7b"]
    assert list(needs) == list(CHART)
    assert [need.at_least for need in needs.values()] == [True, True, False, False]
    assert chart.need_cells()[1][1] == "> 113.8" and chart.as_dict()["best"] == chart.best


def test_cards_by_their_memory() -> None:
    name = smallest_card(int(20 * GIB))
    assert name is not None and CARDS[name].memory_gib == 24
    assert smallest_card(int(150 * GIB)) == "b200" and smallest_card(int(500 * GIB)) is None
