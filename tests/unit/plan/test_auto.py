"""What "auto" comes to, over needs and speeds by a rule of thumb."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.plan.fit_case import Thumb, facts, recipe, target
from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.auto import Choice, choose, has_auto, kept
from tunesmith.recipe.resolve import resolve
from tunesmith.recipe.schema import Recipe

AUTO: dict[str, Any] = {"method": {"type": "auto"}}
SEVEN = {"weights": 7e9, "layers": 32, "hidden": 4096}


def chosen(given: Recipe, gib: float, need: Thumb | None = None, **more: Any) -> Choice:
    return choose(given, target(gib, need or Thumb(), **more))


def steady(resolved: Recipe) -> float:
    """Faster with more packs at once, up to four."""
    size = resolved.train.micro_batch_size
    assert size != "auto"
    return 1000.0 * min(size, 4)


@pytest.mark.parametrize(
    ("gib", "kind", "checkpointing"),
    [(140, "full", "auto"), (110, "full", "full"), (24, "lora", "auto"), (16.5, "lora", "full"), (14, "qlora", "auto"),
     (7.5, "qlora", "full")],
)  # fmt: skip
def test_the_best_method_that_fits(gib: float, kind: str, checkpointing: str) -> None:
    found = chosen(recipe(**AUTO), gib, Thumb(**SEVEN)).recipe
    assert (found.method.type, found.train.gradient_checkpointing) == (kind, checkpointing)
    assert not found.train.activation_offload and found.train.micro_batch_size == 1


def test_offload_is_the_last_and_what_fits_nowhere_is_what_needs_least() -> None:
    for gib, fits in ((5.5, True), (4, False)):
        choice = chosen(recipe(**AUTO), gib, Thumb(**SEVEN))
        assert choice.recipe.method.type == "qlora" and choice.recipe.train.activation_offload
        assert choice.tried[-1].fits is fits and len(choice.tried) == 7
    assert "no method fits 4.0 GiB" in choice.reasons[0]
    assert not chosen(recipe(**AUTO), 1, Thumb(**SEVEN), found=facts("cpu")).recipe.train.activation_offload


def test_settings_of_one_method_leave_the_others_out() -> None:
    frozen = recipe(method={"type": "auto", "freeze": ["model.embed*"]})
    assert chosen(frozen, 8, Thumb(**SEVEN)).recipe.method.type == "full"
    adapters = recipe(method={"type": "auto", "dora": True})
    assert chosen(adapters, 500, Thumb(**SEVEN)).recipe.method.type == "lora"
    with pytest.raises(UserError, match=r"method\.dora"):
        chosen(recipe(method={"type": "auto", "dora": True, "freeze": ["a"]}), 500)


def test_given_checkpointing_is_kept() -> None:
    given = recipe(**AUTO, train={"gradient_checkpointing": "none"})
    choice = chosen(given, 110, Thumb(**SEVEN))
    assert choice.recipe.method.type == "lora" and choice.recipe.train.gradient_checkpointing == "none"


def test_floors_spare_plans() -> None:
    need = Thumb(**SEVEN)
    choice = chosen(recipe(**AUTO), 24, need, floor=lambda r: 100 * GIB if r.method.type == "full" else 0)
    assert [one.method.type for one in need.asked] == ["lora"]
    assert "method.type=full needs at least 100.0 GiB" in choice.reasons[0]
    assert choice.tried[0].as_dict()["needed_bytes"] == 100 * GIB


@pytest.mark.parametrize(
    ("gib", "accumulation", "sizes"),
    [(80, 16, (4, 4)), (12, 16, (2, 8)), (80, 6, (2, 3)), (80, 1, (1, 1)), (4, 16, (1, 16)), (80, 2, (2, 1))],
)
def test_packs_at_once_keep_the_packs_of_a_step(
    gib: float, accumulation: int, sizes: tuple[int, int]
) -> None:
    given = recipe(
        method={"type": "full"}, train={"micro_batch_size": "auto", "grad_accumulation": accumulation}
    )
    found = chosen(given, gib, speed=steady).recipe.train
    assert (found.micro_batch_size, found.grad_accumulation) == sizes


def test_packs_at_once_where_nobody_says_how_many_a_step_has() -> None:
    given = recipe(method={"type": "lora"}, train={"micro_batch_size": "auto"})
    choice = chosen(given, 80, speed=steady)
    assert (choice.recipe.train.micro_batch_size, choice.recipe.train.grad_accumulation) == (4, 1)
    assert choice.reasons == ("train.micro_batch_size: 4 x grad_accumulation 1: 8 would not be 3% faster",)
    assert [one.tokens_per_s for one in choice.tried] == [1000, 2000, 4000, 4000]
    # Without speeds: as many as make a pass of 4,096 tokens.
    assert chosen(given, 80).recipe.train.micro_batch_size == 2
    short = recipe(data={"max_length": 256}, train={"micro_batch_size": "auto"})
    assert chosen(short, 80).recipe.train.micro_batch_size == 16


def test_both_are_chosen_together_and_nothing_without_auto() -> None:
    given = recipe(**AUTO, train={"micro_batch_size": "auto", "grad_accumulation": 8})
    choice = chosen(given, 24, Thumb(), speed=steady)
    assert has_auto(given) and not has_auto(choice.recipe)
    assert (choice.recipe.method.type, choice.recipe.train.micro_batch_size) == ("full", 4)
    assert [reason.split(":")[0] for reason in choice.reasons] == ["method.type", "train.micro_batch_size"]
    assert set(choice.as_dict()) == {"reasons", "tried"}
    assert chosen(recipe(), 0.1) == Choice(recipe=recipe())


def test_what_was_chosen_is_kept_when_a_run_goes_on() -> None:
    given = recipe(**AUTO, train={"micro_batch_size": "auto", "grad_accumulation": 8})
    first = chosen(given, 4, Thumb(), speed=steady).recipe
    earlier = resolve(first, facts())
    again = kept(given, earlier)
    assert resolve(again, facts()) == earlier
    assert kept(recipe(), earlier) == recipe()
    changed = recipe(**AUTO, train={"micro_batch_size": "auto", "lr": 1e-3})
    assert kept(changed, earlier).train.lr == 1e-3


def test_an_offload_that_was_chosen_is_kept_too() -> None:
    earlier = resolve(chosen(recipe(**AUTO), 5.5, Thumb(**SEVEN)).recipe, facts())
    assert earlier.train.activation_offload
    assert resolve(kept(recipe(**AUTO), earlier), facts()) == earlier
