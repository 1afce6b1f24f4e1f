"""`tunesmith verify resume`: equal where resuming is exact, and not where it is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import ROOT, Cli
from tests.e2e.train_helpers import write_recipe

SHORT = ("--steps", "30", "--kills", "1")


@pytest.mark.slow
def test_a_killed_run_is_shown_to_be_the_same(tmp_path: Path, trainee: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, trainee)
    found = cli.json("verify", "resume", recipe, *SHORT)
    assert found["equal"] is True and found["first_difference"] is None and len(found["kills"]) == 1
    assert [point["step"] for point in found["curve"]] == list(range(1, 31))
    assert all(point["once"] == point["killed"] for point in found["curve"])
    assert found["kills"][0]["resumed_from"] >= 7
    assert any("optimizer" in name for name in found["files"])
    assert list((tmp_path / "runs").iterdir()) == [], "the folder of the proof was left"


@pytest.mark.slow
def test_a_resume_that_forgets_something_is_told(tmp_path: Path, trainee: Path) -> None:
    recipe = write_recipe(tmp_path, trainee)
    command = [sys.executable, "-m", "tests.e2e.forgetful", "verify", "resume", str(recipe), *SHORT]
    pipe = subprocess.PIPE
    process = warm.popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "NOT the same: the losses part at step" in out and "DIFFERENT" in out


def test_a_recipe_that_cannot_be_trained_is_the_users_error(tmp_path: Path, trainee: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, trainee)
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n')
    done = cli("verify", "resume", recipe)
    assert done.returncode == 2 and "rows.jsonl" in done.stderr, done.stderr
    assert not list((tmp_path / "runs").iterdir())
