"""`tunesmith jobs` on a real Ray cluster: its trainings go on without whoever submitted them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import Cli
from tests.e2e.train_helpers import write_recipe
from tests.ray_cluster import RayCluster, marks, ray_cluster, title
from tunesmith.core.events import read_events
from tunesmith.core.net import free_port
from tunesmith.core.run_folder import RunFolder

pytestmark = marks(600)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), nodes=1, cpus=2, dashboard=True) as made:
        yield made


@pytest.fixture
def jobs(cluster: RayCluster, cli: Cli) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`tunesmith jobs ...` of the cluster, in an environment that names another one."""

    def run(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        assert cluster.dashboard is not None
        elsewhere = os.environ | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
        return cli("jobs", *args, "--cluster", cluster.dashboard, cwd=cwd, env=elsewhere)

    return run


def recipe_in(folder: Path, model: Path, **train: Any) -> RunFolder:
    """recipe.yaml in `folder`, with paths relative to it; returns where its run will be."""
    folder.mkdir()
    recipe = write_recipe(
        folder,
        model,
        method={"type": "full"},
        train={"max_steps": 4, "grad_accumulation": 1, "lr": 1e-4, "save_every": 2} | train,
        eval={"every": 0},
    )
    recipe.write_text(recipe.read_text().replace(f"{folder}/", ""))
    return RunFolder(folder / "runs" / "run")


def wait_until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def events(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return list(read_events(run.events, kind))


def test_a_training_ends_though_who_submitted_it_is_gone(
    tmp_path: Path, trainee: Path, cluster: RayCluster, cli: Cli, jobs: Any
) -> None:
    folder = tmp_path / "short"
    run = recipe_in(folder, trainee)
    done = jobs("submit", "recipe.yaml", "--set", "train.seed=3", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    name = done.stdout.strip()
    assert name.startswith("run-")

    done = jobs("logs", "run", "--follow")
    assert done.returncode == 0 and done.stderr == "", done.stderr + done.stdout
    assert "trained 4 steps" in done.stdout and str(run.path) in done.stdout
    assert jobs("logs", name).stdout == done.stdout
    assert len(events(run, "end")) == 1 and len(events(run, "step")) == 4 and run.latest_checkpoint()

    found = cli.json("jobs", "list", "--cluster", cluster.dashboard or "")["jobs"]
    assert isinstance(found, list)
    (job,) = [job for job in found if job["id"] == name]
    assert (job["state"], job["recipe"], job["run"]) == ("succeeded", "recipe.yaml", str(run.path))
    assert job["exit_code"] == 0 and job["ended"] > job["started"]
    assert "train.seed=3" in job["command"] and f"output_dir={folder}/runs" in job["command"]
    shown = jobs("list")
    assert shown.returncode == 0 and name in shown.stdout and "succeeded" in shown.stdout

    done = jobs("stop", name)
    assert done.returncode == 0 and f"{name} had ended already: succeeded" in done.stderr


def test_a_job_that_was_stopped_goes_on_by_the_same_submit(
    tmp_path: Path, trainee: Path, cluster: RayCluster, jobs: Any
) -> None:
    folder = tmp_path / "long"
    run = recipe_in(folder, trainee, max_steps=100_000, save_every=10)
    assert jobs("submit", "recipe.yaml", "--name", "first", cwd=folder).returncode == 0
    wait_until(lambda: len(events(run, "checkpoint")) >= 2)
    done = jobs("stop", "first")
    assert done.returncode == 0 and done.stderr.endswith("stopped\n"), done.stderr
    wait_until(lambda: not trainers(cluster))
    reached = run.latest_checkpoint()
    assert reached is not None
    saved_step, steps = int(reached.name.removeprefix("step-")), len(events(run, "step"))
    assert saved_step == events(run, "step")[-1]["step"], "what came after the last checkpoint is lost"
    log = jobs("logs", "first").stdout
    assert f"go on with: tunesmith jobs submit {folder}/recipe.yaml" in log, log

    args = ["submit", "recipe.yaml", "--name", "second", "--follow", "--cluster", cluster.dashboard or ""]
    pipe = subprocess.PIPE
    with warm.start("jobs", *args, cwd=folder, stdout=pipe, stderr=pipe) as follower:
        wait_until(lambda: len(events(run, "step")) > steps)
        follower.send_signal(signal.SIGINT)
        out, errors = follower.communicate(timeout=60)
    name = out.strip()
    assert follower.returncode == 130 and f"{name} goes on in the cluster" in errors, errors
    assert f"tunesmith jobs logs {name} --cluster {cluster.dashboard} --follow" in errors
    assert events(run, "step")[steps]["step"] == saved_step + 1
    seen = len(events(run, "step"))
    wait_until(lambda: len(events(run, "step")) > seen)
    assert jobs("stop", "second").returncode == 0
    done = jobs("logs", "second", "--follow")
    assert done.returncode == 1 and f"error: {name} was stopped" in done.stderr


def trainers(cluster: RayCluster) -> list[int]:
    return [pid for pid in cluster.workers() if "RayTrainWorker" in title(pid)]


def test_a_job_that_fails_says_where_its_reason_is(tmp_path: Path, trainee: Path, jobs: Any) -> None:
    folder = tmp_path / "failing"
    recipe_in(folder, trainee)
    args = ["--name", "bad", "--set", "hardware.device=cuda", "--follow"]
    done = jobs("submit", folder / "recipe.yaml", *args, cwd=folder)
    assert done.returncode == 1, done.stderr
    assert "the Ray cluster has no GPU" in done.stderr and "failed: exit code 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert jobs("logs", "bad").returncode == 0

    done = jobs("stop", "bed-")
    assert done.returncode == 2 and "there is no job 'bed-'" in done.stderr
    assert "did you mean bad-" in done.stderr and "Traceback" not in done.stderr


def test_a_recipe_with_faults_is_refused_before_a_cluster_is_asked(tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "recipe.yaml"
    nowhere = f"http://127.0.0.1:{free_port()}"
    recipe.write_text("model: {path: m}\ndata: {sources: []}\ntrain: {lr: fast, epochs: -1}\n")
    done = cli("jobs", "submit", recipe, "--cluster", nowhere)
    assert done.returncode == 2 and all(key in done.stderr for key in ("data.sources", "train.lr", "epochs"))
    recipe.write_text("model: {path: ./none}\ndata: {sources: [{path: rows.jsonl}]}\n")
    done = cli("jobs", "submit", recipe, "--cluster", nowhere)
    assert done.returncode == 2 and "model.path: './none' does not exist" in done.stderr
    assert "data.sources.0.path: 'rows.jsonl' does not exist" in done.stderr


def test_an_address_without_a_cluster_is_said_once(cli: Cli) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for args in (["list"], ["logs", "x"], ["stop", "x"]):
        done = cli("jobs", *args, "--cluster", nowhere)
        assert done.returncode == 2 and f"error: {nowhere}: no Ray cluster answers there" in done.stderr
        assert "ray start --head" in done.stderr and "Traceback" not in done.stderr
