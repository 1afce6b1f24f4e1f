"""What counts as the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.events import EventLog
from tunesmith.core.run_folder import RunFolder
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.resume import check_same_recipe, finished_result, flat
from tunesmith.workflows.store import move_aside
from tunesmith.workflows.train import resume_command

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}]}}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(BASE | sections)


def test_flat_names_every_value() -> None:
    assert flat({"a": {"b": [1, {"c": 2}], "d": []}}) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": []}


@pytest.mark.parametrize(
    "free",
    [
        {"serve": {"port": 1}},
        {"samples": {"prompts": ["x"]}},
        {"eval": {"every": 3}},
        {"train": {"keep_checkpoints": 9, "log_every": 5, "save_every": 7, "tensorboard": True}},
        {"name": "other", "output_dir": "elsewhere"},
    ],
)
def test_these_may_change(free: dict[str, Any], tmp_path: Path) -> None:
    check_same_recipe(RunFolder(tmp_path), recipe(), recipe(**free))


def test_all_differences_are_named(tmp_path: Path) -> None:
    other = recipe(
        train={"seed": 3, "grad_accumulation": 2},
        data={"sources": [{"path": "b.jsonl"}, {"path": "c.jsonl"}]},
        hardware={"threads": 2},
    )
    with pytest.raises(UserError) as refused:
        check_same_recipe(RunFolder(tmp_path), recipe(), other)
    told = refused.value.what.splitlines()[1:]
    assert "  train.seed: 0 -> 3" in told and "  train.grad_accumulation: 1 -> 2" in told
    assert "  data.sources.0.path: a.jsonl -> b.jsonl" in told
    assert "  data.sources.1.path: None -> c.jsonl" in told
    assert "  hardware.threads: auto -> 2" in told


def test_finished_is_what_the_last_event_says(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.lock.write_text("{}")
    with EventLog(run.events) as events:
        events.write("end", status="finished", step=2, steps=2, final_loss=0.5)
    assert finished_result(run) == {"steps": 2, "final_loss": 0.5}
    with EventLog(run.events) as events:
        events.write("resume", step=1)
    assert finished_result(run) is None
    with EventLog(run.events) as events:
        events.write("end", status="interrupted", step=2)
    assert finished_result(run) is None


def test_an_earlier_run_is_never_overwritten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for number in range(3):
        run.path.mkdir()
        (run.path / "mark").write_text(str(number))
        move_aside(run)
    move_aside(run)
    assert [(tmp_path / f"run.{n}" / "mark").read_text() for n in (1, 2, 3)] == ["0", "1", "2"]


def test_the_resume_command_can_be_pasted() -> None:
    found = resume_command(Path("my recipe.yaml"), ["samples.prompts=[a b]"])
    assert found == "tunesmith train 'my recipe.yaml' --set 'samples.prompts=[a b]'"
