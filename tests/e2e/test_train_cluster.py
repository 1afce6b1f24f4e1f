"""`tunesmith train --cluster` on hosts with their own addresses, links and ssh servers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster_hosts import ClusterHost, two_hosts
from tests.conftest import Cli
from tests.e2e.train_helpers import Training, write_recipe
from tunesmith.core.events import read_events
from tunesmith.core.run_folder import RunFolder
from tunesmith.train.metrics import loss_curve

__all__ = ["two_hosts"]
pytestmark = [pytest.mark.slow, pytest.mark.hosts]

STEPS = 60


def write_cluster(path: Path, given: list[ClusterHost], folder: Path, **fields: Any) -> Path:
    env = {"TUNESMITH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    values: dict[str, Any] = {"hosts": [host.entry for host in given], "shared": str(folder), "env": env}
    values |= fields
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    return path


def recipe_in(folder: Path, model: Path, **train: Any) -> Path:
    folder.mkdir()
    return write_recipe(
        folder,
        model,
        method={"type": "full"},
        train={"max_steps": STEPS, "grad_accumulation": 2, "save_every": 2, "lr": 1e-3} | train,
        eval={"every": 100},
    )


def test_a_run_that_is_stopped_then_cut_goes_on_exactly(
    tmp_path: Path, trainee: Path, two_hosts: list[ClusterHost]
) -> None:
    """Two hosts until Ctrl-C, then two hosts until the cable of one is pulled, then one host."""
    alone = recipe_in(tmp_path / "alone", trainee)
    code, _, errors = Training(alone).end()
    assert code == 0, errors
    recipe = recipe_in(tmp_path / "two", trainee)
    run = RunFolder(recipe.parent / "runs" / "run")
    cluster = write_cluster(tmp_path / "cluster.yaml", two_hosts, tmp_path)

    training = Training(recipe, "--cluster", str(cluster))
    training.wait_for(lambda: training.new_events("step") >= 4)
    training.process.send_signal(signal.SIGINT)
    code, _, errors = training.end()
    assert code == 130 and f"go on with: tunesmith train {recipe} --cluster {cluster}" in errors, errors

    training = Training(recipe, "--cluster", str(cluster))
    training.wait_for(lambda: training.new_events("step") >= 4)
    two_hosts[1].cut()
    try:
        code, _, errors = training.end()
    finally:
        two_hosts[1].heal()
    assert code == 4 and f"error: root@{two_hosts[1].address}: its connection broke" in errors, errors
    assert [event["processes"] for event in read_events(run.events, "start")] == [2, 2]
    reached = len(loss_curve(run.events))
    assert 8 <= reached < STEPS

    write_cluster(cluster, two_hosts[:1], tmp_path)
    code, _, errors = Training(recipe, "--cluster", str(cluster)).end()
    assert code == 0 and "resuming" in errors, errors
    found, wanted = loss_curve(run.events), loss_curve(alone.parent / "runs" / "run" / "events.jsonl")
    assert len(wanted) == STEPS and found == pytest.approx(wanted, abs=1e-5)


def test_a_rank_that_is_killed_is_named_with_its_host(
    tmp_path: Path, trainee: Path, two_hosts: list[ClusterHost]
) -> None:
    recipe = recipe_in(tmp_path / "two", trainee)
    cluster = write_cluster(tmp_path / "cluster.yaml", two_hosts, tmp_path)
    training = Training(recipe, "--cluster", str(cluster))
    training.wait_for(lambda: training.new_events("step") >= 2)
    victim = next(pid for pid in two_hosts[1].processes() if is_rank(pid))
    signal.pidfd_send_signal(os.pidfd_open(victim), signal.SIGKILL)
    code, _, errors = training.end()
    told = f"error: root@{two_hosts[1].address}: rank 1 (process {victim}) was killed by SIGKILL"
    assert code == 4 and told in errors and "Traceback" not in errors, errors
    assert not any(is_rank(pid) for host in two_hosts for pid in host.processes())


def is_rank(pid: int) -> bool:
    """Whether it is a process of the training itself, not torchrun, whose arguments name the training too."""
    try:
        args = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"-m\0tunesmith\0train" in args and b"tunesmith.cluster.torchrun" not in args
    except OSError:
        return False


def test_each_thing_that_is_wrong_with_a_host_is_said_before_anything_runs(
    tmp_path: Path, trainee: Path, two_hosts: list[ClusterHost], cli: Cli
) -> None:
    recipe = recipe_in(tmp_path / "two", trainee)
    other = tmp_path / "other"
    (other / "torch-0.1.dist-info").mkdir(parents=True)
    (other / "torch-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n"
    )
    program = other / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={other} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    wrong_key = tmp_path / "wrong"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", wrong_key], check=True)
    good, second = two_hosts[0].entry, two_hosts[1].entry
    cases: dict[str, dict[str, Any]] = {
        "ssh is refused: ": {"hosts": [good, second | {"key": str(wrong_key)}]},
        "ssh cannot reach it: ": {"hosts": [good, second | {"port": 2}]},
        "has no tunesmith": {"hosts": [good, second | {"python": "/usr/bin/python3"}]},
        "/opt/none/python is not there": {"hosts": [good, second | {"python": "/opt/none/python"}]},
        "torch 0.1, not ": {"hosts": [good, second | {"python": str(program)}]},
        f"the folder {tmp_path}/none is not there": {"shared": f"{tmp_path}/none"},
    }
    for told, fields in cases.items():
        cluster = write_cluster(tmp_path / "cluster.yaml", two_hosts, tmp_path, **fields)
        done = cli("train", recipe, "--cluster", cluster)
        assert done.returncode == 2 and told in done.stderr and "hint: " in done.stderr, (told, done.stderr)
        assert f"root@{two_hosts[1].address}" in done.stderr and "Traceback" not in done.stderr
    assert not (recipe.parent / "runs").exists()


def test_a_dry_run_prints_one_line_for_each_host(
    tmp_path: Path, trainee: Path, two_hosts: list[ClusterHost], cli: Cli
) -> None:
    recipe = recipe_in(tmp_path / "two", trainee)
    cluster = write_cluster(tmp_path / "cluster.yaml", two_hosts, tmp_path)
    done = cli("train", recipe, "--cluster", cluster, "--dry-run")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 and {line[0] for line in lines} == {"ssh"}
    assert [host.address in line for host, line in zip(two_hosts, lines, strict=True)] == [True, True]
    commands = cli.json("train", recipe, "--cluster", cluster, "--dry-run")["commands"]
    assert isinstance(commands, dict) and list(commands.values()) == lines
    assert not (recipe.parent / "runs").exists() and not (tmp_path / ".tunesmith").exists()
