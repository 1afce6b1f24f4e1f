"""`tunesmith train --cluster HOST:PORT` in workers of a real Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import Training, write_recipe
from tests.ray_cluster import RayCluster, marks, ray_cluster, title
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.train.metrics import loss_curve

pytestmark = marks(900)

STEPS = 60
START_S = 300  # Ray starts a process for each worker, which imports all anew


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), nodes=2, cpus=1) as made:
        yield made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, trainee: Path) -> Path:
    """One file for all trainings; it says nothing of processes or machines."""
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        trainee,
        method={"type": "full"},
        train={"max_steps": STEPS, "grad_accumulation": 2, "save_every": 2, "lr": 1e-3},
        eval={"every": 100},
    )


@pytest.fixture
def curve(recipe: Path) -> dict[int, float]:
    """The losses of the recipe in one process, which is asked once."""
    if not events_of(recipe, "alone").exists():
        code, _, errors = Training(recipe, "--set", "name=alone").end()
        assert code == 0, errors
    found = curve_of(recipe, "alone")
    assert len(found) == STEPS
    return found


def events_of(recipe: Path, name: str) -> Path:
    return recipe.parent / "runs" / name / "events.jsonl"


def curve_of(recipe: Path, name: str) -> dict[int, float]:
    return loss_curve(events_of(recipe, name))


def processes_of(recipe: Path, name: str) -> list[int]:
    """In how many processes each attempt of the run was."""
    return [event["processes"] for event in read_events(events_of(recipe, name), "start")]


def on_ray(recipe: Path, cluster: RayCluster, name: str, workers: str) -> Training:
    """A training on the cluster, whose run has this name."""
    training = Training(recipe, "--cluster", cluster.address, "--workers", workers, "--set", f"name={name}")
    training.events = events_of(recipe, name)
    return training


def test_one_recipe_gives_one_curve_alone_by_torchrun_and_on_ray(
    recipe: Path, curve: dict[int, float], cluster: RayCluster, cli: Cli
) -> None:
    args = ["tunesmith", "train", str(recipe), "--set", "name=torchrun"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*torchrun, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = cli.json("train", recipe, "--cluster", cluster.address, "--workers", "2", "--set", "name=ray")
    assert told["run"] == str(recipe.parent / "runs" / "ray")
    for name in ("torchrun", "ray"):
        assert processes_of(recipe, name) == [2]
        assert curve_of(recipe, name) == pytest.approx(curve, abs=1e-5), name


@pytest.mark.parametrize("node", [0, 1])
def test_a_worker_that_is_killed_costs_what_came_after_the_last_checkpoint(
    recipe: Path, curve: dict[int, float], cluster: RayCluster, node: int
) -> None:
    name = f"killed-{node}"
    training = on_ray(recipe, cluster, name, "2")
    training.wait_for(lambda: training.new_events("step") >= 4, START_S)
    victim = next(pid for pid in cluster.workers(node) if title(pid).startswith("ray::RayTrainWorker"))
    os.kill(victim, signal.SIGKILL)
    code, _, errors = training.end()
    assert code == 0 and "resuming" in errors, errors
    assert processes_of(recipe, name) == [2, 2]
    assert curve_of(recipe, name) == pytest.approx(curve, abs=1e-5)


def test_ctrl_c_saves_and_one_process_goes_on(
    recipe: Path, curve: dict[int, float], cluster: RayCluster
) -> None:
    training = on_ray(recipe, cluster, "stopped", "2")
    training.wait_for(lambda: training.new_events("step") >= 3, START_S)
    training.process.send_signal(signal.SIGINT)
    code, _, errors = training.end()
    assert code == 130 and "saved as" in errors and "--workers 2" in errors, errors
    run = RunFolder(recipe.parent / "runs" / "stopped")
    reached, saved = max(curve_of(recipe, "stopped")), run.latest_checkpoint()
    assert saved is not None and saved.name == f"step-{reached:06d}" and reached < STEPS
    code, _, errors = Training(recipe, "--set", "name=stopped").end()
    assert code == 0, errors
    assert processes_of(recipe, "stopped") == [2, 1]
    assert curve_of(recipe, "stopped") == pytest.approx(curve, abs=1e-5)


def test_an_error_that_no_retry_can_mend_is_told_once(
    recipe: Path, cluster: RayCluster, cli: Cli, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user"}]}\n')
    wrong = tmp_path / "recipe.yaml"
    wrong.write_text(recipe.read_text().replace(str(recipe.parent / "rows.jsonl"), str(rows)))
    told = cli("train", wrong, "--set", f"output_dir={tmp_path}/alone")
    done = cli(
        "train", wrong, "--cluster", cluster.address, "--workers", "2", "--set", f"output_dir={tmp_path}/ray"
    )
    assert done.returncode == told.returncode == 2, (done.stderr, told.stderr)
    what = next(line for line in told.stderr.splitlines() if line.startswith("error: "))
    assert done.stderr.count("\nerror: ") == 1, done.stderr
    assert what.removeprefix("error: ") in done.stderr.partition("\nerror: ")[2].splitlines()[0]


def test_a_run_goes_on_with_fewer_workers_when_a_node_is_gone(
    recipe: Path, curve: dict[int, float], cluster: RayCluster
) -> None:
    training = on_ray(recipe, cluster, "elastic", "1:2")
    training.wait_for(lambda: training.new_events("step") >= 4, START_S)
    cluster.remove_node()
    code, _, errors = training.end()
    assert code == 0, errors
    assert processes_of(recipe, "elastic") == [2, 1]
    assert curve_of(recipe, "elastic") == pytest.approx(curve, abs=1e-5)
