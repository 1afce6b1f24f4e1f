"""`tunesmith plan` and the plan within `tunesmith train`, as commands."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Cli
from tests.e2e.train_helpers import write_recipe
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import RunFolder

# Adapters of so many numbers that no machine holds them, and settings that leave little to be tried.
HUGE = {"type": "lora", "rank": 10**10}
LEAST = {"micro_batch_size": 1, "gradient_checkpointing": "full", "precision": "bf16", "max_steps": 1}


def test_a_plan_writes_nothing_and_marks_what_is_learned(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny)
    done = cli("plan", recipe, "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout and "<|im_end|>⟧" in done.stdout and done.stdout.rstrip().endswith("fits")
    assert "logits and loss" in done.stdout and "30 steps" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_cannot_fit_exits_3_in_plan_and_in_train(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny, method=HUGE, train=LEAST)
    planned = cli("plan", recipe, "--rows", "0", "--json")
    assert planned.returncode == 3
    found = json.loads(planned.stdout)
    assert found["verdict"] == "does not fit" and found["works"] is False
    trained = cli("train", recipe, "--json")
    assert trained.returncode == 3
    error = json.loads(trained.stdout)["error"]
    assert error["type"] == "PlanRefused" and error["hint"]
    run = RunFolder(tmp_path / "runs" / "run")
    assert [path.name for path in run.path.iterdir()] == ["plan.json"]
    assert json.loads(run.plan.read_text())["verdict"] == "does not fit"


def test_training_sets_its_plan_beside_what_it_measured(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny, train={"max_steps": 3, "save_every": 3})
    cli.json("train", recipe)
    run = RunFolder(tmp_path / "runs" / "run")
    plan = json.loads(run.plan.read_text())
    (event,) = read_events(run.events, "plan")
    assert event["memory"] == plan["memory"] and plan["memory"]["device"] == "cpu"
    assert plan["duration"]["train_s"] > 0 and plan["verdict"] == "fits"
    report = run.report.read_text()
    (memory,) = (line for line in report.splitlines() if "peak memory of the process" in line)
    assert "of tensors" in memory and memory.rstrip(" |").endswith("GiB")
    for name in ("time in steps", "time in all", "tokens/s", "a checkpoint"):
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {name} |"))
        assert " - " not in line


def test_a_refused_fresh_start_leaves_the_earlier_run_where_it_is(
    tmp_path: Path, tiny: Path, cli: Cli
) -> None:
    cli.json("train", write_recipe(tmp_path, tiny, train=LEAST))
    run = RunFolder(tmp_path / "runs" / "run")
    before = run.plan.read_text()
    refused = cli("train", write_recipe(tmp_path, tiny, train=LEAST, method=HUGE), "--fresh")
    assert refused.returncode == 3
    assert run.plan.read_text() == before and not (tmp_path / "runs" / "run.1").exists()


def test_processes_are_refused_before_they_meet(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    recipe = write_recipe(tmp_path, tiny, method=HUGE, train=LEAST, hardware={"processes": 2})
    refused = cli("train", recipe, "--json")
    assert refused.returncode == 3
    assert json.loads(refused.stdout)["error"]["type"] == "PlanRefused"
