"""How few layers are traced for all of them, by engine."""

from __future__ import annotations

import pytest

from tunesmith.plan.memory import FEW
from tunesmith.plan.sharding import few_layers
from tunesmith.recipe.schema import Recipe


def recipe(engine: str, stage: int = 3) -> Recipe:
    fixed = {"model": {"path": "unused"}, "data": {"sources": [{"path": "unused"}]}}
    return Recipe.model_validate(fixed | {"parallel": {"engine": engine, "zero_stage": stage}})


@pytest.mark.parametrize(
    ("engine", "stage"), [("single", 3), ("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("deepspeed", 2)]
)
def test_layers_that_are_alike_need_no_more_than_their_ends(engine: str, stage: int) -> None:
    assert few_layers(recipe(engine, stage), 1_000_000) == FEW


@pytest.mark.parametrize(
    ("elements", "few"),
    # Layers of Llama-3-70B (855,654,400), Llama-3-8B (218,112,000) and SmolLM2-135M (3,540,096).
    [(855_654_400, (4, 5)), (218_112_000, (6, 7)), (3_540_096, (284, 285))],
)
def test_zero_3_needs_layers_beyond_its_reuse_distance(elements: int, few: tuple[int, int]) -> None:
    assert few_layers(recipe("deepspeed"), elements) == few


def test_a_model_without_decoder_layers_is_traced_as_it_is() -> None:
    assert few_layers(recipe("deepspeed"), 0) == FEW
