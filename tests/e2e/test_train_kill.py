"""kill -9 at any moment, and the resumed run is bit for bit the one that was never killed.

Some kills for every run of the tests; bench/kills.py makes hundreds.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.e2e.train_helpers import Training, write_recipe
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.train.metrics import final_events, loss_curve
from tunesmith.workflows.train import train_recipe

STEPS = 28
Curves = tuple[dict[int, float], list[float]]


def curves(run: Path) -> Curves:
    """Training losses by step, and held-out losses."""
    events = run / "events.jsonl"
    return loss_curve(events), [event["loss"] for event in final_events(events, "eval")]


def never_killed(recipe: Path) -> Curves:
    """In this process, which spares a start of the command."""
    return curves(train_recipe(recipe, []).run.path)


def finish(recipe: Path) -> Curves:
    code, _, errors = (training := Training(recipe)).end()
    assert code == 0, errors
    return curves(training.run)


def assert_no_half_checkpoint(run: RunFolder) -> None:
    """Whatever carries a checkpoint's name and a manifest is whole."""
    named = [path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").exists()]
    assert sorted(named) == sorted(run.complete_checkpoints())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"),
    [({"type": "lora", "dropout": 0.1}, "save any save"), ({"type": "full"}, "any save")],
    ids=["lora", "full"],
)
def test_kill_at_random_moments(tmp_path: Path, trainee: Path, method: dict[str, object], kills: str) -> None:
    """In a save, or anywhere, evaluating included.

    The waits are counted in steps, of which there are more than all kills together can wait for.
    """
    for name in ("never", "killed"):
        (tmp_path / name).mkdir()
    method = {"rank": 4} | method
    steps = {"max_steps": STEPS}
    never = never_killed(write_recipe(tmp_path / "never", trainee, method=method, train=steps))
    recipe = write_recipe(tmp_path / "killed", trainee, method=method, train=steps)
    draw = random.Random(f"{method} {kills}")
    run = RunFolder(tmp_path / "killed" / "runs" / "run")
    during_saves = 0
    for kind in kills.split():
        training = Training(recipe)
        training.wait_for(lambda training=training: training.new_events("start") > 0)
        after = draw.randint(1, 4)
        training.wait_for(lambda training=training, n=after: training.new_events("step") >= n)
        if kind == "save":
            training.wait_for(training.is_saving)
        else:
            time.sleep(draw.uniform(0, 0.02))
        training.kill()
        during_saves += training.is_saving()
        assert_no_half_checkpoint(run)
    assert finish(recipe) == never
    assert len(never[0]) == STEPS and len(never[1]) >= 4
    resumes = [event["step"] for event in read_events(run.events, "resume")]
    assert any(0 < step < STEPS for step in resumes), resumes
    assert during_saves > 0, "no kill fell into a save"
    assert not list(run.checkpoints.glob(".*.partial-*")), "leftovers of killed saves were not removed"


@pytest.mark.slow
def test_signals_save_and_say_how_to_go_on(tmp_path: Path, trainee: Path) -> None:
    for name in ("never", "stopped"):
        (tmp_path / name).mkdir()
    settings = {"save_every": 1000}
    never = never_killed(write_recipe(tmp_path / "never", trainee, train=settings))
    recipe = write_recipe(tmp_path / "stopped", trainee, train=settings)
    run = RunFolder(tmp_path / "stopped" / "runs" / "run")
    for number, code in ((2, 130), (15, 143)):
        training = Training(recipe)
        training.wait_for(lambda training=training: training.new_events("step") >= 2)
        training.process.send_signal(number)
        found, _, errors = training.end()
        assert found == code, errors
        assert f"go on with: tunesmith train {recipe}" in errors
        saved = run.latest_checkpoint()
        last = list(read_events(run.events, "step"))[-1]["step"]
        assert saved == run.checkpoint(last), "the finished step was not saved"
    assert finish(recipe) == never
