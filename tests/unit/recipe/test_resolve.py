from __future__ import annotations

from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.recipe.load import check
from tunesmith.recipe.resolve import Facts, resolve, resolve_steps, without_secrets
from tunesmith.recipe.schema import Recipe

FACTS = Facts(context_length=8192, device="cpu", threads=3, precision="fp32", serve_precision="bf16")


def recipe(**sections: dict[str, Any]) -> Recipe:
    data = {"sources": [{"path": "a", "format": "text"}]} | sections.pop("data", {})
    return check({"model": {"path": "x"}, "data": data} | sections, "r")


def autos(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for item in value.values() for found in autos(item)]
    return [value] if value == "auto" else []


def test_no_auto_is_left_and_the_first_object_is_unchanged() -> None:
    before = recipe()
    after = resolve_steps(resolve(before, FACTS), total_steps=200)
    left = after.model_dump()
    assert left["serve"].pop("engine") == "auto"  # the machine that serves decides
    assert autos(before.model_dump()) and not autos(left)
    assert after.data.max_length == 2048 and after.serve.max_length == 4096
    assert after.train.save_every == 40 and after.eval.every == 50 and after.samples.every == 50


def test_given_values_stay() -> None:
    before = recipe(train={"lr": 1e-3, "save_every": 7}, method={"alpha": 5}, data={"max_length": 64})
    after = resolve_steps(resolve(before, FACTS), total_steps=200)
    assert (after.train.lr, after.train.save_every, after.method.alpha, after.data.max_length) == (
        1e-3,
        7,
        5,
        64,
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_intervals_of_short_runs_are_at_least_one(steps: int) -> None:
    after = resolve_steps(resolve(recipe(), FACTS), total_steps=steps)
    assert after.train.save_every == 10 and after.eval.every >= 1


def test_full_fine_tuning_gets_its_own_rate() -> None:
    assert resolve(recipe(method={"type": "full"}), FACTS).train.lr == 2e-5


def test_lengths_beyond_the_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.max_length: 9000 .* 8192"):
        resolve(recipe(data={"max_length": 9000}), FACTS)
    with pytest.raises(UserError, match=r"serve\.max_length: 9000"):
        resolve(recipe(serve={"max_length": 9000}), FACTS)


def test_adapters_over_four_bits_get_the_rate_of_adapters() -> None:
    assert resolve(recipe(method={"type": "qlora"}), FACTS).train.lr == 2e-4


def test_secrets_go_and_the_rest_stays() -> None:
    before = recipe(serve={"api_key": "k", "port": 9})
    after = without_secrets(before)
    assert after.serve.api_key is None and after.serve.port == 9 and before.serve.api_key == "k"
    assert after == recipe(serve={"port": 9})


def test_the_precision_of_the_endpoint_follows_its_weights() -> None:
    for weights, precision in ((None, "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16")):
        after = resolve(recipe(serve={"weights": weights}), FACTS)
        assert after.serve.precision == precision
        assert check(after.model_dump(), "resolved.yaml") == after


def test_what_a_plan_chooses_is_auto_in_a_recipe_alone() -> None:
    given = recipe(method={"type": "auto"}, train={"micro_batch_size": "auto"})
    assert (given.method.type, given.train.micro_batch_size) == ("auto", "auto")
    with pytest.raises(UserError, match=r"micro_batch_size: 'some' is not a whole number"):
        recipe(train={"micro_batch_size": "some"})
    with pytest.raises(UserError, match=r"micro_batch_size: 0 is less than 1"):
        recipe(train={"micro_batch_size": 0})
    with pytest.raises(
        UserError, match=r"method\.type: 'galore' is not one of 'full', 'lora', 'qlora' or 'auto'"
    ):
        recipe(method={"type": "galore"})
