"""tunesmith doctor as a user runs it: here, on a recorded host, and on another one over ssh."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests import imports
from tests.conftest import ROOT, Cli

FACTS = ROOT / "tests" / "facts"
KEYS = ["id", "title", "status", "found", "why", "fix"]


def test_this_host(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json", "--record", tmp_path / "facts.json")
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stderr
    found = json.loads(lines[0])
    assert list(found) == ["ok", "checks"] and [list(check) for check in found["checks"]] == [KEYS] * 20
    failed = [check["id"] for check in found["checks"] if check["status"] == "fail"]
    assert found["ok"] is (not failed)
    assert done.returncode == (1 if failed else 0)
    again = cli("doctor", "--json", "--facts", tmp_path / "facts.json")
    assert json.loads(again.stdout) == found and again.returncode == done.returncode


def test_a_recording_serves_setup_too(cli: Cli, tmp_path: Path) -> None:
    from tunesmith.host.steps import NEEDED_COMMANDS

    cli("doctor", "--record", tmp_path / "facts.json")
    recorded = json.loads((tmp_path / "facts.json").read_text())
    assert set(recorded) == {"commands", "files", "env"}
    assert "id -un" in NEEDED_COMMANDS and recorded["commands"]["id -un"]["rc"] == 0


@pytest.mark.parametrize(
    ("name", "code"), [("ubuntu2204-3090-healthy", 0), ("ubuntu2204-small-shm", 0), ("rocky9-nouveau", 1)]
)
def test_recorded_hosts(cli: Cli, name: str, code: int) -> None:
    done = cli("doctor", "--facts", FACTS / f"{name}.json", "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["ok"] is (code == 0)


def test_the_text_for_people(cli: Cli) -> None:
    done = cli("doctor", "--facts", FACTS / "rocky9-nouveau.json", env={"COLUMNS": "80"})
    text = done.stdout
    assert "\x1b" not in text
    assert "Rocky Linux 9.4" in text and "nouveau holds the card" in text
    assert re.search(r"(?m)^fail  NVIDIA driver: ", text)
    assert re.search(r"(?m)^ +dnf module install nvidia-driver:latest-dkms$", text)
    assert "why" not in text and text.count("fix:") == 1
    # Only commands, which are there to be copied, may be longer than the line.
    prose = text[: text.index("fix:")] + text[text.index("reboot") :]
    assert max(map(len, prose.splitlines())) <= 80
    healthy = cli("doctor", "--facts", FACTS / "ubuntu2204-3090-healthy.json").stdout
    assert "fix:" not in healthy and "20 ok" in healthy


def test_a_host_without_gpu_is_told_once(cli: Cli) -> None:
    done = cli("doctor", "--facts", FACTS / "debian12-cpu-healthy.json", env={"COLUMNS": "80"})
    assert done.returncode == 0
    assert done.stdout.count("no NVIDIA GPU") == 1
    skipped = done.stdout[done.stdout.index("skip") :]
    assert all(name in skipped for name in ("driver-library", "driver-cuda", "docker-gpu", "docker-cgroup"))


def test_wrong_input_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('{"commands": {"x": {"rc": "zero"}}}')
    done = cli("doctor", "--facts", tmp_path / "facts.json", "--json")
    assert done.returncode == 2 and "rc: 'zero' is not a whole number" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "UserError"
    for args in (
        ["--facts", "nowhere.json"],
        ["--target", "a b"],
        ["--facts", "x.json", "--target", "me@host"],
    ):
        done = cli("doctor", *args, cwd=tmp_path)
        assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_another_host_over_ssh(cli: Cli, ssh_server: tuple[str, Path], tmp_path: Path) -> None:
    target, key = ssh_server
    home = {"HOME": str(tmp_path), "SSH_AUTH_SOCK": ""}
    path = tmp_path / "facts.json"
    done = cli("doctor", "--target", target, "--ssh-key", key, "--json", "--record", path, env=home)
    assert done.stdout, done.stderr
    there = {check["id"]: check for check in json.loads(done.stdout)["checks"]}
    here = {check["id"]: check for check in json.loads(cli("doctor", "--json").stdout)["checks"]}
    assert {i: c["status"] for i, c in there.items()} == {i: c["status"] for i, c in here.items()}
    assert there["cpu"]["found"] == here["cpu"]["found"]
    recorded = json.loads(path.read_text())
    assert recorded["files"]["/etc/os-release"].strip() == Path("/etc/os-release").read_text().strip()
    assert recorded["commands"]["uname -m"]["stdout"].strip() == os.uname().machine


@pytest.mark.docker
def test_a_real_docker(cli: Cli, use_docker: str, busybox_image: str, tmp_path: Path) -> None:
    """Every question is understood by a real docker: an image, its commit, a container and its log."""

    def docker(*args: str) -> None:
        done = subprocess.run(["docker", *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    script = "echo 'ERROR: Unexpected bus error: insufficient shared memory (shm)'; echo diary; sleep 600"
    docker("run", "-d", "--network=host", "--name=doctored", busybox_image, "sh", "-c", script)
    docker("commit", "doctored", "by-hand:1")
    path = tmp_path / "facts.json"
    try:
        done = cli("doctor", "--json", "--record", path, env={"PWD": str(tmp_path)})
    finally:
        docker("rm", "-f", "doctored")
        docker("rmi", "by-hand:1")
    checks = {check["id"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["docker"]["status"] == checks["docker-version"]["status"] == "ok", checks["docker"]
    assert checks["docker-network"]["status"] == checks["docker-snap"]["status"] == "ok"
    assert checks["docker-shm"]["status"] == "warn" and "doctored" in checks["docker-shm"]["found"]
    assert checks["image-recipe"]["status"] == "warn"
    assert checks["image-recipe"]["found"] == "no build recipe: by-hand:1"
    recorded = json.loads(path.read_text())["commands"]
    assert recorded["docker logs --tail 400 doctored"]["stdout"].count("\n") == 1
    shm = "docker inspect -f '{{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}}' doctored"
    assert recorded[shm]["stdout"] == "67108864 private\n"
    root = recorded["docker info -f '{{.DockerRootDir}}'"]["stdout"].strip()
    assert f"df -PB1 {root}" in recorded
    assert recorded["docker info -f '{{.CgroupDriver}}'"]["stdout"].strip() in ("cgroupfs", "systemd")


def test_a_host_that_does_not_answer(cli: Cli, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = cli("doctor", "--target", f"me@127.0.0.1:{port}", env={"HOME": str(tmp_path)})
    assert done.returncode == 1 and f"me@127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr and "hint: " in done.stderr


def test_it_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    cli("doctor", cwd=home, env={"HOME": str(home), "TUNESMITH_CACHE": str(home / "cache")})
    assert list(home.iterdir()) == []


def test_it_loads_no_heavy_package() -> None:
    heavy = {"torch", "transformers", "numpy", "pyinfra", "gevent", "paramiko", "huggingface_hub", "httpx"}
    imports.without(heavy, "doctor", "--json", codes=(0, 1))
