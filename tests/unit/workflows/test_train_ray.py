"""How many workers a recipe gets on Ray, and what they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster.ray_train import Nodes, Workers
from tunesmith.core.errors import UserError
from tunesmith.recipe.load import load_recipe
from tunesmith.workflows.train_ray import (
    check_alike,
    command_of,
    mark_of,
    parcel,
    recipe_here,
    workers_for,
)

CPUS, GPUS = Nodes(count=3, cpus=12, gpus=0), Nodes(count=3, cpus=12, gpus=6)
TEXT = "model: {path: some/model}\ndata: {sources: [{path: rows.jsonl}]}\noutput_dir: out\n"


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("overrides", "nodes", "wanted", "expected"),
    [
        ([], CPUS, None, Workers(3, 3)),
        ([], GPUS, None, Workers(6, 6, gpu=True)),
        (["hardware.processes=2"], CPUS, None, Workers(6, 6)),
        (["hardware.processes=1"], GPUS, None, Workers(3, 3, gpu=True)),
        (["hardware.device=cpu"], GPUS, None, Workers(3, 3)),
        (["parallel.engine=single"], GPUS, None, Workers(1, 1, gpu=True)),
        (["hardware.processes=2"], CPUS, "1:4", Workers(1, 4)),
    ],
)
def test_the_workers_of_a_recipe(
    recipe_path: Path, overrides: list[str], nodes: Nodes, wanted: str | None, expected: Workers
) -> None:
    assert workers_for(load_recipe(recipe_path, overrides), nodes, wanted) == expected


@pytest.mark.parametrize(
    ("override", "wanted", "fault"),
    [
        ("hardware.device=cuda", None, "has no GPU"),
        ("parallel.engine=single", "2", "parallel.engine is single"),
    ],
)
def test_workers_that_a_recipe_cannot_have(
    recipe_path: Path, override: str, wanted: str | None, fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        workers_for(load_recipe(recipe_path, [override]), CPUS, wanted)


def test_a_worker_is_told_folders_in_full(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe_path.parent)
    sent = parcel(load_recipe(recipe_path), recipe_path, ["train.lr=1e-4"], fresh=True)
    assert sent["overrides"] == [
        "train.lr=1e-4", "hardware.processes=auto", f"output_dir={recipe_path.parent / 'out'}"
    ]  # fmt: skip
    assert sent["folder"] == str(recipe_path.parent) and sent["fresh"] is True


def test_an_object_store_is_left_as_it_is(recipe_path: Path) -> None:
    overrides = ["output_dir=s3://bucket/runs"]
    sent = parcel(load_recipe(recipe_path, overrides), recipe_path, overrides, fresh=False)
    assert sent["overrides"] == [*overrides, "hardware.processes=auto"]


def test_the_recipe_is_carried_where_its_file_is_not(recipe_path: Path) -> None:
    sent: dict[str, Any] = {"path": str(recipe_path), "text": TEXT}
    assert recipe_here(sent) == recipe_path
    other = recipe_here(sent | {"text": TEXT + "name: other\n"})
    assert other != recipe_path and other.name == "mine.yaml"
    assert load_recipe(other).name == "other"


def test_another_run_in_the_place_of_the_first_is_known(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path, [f"output_dir={recipe_path.parent / 'out'}"])
    assert mark_of(recipe, recipe_path) is None
    lock = recipe_path.parent / "out" / "mine" / "lock.json"
    lock.parent.mkdir(parents=True)
    lock.write_text("{}")
    first = mark_of(recipe, recipe_path)
    assert first is not None and mark_of(recipe, recipe_path) == first
    lock.parent.rename(lock.parent.with_name("mine.1"))
    lock.parent.mkdir()
    lock.write_text("{}")
    assert mark_of(recipe, recipe_path) not in (None, first)


def test_ranks_that_differ(tmp_path: Path) -> None:
    same = {"torch": "2.13.0", "tunesmith": "0.1"}
    check_alike(tmp_path, [True, True], same, dict(same))
    with pytest.raises(UserError, match=r"rank 1 does not see") as caught:
        check_alike(tmp_path, [True, False], same, same)
    assert "s3://" in str(caught.value.hint)
    with pytest.raises(UserError, match=r"torch is 2.13.0 on the node of rank 0 and 2.12.0 on this one"):
        check_alike(tmp_path, [True, True], same, same | {"torch": "2.12.0"})


def test_the_command_that_goes_on(tmp_path: Path) -> None:
    command = command_of(Path("a b.yaml"), ["name=x"], "auto", "1:4")
    assert command == "tunesmith train 'a b.yaml' --cluster auto --workers 1:4 --set name=x"
