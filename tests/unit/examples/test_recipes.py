"""Every shipped recipe loads, and says what its file is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.recipe.load import load_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "lora", "full", "qlora", "dpo"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert recipe.name is not None
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_quickstart_starts_from_the_built_in_model() -> None:
    recipe = load_recipe(RECIPES[[path.stem for path in RECIPES].index("quickstart")], [])
    assert recipe.model.path == "smollm2-135m-instruct"
    assert recipe.method.type == "lora"
    assert recipe.data.eval_sources[0].path.endswith("test.jsonl")
