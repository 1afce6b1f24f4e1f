"""up, ps, logs, shell and down against a real daemon, through the compose that this machine has."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docker_daemon import python_version_in, remove_containers, wheels_for

pytestmark = pytest.mark.docker
UID = 12345


@dataclass(frozen=True)
class Site:
    """A folder that `tunesmith` is called in, with the daemon of the tests."""

    folder: Path
    host: str

    def call(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tunesmith", *map(str, args)],
            cwd=self.folder,
            env=os.environ | {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.folder)} | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def docker(self, *args: str) -> str:
        return subprocess.run(
            ["docker", "-H", self.host, *args], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    @property
    def compose_file(self) -> Path:
        return self.folder / ".tunesmith" / "compose.yaml"

    def everything(self) -> tuple[list[str], ...]:
        """All containers, networks and volumes that the daemon has."""
        return tuple(
            sorted(self.docker(*args).split())
            for args in (("ps", "-aq"), ("network", "ls", "-q"), ("volume", "ls", "-q"))
        )


@pytest.fixture
def site(tmp_path: Path, docker_host: str) -> Any:
    yield Site(tmp_path, docker_host)
    remove_containers(docker_host)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def lab_image(docker_host: str, python_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with JupyterLab, built by `tunesmith image build` from wheels."""
    work, name = tmp_path_factory.mktemp("build"), "tunesmith-test:lab"
    wheels = wheels_for(python_version_in(docker_host, python_image), "host")
    done = Site(work, docker_host).call(
        "image", "build", "--stage", "train", "--extras", "host", "--base", python_image, "--tag", name,
        "--user", f"{UID}:{UID}", "--wheelhouse", wheels, "--network", "host", "--context", work / "context",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return name


def wait_for_restart(site: Site, container: str) -> None:
    end = time.monotonic() + 30
    while site.docker("inspect", "-f", "{{.RestartCount}} {{.State.Status}}", container).split() != [
        "1",
        "running",
    ]:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_lab_from_up_to_down(site: Site, python_image: str, lab_image: str) -> None:
    before, port = site.everything(), free_port()
    options = ("--image", python_image, "--host-network", "--lab-port", port, "--user", f"{UID}:{UID}")

    # 1. The image has no JupyterLab: the service dies, which is told with its own words, and nothing restarts.
    done = site.call("up", "lab", *options)
    assert done.returncode == 1, done.stderr
    assert "No module named jupyterlab" in done.stderr, done.stderr
    assert re.search("the service lab (ends again and again|ended with code 1)", done.stderr), done.stderr
    assert site.docker("ps", "-q") == ""

    # 2. A compose file that was changed by hand is used as it is.
    changed = site.compose_file.read_text().replace(python_image, lab_image)
    site.compose_file.write_text(changed)
    done = site.call("up", "--json")
    assert done.returncode == 0, done.stderr
    assert "as it is" in done.stderr and site.compose_file.read_text() == changed
    found = json.loads(done.stdout)
    token = (site.folder / ".tunesmith/secrets/lab_token").read_text()

    # 3. JupyterLab answers with the token, on 127.0.0.1 alone, and refuses without it.
    base = f"http://127.0.0.1:{port}"
    assert found["lab_url"] == f"{base}/lab/tree/notebooks/quickstart.ipynb?token={token}"
    with httpx.Client(base_url=base) as stranger:
        assert stranger.get("/api/contents").status_code == 403
        assert stranger.get("/lab").status_code == 302
        assert stranger.get("/api/contents?token=wrong").status_code == 403
    assert httpx.get(found["lab_url"], follow_redirects=True).status_code == 200
    notebook = httpx.get(
        f"{base}/api/contents/notebooks/quickstart.ipynb", headers={"Authorization": f"token {token}"}
    )
    assert notebook.json()["content"]["cells"]

    # 4. What is written in a mount belongs to the caller; so do the folders, and the secret is theirs alone.
    done = site.call("shell", "lab", "--", "sh", "-c", "echo row > data/new.txt; id -u")
    assert done.returncode == 0 and done.stdout.strip() == str(UID), done.stderr
    for name in (
        "data/new.txt",
        "data",
        "runs",
        "notebooks/quickstart.ipynb",
        ".tunesmith/secrets/lab_token",
    ):
        assert (site.folder / name).stat().st_uid == UID, name
    assert (site.folder / ".tunesmith/secrets/lab_token").stat().st_mode & 0o777 == 0o600
    assert (site.folder / ".tunesmith/secrets").stat().st_mode & 0o777 == 0o700

    # 5. ps, logs and shell tell what there is; the token is in neither the log nor the container's settings.
    services = json.loads(site.call("ps", "--json").stdout)["services"]
    assert [(s["service"], s["status"], s["health"], s["url"]) for s in services] == [
        ("lab", "running", "healthy", base)
    ]
    log = site.call("logs", "lab")
    assert log.returncode == 0 and "Jupyter Server" in log.stdout
    assert token not in log.stdout + site.docker("inspect", services[0]["id"]) + changed
    assert site.call("shell", "--", "sh", "-c", "exit 7").returncode == 7
    assert site.call("shell", "train").returncode == 2

    # 6. An option that would change the kept service is refused; the same call again starts nothing new.
    refused = site.call("up", "lab", "--lab-port", "9999")
    assert refused.returncode == 2 and "--render" in refused.stderr
    site.call("shell", "lab", "--", "sh", "-c", "kill 1")
    wait_for_restart(site, services[0]["id"])  # once, some time ago: that is no reason to stop it
    again = site.call("lab", "--container", "--port", "0", "--json")
    assert json.loads(again.stdout)["services"][0]["id"] == services[0]["id"], again.stderr

    # 7. down leaves nothing but what is in the mounts, and the compose file.
    done = site.call("down", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == {"containers": 1, "networks": 0, "secrets": 1}
    assert site.everything() == before
    assert not (site.folder / ".tunesmith/secrets").exists()
    assert (site.folder / "data/new.txt").read_text() == "row\n"
    assert site.compose_file.read_text() == changed
    assert site.call("down").stdout == "nothing was there\n"


def test_train_that_fails_and_down_with_a_broken_file(site: Site, busybox_image: str) -> None:
    before = site.everything()
    (site.folder / "recipe.yaml").write_text("name: x\n")
    options = ("--recipe", "recipe.yaml", "--image", busybox_image, "--host-network")
    assert site.call("up", "train", *options).returncode == 1  # the image has no tunesmith
    text = site.compose_file.read_text()
    failing = "    command: [sh, -c, 'echo no rows at all; exit 3']\n"
    site.compose_file.write_text(re.sub(r"    command:\n(      - .*\n)+", failing, text))
    done = site.call("up", "train")
    assert done.returncode == 1 and "ended with code 3" in done.stderr and "no rows at all" in done.stderr

    ends_well = site.compose_file.read_text().replace("exit 3", "exit 0")
    site.compose_file.write_text(ends_well)
    done = site.call("up", "train")
    assert done.returncode == 0 and done.stdout.startswith("train     exited"), done.stderr

    site.compose_file.write_text("services: {train: {no-such-key: 1}}\n")
    done = site.call("down")
    assert done.returncode == 0 and "1 container" in done.stdout, done.stderr
    assert site.everything() == before


def test_no_daemon_and_no_image(site: Site) -> None:
    done = site.call("up", "lab", "--host-network", "--lab-port", "0")
    assert (
        done.returncode == 2 and "tunesmith:train" in done.stderr and "tunesmith image build" in done.stderr
    )
    assert not site.compose_file.exists()
    nowhere = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = site.call("up", "lab", env=nowhere)
    assert done.returncode == 1 and "no docker daemon answers" in done.stderr
    assert site.call("ps", env=nowhere).returncode == 1
