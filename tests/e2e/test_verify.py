"""`tunesmith verify resume`: equal where resuming is exact, and not where it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import write_recipe

SHORT = ("--steps", "30", "--kills", "1")

# What a tool does that forgets the optimizer's averages when it resumes.
FORGETFUL = """
from tunesmith.train import states
states.read_optimizer = lambda *args, **named: None
"""


@pytest.mark.slow
def test_a_killed_run_is_shown_to_be_the_same(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny)
    found = cli.json("verify", "resume", recipe, *SHORT)
    assert found["equal"] is True and found["first_difference"] is None and len(found["kills"]) == 1
    assert [point["step"] for point in found["curve"]] == list(range(1, 31))
    assert all(point["once"] == point["killed"] for point in found["curve"])
    assert found["kills"][0]["resumed_from"] >= 7
    assert any("optimizer" in name for name in found["files"])
    assert list((tmp_path / "runs").iterdir()) == [], "the folder of the proof was left"


@pytest.mark.slow
def test_a_resume_that_forgets_something_is_told(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    recipe = write_recipe(tmp_path, tiny)
    done = cli("verify", "resume", recipe, *SHORT, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert "NOT the same: the losses part at step" in done.stdout and "DIFFERENT" in done.stdout


def test_a_recipe_that_cannot_be_trained_is_the_users_error(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny)
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n')
    done = cli("verify", "resume", recipe)
    assert done.returncode == 2 and "rows.jsonl" in done.stderr, done.stderr
    assert not list((tmp_path / "runs").iterdir())
