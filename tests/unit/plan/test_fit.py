"""The search for the cheapest change, over needs by a rule of thumb."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest

from tests.unit.plan.fit_case import Thumb, facts, recipe, target
from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.changes import applied, axes, methods
from tunesmith.plan.fit import Fix, Need, Target, cheapest_fix, largest, most_saving
from tunesmith.recipe.load import check, parse_yaml
from tunesmith.recipe.schema import Recipe

FULL: dict[str, Any] = {"method": {"type": "full"}}
SEVEN = {"weights": 7e9, "layers": 32, "hidden": 4096}


def found(given: Recipe, gib: float, need: Thumb | None = None, **more: Any) -> Fix:
    fix = cheapest_fix(given, target(gib, need or Thumb(), **more))
    assert fix is not None
    return fix


def test_what_fits_stays_as_it_is_and_costs_one_plan() -> None:
    need = Thumb()
    fix = found(recipe(**FULL), 24, need)
    assert (fix.changes, fix.slower, fix.notes, len(need.asked)) == ({}, 1.0, (), 1)


def test_the_price_rises_as_the_card_shrinks() -> None:
    given = recipe(**FULL, train={"micro_batch_size": 4, "grad_accumulation": 4})
    fixes = [found(given, gib) for gib in (14, 11, 9.5, 8, 6, 4)]
    assert [fix.settings for fix in fixes] == [
        {"train.micro_batch_size": 2, "train.grad_accumulation": 8},
        {"train.micro_batch_size": 2, "train.grad_accumulation": 8},
        {"train.micro_batch_size": 1, "train.grad_accumulation": 16},
        {"train.gradient_checkpointing": "full", "train.micro_batch_size": 2, "train.grad_accumulation": 8},
        {
            "train.gradient_checkpointing": "selective",
            "train.micro_batch_size": 1,
            "train.grad_accumulation": 16,
            "train.optimizer": "adamw-8bit",
        },
        {
            "train.micro_batch_size": 1,
            "train.grad_accumulation": 16,
            "train.optimizer": "adamw-offload",
            "train.precision": "bf16-pure",
        },
    ]
    assert all(a.slower <= b.slower for a, b in pairwise(fixes[:4]))


@pytest.mark.parametrize("gib", [3, 3.5, 4, 5, 6, 7, 8, 10, 12])
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_every_remedy_applied_is_a_recipe_that_fits(gib: float, memory: str) -> None:
    given = recipe(**FULL, train={"micro_batch_size": 6, "memory": memory})
    goal = target(gib, Thumb())
    fix = cheapest_fix(given, goal)
    assert fix is not None
    resolved = goal.resolve(applied(given, fix.settings))
    assert goal.need(resolved) == fix.needed_bytes <= gib * GIB


@pytest.mark.parametrize("gib", [2, 2.4, 3, 5, 7, 9, 12])
def test_nothing_cheaper_would_have_fitted(gib: float) -> None:
    """Every combination there is, asked for one by one."""
    given = recipe(**FULL, train={"micro_batch_size": 2})
    goal = target(gib, Thumb())
    fix = cheapest_fix(given, goal)
    assert fix is not None
    fitting = {
        cost: needed for cost, resolved, needed in everything(given, goal) if needed <= goal.capacity_bytes
    }
    assert fix.needed_bytes == fitting[min(fitting)]


def everything(given: Recipe, goal: Target) -> Iterator[tuple[float, Recipe, int]]:
    """(cost, resolved recipe, bytes) of every combination that the schema allows."""
    for method in methods(given, goal.resolve(given)):
        changed = applied(given, method.settings)
        for options in product(*axes(changed, goal.resolve(changed))):
            chosen = (method, *options)
            settings = {key: value for option in chosen for key, value in option.settings.items()}
            try:
                resolved = goal.resolve(applied(given, settings))
            except UserError:
                continue
            yield sum(option.cost for option in chosen), resolved, goal.need(resolved)


def test_adapters_come_before_shorter_rows_and_after_all_else() -> None:
    given = recipe(**FULL, train={"lr": 3e-5, "grad_accumulation": 16})
    fix = found(given, 24, Thumb(**SEVEN))
    assert fix.changes == {"method.type": ("full", "lora"), "train.lr": (3e-5, "auto")}
    assert found(given, 8, Thumb(**SEVEN)).settings["method.type"] == "qlora"
    assert found(given, 80, Thumb(**SEVEN)).settings == {"train.optimizer": "adamw-8bit"}


def test_what_only_a_full_fine_tune_has_goes_with_it() -> None:
    fix = found(recipe(method={"type": "full", "freeze": ["model.embed*"]}), 24, Thumb(**SEVEN))
    assert fix.changes["method.freeze"] == (["model.embed*"], [])


def test_shorter_rows_are_the_last_resort_and_tell_what_is_lost() -> None:
    given = recipe(method={"type": "qlora"}, data={"max_length": 32768})
    fix = found(given, 8, Thumb(**SEVEN), rows_lost=lambda length: 100_000 // length)
    assert fix.settings["data.max_length"] == 16384
    assert "6 rows are longer than 16384 tokens (data.too_long)" in fix.notes


def test_nothing_fits_and_seven_plans_tell() -> None:
    need = Thumb(70e9, 80, 8192)
    assert cheapest_fix(recipe(**FULL), target(8, need)) is None
    assert len(need.asked) == 7
    least = most_saving(recipe(**FULL), target(8, need))
    assert least.settings["method.type"] == "qlora" and least.needed_bytes > 8 * GIB
    assert "data.max_length" not in least.settings


def test_a_memory_setting_in_place_of_what_it_stands_for() -> None:
    fix = found(
        recipe(**FULL, train={"max_grad_norm": None}, hardware={"device": "cpu"}), 3.5, found=facts("cpu")
    )
    assert fix.changes == {"train.memory": ("normal", "low")}
    assert found(
        recipe(**FULL, train={"max_grad_norm": None}, hardware={"device": "cpu"}), 2.4, found=facts("cpu")
    ).changes == {"train.memory": ("normal", "smallest")}


def test_what_cannot_work_together_is_never_proposed() -> None:
    """Not on a CPU what needs a GPU, not in fp16 what needs bf16, not with several passes what needs one."""
    for gib in (2.4, 3, 3.5, 4, 5, 6, 8):
        on_cpu = cheapest_fix(recipe(**FULL, hardware={"device": "cpu"}), target(gib, Thumb(), facts("cpu")))
        assert on_cpu is None or not {"offload", "fsdp"} & set(str(on_cpu.settings).split("'"))
        in_fp16 = cheapest_fix(recipe(**FULL), target(gib, Thumb(), facts(precision="fp16")))
        assert in_fp16 is not None and in_fp16.settings.get("train.precision") is None
        many = cheapest_fix(recipe(**FULL, train={"grad_accumulation": 8}), target(gib, Thumb()))
        assert many is not None and "train.optimizer_in_backward" not in many.settings


def test_given_processes_are_sharded_before_numbers_are_rounded() -> None:
    given = recipe(**FULL, train={"grad_accumulation": 2})
    fix = found(given, 5.5, found=facts(processes=2), gpus=2)
    assert fix.settings == {"parallel.engine": "fsdp"} and "2 GPUs" in fix.notes[0]
    alone = recipe(**FULL, train={"grad_accumulation": 2}, hardware={"processes": 1})
    assert "parallel.engine" not in found(alone, 8.0, gpus=2).settings


def test_speeds_that_are_known_are_told() -> None:
    def speed(resolved: Recipe) -> float:
        return 100.0 if resolved.train.gradient_checkpointing == "none" else 80.0

    fix = found(recipe(**FULL), 8.5, speed=speed)
    assert fix.settings == {"train.gradient_checkpointing": "selective"} and fix.slower == 1.25
    assert fix.text().endswith("about 25% slower")


def test_arguments_and_difference_of_the_file() -> None:
    changes = {
        "train.max_grad_norm": (1.0, None),
        "train.memory": ("normal", "smallest"),
        "method.freeze": (["a*"], []),
    }
    fix = Fix(changes, 3 * GIB, 1.3, ("a note",))
    assert fix.set_arguments == ["train.max_grad_norm=null", "train.memory=smallest", "method.freeze=[]"]
    assert fix.diff().splitlines() == [
        "  train:",
        "-   max_grad_norm: 1.0",
        "+   max_grad_norm: null",
        "-   memory: normal",
        "+   memory: smallest",
        "  method:",
        '-   freeze: ["a*"]',
        "+   freeze: []",
    ]
    after = parse_yaml("\n".join(line[1:] for line in fix.diff().splitlines() if line[0] != "-"), "diff")
    assert after == {"train": {"max_grad_norm": None, "memory": "smallest"}, "method": {"freeze": []}}
    assert fix.as_dict()["changes"]["train.memory"] == ["normal", "smallest"]


def test_the_recipe_with_settings_keeps_what_was_not_given() -> None:
    given = recipe(**FULL)
    changed = applied(given, {"train.memory": "low", "hardware.processes": 2})
    assert changed.train.model_fields_set == {"memory"} and changed.hardware.processes == 2
    assert check(changed.model_dump(exclude_unset=True), "r") == changed and given.train.memory == "normal"


@pytest.mark.parametrize("bend", [0, 3, 40])
def test_the_largest_number_is_found_by_few_questions_and_proved(bend: int) -> None:
    for room in range(0, 700, 7):
        asked: list[int] = []
        expected = max((n for n in range(1, 65) if lines(n, bend).num_bytes <= room), default=0)
        assert largest(partial(lines, bend=bend, asked=asked), room) == expected
        # 1, the guess and its neighbour; where the lines mislead, another guess or two
        assert len(asked) == len(set(asked)) <= (4 if bend == 0 else 6)
        if 0 < expected < 64:
            assert {expected, expected + 1} <= set(asked)


def lines(number: int, bend: int, asked: list[int] | None = None) -> Need:
    """A need of two parts, one of which rises faster and from `bend` on faster still, which no line tells."""
    if asked is not None:
        asked.append(number)
    parts = {"forward": 20 + 3 * number, "backward": 10 * number - 30 + max(0, number - bend) * bool(bend)}
    return Need(max(parts.values()) + 5, parts, {"forward": 20, "backward": 0})
