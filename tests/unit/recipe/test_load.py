from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.recipe.load import check, dump_yaml, load_recipe, parse_yaml

GOOD = "model: {path: some/model}\ndata: {sources: [{path: rows.jsonl}]}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return [f"{fault.what} | {fault.hint}" for fault in caught.value.faults]


def test_a_short_recipe_gets_defaults_and_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.method.type == "lora" and recipe.train.lr == "auto"
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0  # type: ignore[misc]


def test_all_faults_come_at_once_with_place_value_and_remedy(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        "model: {pth: x}\ndata: {sources: [{path: a, weight: -1}], lr: 3}\ntrain: {lr: fast, seed: 1.5}\nserv: {}\n",
    )
    file = tmp_path / "recipe.yaml"
    assert found[0].startswith(f"{file}: model.path: is missing")
    assert f"{file}: model.pth: there is no such key | did you mean 'path'?" in found
    assert any(f.startswith(f"{file}: data.sources.0.weight: -1 is not greater than 0") for f in found)
    assert f"{file}: data.lr: there is no such key | did you mean 'train.lr'?" in found
    assert any(f.startswith(f"{file}: train.lr: 'fast' is not a number") and "2e-4" in f for f in found)
    assert any(f.startswith(f"{file}: train.seed: 1.5 is not a whole number") for f in found)
    assert f"{file}: serv: there is no such key | did you mean 'serve'?" in found
    assert len(found) == 7


def test_set_overrides_and_is_named_in_faults(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        [
            "train.lr=1e-4",
            "data.sources.0.path=other.csv",
            "data.sources.1.path=more.csv",
            "name=x",
            "serve.api_key=null",
        ],
    )
    assert recipe.train.lr == 1e-4 and recipe.name == "x" and recipe.serve.api_key is None
    assert [source.path for source in recipe.data.sources] == ["other.csv", "more.csv"]
    assert faults(tmp_path, GOOD, ["train.max_steps=x"])[0].startswith(
        "--set train.max_steps: train.max_steps: 'x'"
    )


@pytest.mark.parametrize("override", ["train.lr", "=3", "data.sources.9.path=x", "name.a.b=1"])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeErrors, match="--set"):
        load_recipe(write(tmp_path, "name: n\n" + GOOD), [override])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        ("- a\n", "not a list"),
        ("model: [\n", "line"),
        ("a: 1\na: 2\n", "line 2"),
        ("model: !!python/object:os.system {}\n", "line 1"),
    ],
)
def test_files_that_are_no_recipe(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        parse_yaml(text, "r.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        load_recipe(bad)


def test_numbers_as_people_write_them() -> None:
    assert parse_yaml("a: 2e-5\nb: 1e-4\nc: 3.0E+2", "r") == {"a": 2e-5, "b": 1e-4, "c": 300.0}


def test_yaml_round_trip() -> None:
    recipe = check(
        parse_yaml(GOOD + "train: {lr: 2e-5, betas: [0.9, 0.95]}\nserve: {api_key: '007'}", "r"), "r"
    )
    assert check(parse_yaml(dump_yaml(recipe), "r"), "r") == recipe
