"""`tunesmith train` with two processes: it ends when one dies, stops when asked, and goes on in any other way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.e2e.train_helpers import Training, write_recipe
from tunesmith.core.events import read_events
from tunesmith.core.proc import run as run_program
from tunesmith.core.run_folder import RunFolder
from tunesmith.train.metrics import final_events, loss_curve

pytestmark = pytest.mark.slow

STEPS = 24
Curve = dict[int, float]


def recipe_in(folder: Path, model: Path, processes: int = 2) -> Path:
    """Three micro-batches a step, full fine-tune, saved every fourth step."""
    folder.mkdir()
    return write_recipe(
        folder,
        model,
        method={"type": "full"},
        train={"max_steps": STEPS, "grad_accumulation": 3, "save_every": 4, "lr": 1e-3},
        eval={"every": 12},
        hardware={"device": "cpu", "threads": 1, "processes": processes},
    )


def curve(recipe: Path) -> Curve:
    return loss_curve(recipe.parent / "runs" / "run" / "events.jsonl")


def assert_close(found: Curve, wanted: Curve) -> None:
    assert found.keys() == wanted.keys() and len(wanted) == STEPS
    worst = max(abs(found[step] - wanted[step]) for step in wanted)
    assert worst < 1e-5, f"largest difference {worst:.2g}"


def workers_of(training: Training) -> dict[int, int]:
    """Process number by rank of the workers that this training has started."""
    return dict(enumerate(warm.children(training.process.pid)))


def assert_all_gone(pids: list[int]) -> None:
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "a worker outlived the training"
        time.sleep(0.05)


def kill_launcher(training: Training) -> None:
    training.wait_for(lambda: training.new_events("step") >= 6)
    pids = workers_of(training)
    assert len(pids) == 2
    training.kill()
    assert_all_gone([*pids.values()])


@pytest.fixture(scope="module")
def alone(trainee: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The losses of one process."""
    recipe = recipe_in(tmp_path_factory.mktemp("alone") / "one", trainee, processes=1)
    code, _, errors = Training(recipe).end()
    assert code == 0, errors
    return curve(recipe)


def test_a_killed_rank_ends_the_run_and_another_engine_goes_on(
    tmp_path: Path, trainee: Path, alone: Curve
) -> None:
    recipe = recipe_in(tmp_path / "killed", trainee)
    training = Training(recipe)
    training.wait_for(lambda: training.new_events("step") >= 6)
    pids = workers_of(training)
    assert sorted(pids) == [0, 1]
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    code, out, errors = training.end()
    assert time.monotonic() - killed < 60
    assert code == 4 and out == "", errors
    assert f"rank 1 (process {pids[1]}) was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert_all_gone([*pids.values()])

    training = Training(recipe, "--json", "--set", "parallel.engine=fsdp")
    code, out, errors = training.end()
    assert code == 0, errors
    assert json.loads(out)["steps"] == STEPS
    assert_close(curve(recipe), alone)
    run = RunFolder(training.run)
    warned = [event["what"] for event in read_events(run.events, "warning")]
    assert any("were ddp with 2 a machine and are fsdp with 2" in what for what in warned)
    steps = [event["step"] for event in final_events(run.events, "step")]
    assert steps == list(range(1, STEPS + 1)), "more than rank 0 wrote events"


def test_signals_save_and_stop_all_ranks(tmp_path: Path, trainee: Path, alone: Curve) -> None:
    recipe = recipe_in(tmp_path / "stopped", trainee)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        training = Training(recipe)
        training.wait_for(lambda training=training: training.new_events("step") >= 5)
        pids = workers_of(training)
        training.process.send_signal(number)
        found, _, errors = training.end()
        assert found == code, errors
        assert f"go on with: tunesmith train {recipe}" in errors
        assert_all_gone([*pids.values()])
        run = RunFolder(training.run)
        last = list(read_events(run.events, "step"))[-1]["step"]
        assert run.latest_checkpoint() == run.checkpoint(last), "the finished step was not saved"

    code, _, errors = Training(recipe, "--set", "hardware.processes=1").end()
    assert code == 0, errors
    assert_close(curve(recipe), alone)


def test_workers_end_with_a_killed_launcher_and_the_run_goes_on_exactly(
    tmp_path: Path, trainee: Path
) -> None:
    curves = []
    for name in ("never", "killed"):
        recipe = recipe_in(tmp_path / name, trainee)
        if name == "killed":
            kill_launcher(Training(recipe))
        code, _, errors = Training(recipe).end()
        assert code == 0, errors
        curves.append(curve(recipe))
    assert curves[0] == curves[1] and len(curves[0]) == STEPS


def test_under_torchrun(tmp_path: Path, trainee: Path, alone: Curve) -> None:
    recipe = recipe_in(tmp_path / "torchrun", trainee)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_program([*command, "-m", "tunesmith", "train", str(recipe)], cwd=recipe.parent)
    assert_close(curve(recipe), alone)
    assert done.stderr.count("trained 24 steps") == 1, "more than rank 0 told"


def test_an_error_of_the_recipe_is_told_once(tmp_path: Path, trainee: Path) -> None:
    recipe = recipe_in(tmp_path / "wrong", trainee)
    code, out, errors = Training(recipe, "--json", "--set", "parallel.engine=single").end()
    assert code == 2, errors
    assert errors.count("error: parallel.engine: 'single' with 2 processes") == 1
    assert json.loads(out)["error"]["type"] == "UserError"
