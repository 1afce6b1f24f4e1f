"""The docker command line: names of images, and the errors that everyone meets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.image.docker import check_reference, docker_version, failure


@pytest.mark.parametrize(
    "name",
    [
        "busybox", "tunesmith:train", "library/python:3.11-slim", "localhost:5000/a/b_c:1.0",
        "nvcr.io/nvidia/pytorch:25.10-py3", "nvidia/cuda:13.0.2-devel-ubuntu24.04",
        "python:3.11@sha256:" + "0" * 64, "sha256:" + "f" * 64,
    ],
)  # fmt: skip
def test_names_of_images(name: str) -> None:
    assert check_reference(name, "x") == name


@pytest.mark.parametrize(
    "name", ["", "-v", "a b", "a\nb", "team/Upper", "a:", "a:b:c", "a@sha256:1", "$(id)", "a/../b", "x" * 256]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--tag"):
        check_reference(name, "--tag")


def test_docker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="docker is not installed") as caught:
        docker_version()
    assert caught.value.hint == "tunesmith setup"


@pytest.mark.skipif(shutil.which("docker") is None, reason="not installed: docker")
def test_a_daemon_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(
        TunesmithError, match=f"no docker daemon answers at unix://{tmp_path}/none.sock"
    ) as caught:
        docker_version()
    assert caught.value.hint and "systemctl start docker" in caught.value.hint


@pytest.mark.parametrize(
    "said",
    [
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: Get",
        "Got permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
        "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock",
    ],
)
def test_a_user_outside_the_group(said: str) -> None:
    error = failure(["ps"], said, 1)
    assert "may not speak to the docker daemon" in error.what and "newgrp docker" in (error.hint or "")


def test_other_failures_keep_dockers_own_words() -> None:
    error = failure(["image", "rm"], "\n".join(f"line {i}" for i in range(20)), 3)
    assert "'docker image rm' ended with code 3" in error.what
    assert "line 19" in error.what and "line 5" not in error.what


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "tunesmith setup",
        ),
        (
            "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please update your driver",
            "tunesmith image build",
        ),
        (
            "nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown",
            "tunesmith doctor",
        ),
    ],
)
def test_containers_that_get_no_gpu(said: str, fix: str) -> None:
    error = failure(["run", "--gpus"], said, 125)
    assert fix in (error.hint or "") and said in error.what
