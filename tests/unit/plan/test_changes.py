"""The candidate changes: every one is allowed by the schema, and dear ones come last."""

from __future__ import annotations

import pytest

from tests.unit.plan.fit_case import facts, recipe
from tunesmith.plan.changes import applied, axes, lengths, methods, micro_batches
from tunesmith.recipe.resolve import resolve
from tunesmith.recipe.schema import Recipe


def every_single_change(given: Recipe) -> list[str]:
    """What each option changes, resolved, which raises for what the schema refuses."""
    resolved = resolve(given, facts())
    found = []
    for axis in axes(given, resolved):
        for option in axis[1:]:
            changed = resolve(applied(given, option.settings), facts())
            assert changed != resolved, option
            found += list(option.settings)
    return found


@pytest.mark.parametrize("memory", ["normal", "low", "smallest"])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "bf16-pure", "fp16"])
def test_every_option_is_allowed_and_changes_something(kind: str, memory: str, precision: str) -> None:
    train = {"memory": memory, "precision": precision, "max_grad_norm": None}
    keys = every_single_change(recipe(method={"type": kind}, train=train))
    assert kind == "full" or not {"train.optimizer", "train.optimizer_in_backward"} & set(keys)


def test_all_of_one_method_comes_before_the_next() -> None:
    """But for shorter rows, which come after all methods."""
    given = recipe(method={"type": "full"}, train={"micro_batch_size": 8})
    resolved = resolve(given, facts())
    dearest = [sum(max(o.cost for o in axis) for axis in axes(applied(given, m.settings), resolved)[:4])
               for m in methods(given, resolved)]  # fmt: skip
    costs = [option.cost for option in methods(given, resolved)]
    assert costs[0] == 0 and costs[0] < costs[1] < costs[2]
    assert min(option.cost for option in lengths(resolved)[1:]) > costs[2] + 0.3 + 0.4
    assert dearest[0] > costs[1] - 0.5  # only combinations of everything reach into the next method


def test_micro_batches_are_divisors_and_the_step_stays() -> None:
    resolved = resolve(recipe(train={"micro_batch_size": 6, "grad_accumulation": 4}), facts())
    found = [tuple(option.settings.values()) for option in micro_batches(resolved)[1:]]
    assert found == [(3, 8), (2, 12), (1, 24)]


def test_lengths_are_multiples_of_64_and_not_below_128() -> None:
    for length, expected in ((2048, [1536, 1024, 768, 512, 256]), (300, [192, 128]), (128, [])):
        resolved = resolve(recipe(data={"max_length": length}), facts())
        assert [option.settings["data.max_length"] for option in lengths(resolved)[1:]] == expected
