"""tunesmith image with a real daemon: built, checked, saved, loaded, and run as the caller."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.docker_daemon import python_version_in, wheels_for
from tests.image_registry import registry
from tunesmith.image.bases import own_base
from tunesmith.image.docker import failure
from tunesmith.image.lock import pinned, present_base, read_lock

pytestmark = pytest.mark.docker

NAME = "team/tunesmith:test"
UID = 1234
NGC_LIKE = "nvcr.io/nvidia/pytorch:25.03-py3"
# What an NGC image has: packages under the system's Python with pip's constraints for them.
NGC_DOCKERFILE = f"""\
FROM {NAME}
USER 0:0
RUN mkdir -p /usr/local/lib/python{{version}}/dist-packages /etc/pip \\
 && cp -r /opt/tunesmith/lib/python{{version}}/site-packages/. /usr/local/lib/python{{version}}/dist-packages/ \\
 && rm -rf /opt/tunesmith /usr/local/lib/python{{version}}/dist-packages/tunesmith*
COPY torch /usr/local/lib/python{{version}}/dist-packages/
RUN echo 'torch==2.7.0a0+test' > /etc/pip/constraint.txt && echo 'typer==0.1.0' >> /etc/pip/constraint.txt
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin PIP_CONSTRAINT=/etc/pip/constraint.txt
"""


def docker(*args: str | Path, check: bool = True) -> str:
    done = subprocess.run(["docker", *map(str, args)], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{args}: {done.stderr[-3000:]}"
    return done.stdout.strip() if check else done.stdout + done.stderr


@pytest.fixture(scope="module")
def daemon(docker_host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of this module's commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", docker_host)
        patch.setenv("DOCKER_CONFIG", str(tmp_path_factory.mktemp("docker-config")))
        yield dict(os.environ)


@pytest.fixture(scope="module")
def python_version(docker_host: str, python_image: str) -> str:
    return python_version_in(docker_host, python_image)


@pytest.fixture(scope="module")
def wheelhouse(python_version: str) -> Path:
    return wheels_for(python_version)


@pytest.fixture(scope="module")
def built(
    daemon: dict[str, str], python_image: str, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The answer of `tunesmith image build` for an image with the base install, on a local base, offline."""
    work = tmp_path_factory.mktemp("build")
    recipe = work / "recipe.yaml"
    recipe.write_text("model:\n  path: smollm2-135m-instruct\n")
    found = Cli().json(
        "image", "build", "--stage", "train", "--extras", "base", "--base", python_image, "--tag", NAME,
        "--user", f"{UID}:{UID}", "--wheelhouse", wheelhouse, "--network", "host", "--recipe", recipe,
        "--context", work / "context", cwd=work,
    )  # fmt: skip
    return {**found, "work": work, "recipe": recipe}


def test_the_image_names_what_it_was_made_from(built: dict[str, Any]) -> None:
    labels = json.loads(docker("image", "inspect", "-f", "{{json .Config.Labels}}", NAME))
    (image,) = built["built"]
    assert image["id"] == docker("image", "inspect", "-f", "{{.Id}}", NAME)
    assert labels == built["labels"]["train"] == image["labels"]
    assert labels["org.tunesmith.recipe"] == hashlib.sha256(built["recipe"].read_bytes()).hexdigest()
    assert len(labels["org.tunesmith.lock"]) == 64 and labels["org.tunesmith.version"]


def test_the_lock_knows_the_base_and_another_base_is_refused(
    built: dict[str, Any], python_image: str
) -> None:
    lock = built["work"] / "image.lock.json"
    held = json.loads(lock.read_text())
    assert held == {
        "images": {python_image: {"id": docker("image", "inspect", "-f", "{{.Id}}", python_image)}}
    }
    held["images"][python_image]["id"] = "sha256:" + "0" * 64
    other = built["work"] / "other.lock.json"
    other.write_text(json.dumps(held))
    args = ("image", "build", "--base", python_image, "--extras", "base", "--lock", other)
    done = Cli()(*args, cwd=built["work"])
    assert done.returncode == 2 and "another image" in done.stderr, done.stderr


def test_no_wheel_or_pin_is_in_a_layer(built: dict[str, Any]) -> None:
    assert "No such file" in docker("run", "--rm", "--network=host", NAME, "ls", "/build", check=False)


def test_files_in_a_mount_belong_to_the_caller(built: dict[str, Any], tmp_path: Path) -> None:
    os.chown(tmp_path, UID, UID)
    mount = f"{tmp_path}:/workspace/runs"
    script = "import getpass, pathlib; pathlib.Path('runs/x').write_text(getpass.getuser())"
    docker("run", "--rm", "--network=host", "-v", mount, NAME, "python3", "-c", script)
    written = tmp_path / "x"
    assert (written.stat().st_uid, written.stat().st_gid) == (UID, UID)
    assert written.read_text() == "tunesmith"


def test_tunesmith_runs_in_it(built: dict[str, Any]) -> None:
    assert docker("run", "--rm", "--network=host", NAME, "tunesmith", "--version").startswith("tunesmith ")


def test_check_says_what_is_there_and_leaves_no_container(built: dict[str, Any]) -> None:
    answer = Cli().json("image", "check", NAME)
    status = {item["id"]: item["status"] for item in answer["checks"]}  # type: ignore[attr-defined]
    assert answer["ok"] is True
    assert (status["threads"], status["tunesmith"], status["torch"], status["cuda"]) == (
        "ok",
        "ok",
        "missing",
        "skip",
    )
    assert docker("ps", "-aq") == ""


def test_check_finds_a_broken_extension(built: dict[str, Any], tmp_path: Path) -> None:
    """As flash-attn says it when it was compiled for another torch."""
    error = "ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')"
    (tmp_path / "flash_attn.py").write_text(f"raise {error}\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {NAME}\nCOPY flash_attn.py /extension/\nENV PYTHONPATH=/extension\n"
    )
    docker("build", "-t", "broken:1", tmp_path)
    done = Cli()("image", "check", "broken:1", "--json")
    assert done.returncode == 1
    (found,) = [item for item in json.loads(done.stdout)["checks"] if item["status"] == "fail"]
    assert found["id"] == "flash_attn" and "--no-build-isolation" in found["fix"]


def test_save_and_load_bring_the_same_image_back(built: dict[str, Any], tmp_path: Path) -> None:
    identity = docker("image", "inspect", "-f", "{{.Id}}", NAME)
    file = tmp_path / "image.tar"
    saved = Cli().json("image", "save", file, NAME)
    assert saved["images"] == {NAME: identity}
    subprocess.run(["sha256sum", "-c", "image.tar.sha256"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("image", "."))) == [
        "image.tar", "image.tar.sha256",
    ]  # fmt: skip
    whole = file.read_bytes()
    docker("tag", NAME, "kept:1")
    docker("rmi", NAME)
    file.write_bytes(whole[:-4096])
    done = Cli()("image", "load", file)
    assert done.returncode == 2 and "cut off or changed" in done.stderr
    assert NAME not in docker("images", "--format", "{{.Repository}}:{{.Tag}}")
    file.write_bytes(whole)
    assert Cli().json("image", "load", file)["images"] == {NAME: identity}
    assert docker("image", "inspect", "-f", "{{.Id}}", NAME) == identity


def test_packed_files_too(daemon: dict[str, str], busybox_image: str, tmp_path: Path) -> None:
    identity = docker("image", "inspect", "-f", "{{.Id}}", busybox_image)
    file = tmp_path / "deep" / "busybox.tar.gz"
    saved = Cli().json("image", "save", file, busybox_image)
    assert file.read_bytes()[:2] == b"\x1f\x8b" and saved["bytes"] == file.stat().st_size
    docker("rmi", busybox_image)
    assert Cli().json("image", "load", file)["images"] == {busybox_image: identity}


def test_an_image_that_is_not_here(daemon: dict[str, str], tmp_path: Path) -> None:
    for args in (("check", "none:1"), ("save", tmp_path / "x.tar", "none:1")):
        done = Cli()("image", *args)
        assert done.returncode == 2 and "this machine does not have it" in done.stderr
    assert not list(tmp_path.glob("*.tar*"))


def test_torch_of_an_ngc_base_is_not_replaced(
    built: dict[str, Any], python_version: str, tmp_path: Path
) -> None:
    """An image shaped like NVIDIA's: torch under the system's Python, pinned by /etc/pip/constraint.txt."""
    info = tmp_path / "torch" / "torch-2.7.0a0+test.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.7.0a0+test\n")
    (tmp_path / "torch" / "torch.py").write_text("__version__ = '2.7.0a0+test'\n")
    (tmp_path / "Dockerfile").write_text(NGC_DOCKERFILE.replace("{version}", python_version))
    docker("build", "--network", "host", "-t", NGC_LIKE, tmp_path)
    Cli().json(
        "image", "build", "--stage", "train", "--extras", "base", "--base", NGC_LIKE, "--tag", "ngc:1",
        "--wheelhouse", built["work"] / "context" / "build", "--network", "host", cwd=tmp_path,
    )  # fmt: skip
    code = "import torch, typer, tunesmith; print(torch.__file__, torch.__version__, tunesmith.__file__)"
    place, version, own = docker("run", "--rm", "--network=host", "ngc:1", "python3", "-c", code).split()
    assert place.startswith("/usr/local/lib") and version == "2.7.0a0+test"
    assert own.startswith("/opt/tunesmith")


def test_dry_run_prints_commands_and_asks_no_daemon(tmp_path: Path) -> None:
    env = {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    done = Cli()("image", "build", "--dry-run", "--family", "cpu", "--stage", "serve", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "docker build --target serve --tag tunesmith:serve ." in done.stdout
    done = Cli()("image", "build", "--family", "cpu", env=env, cwd=tmp_path)
    assert done.returncode == 1 and "no docker daemon answers" in done.stderr


def test_a_base_from_a_registry_is_pinned_by_its_digest(
    built: dict[str, Any], busybox_image: str, tmp_path: Path
) -> None:
    """The lock is written before the build, so that the first image says what the second one will say."""
    docker("save", "-o", tmp_path / "base.tar", busybox_image)
    lock = tmp_path / "image.lock.json"
    wheels = built["work"] / "context" / "build"
    args = ("image", "build", "--stage", "train", "--extras", "base", "--wheelhouse", wheels)
    with registry(tmp_path / "base.tar") as (host, digest):
        name = f"{host}/team/base:1"
        # busybox has no Python: the build fails after its first steps, with the base brought and written down.
        done = Cli()(
            *args, "--base", name, "--context", tmp_path / "context", "--network", "host", cwd=tmp_path
        )
        assert done.returncode == 1 and "docker build" in done.stderr
        identity = docker("image", "inspect", "-f", "{{.Id}}", f"{name}@{digest}")
        assert json.loads(lock.read_text()) == {"images": {name: {"digest": digest, "id": identity}}}
        assert f"FROM {name}@{digest} AS base" in (tmp_path / "context" / "Dockerfile").read_text()
        shown = Cli().json("image", "show", "--base", name, cwd=tmp_path)
        assert shown["base"]["digest"] == digest  # type: ignore[index]
        other = tmp_path / "other.lock.json"
        other.write_text(json.dumps({"images": {name: {"digest": "sha256:" + "0" * 64}}}))
        done = Cli()("image", "build", "--base", name, "--lock", other, cwd=tmp_path)
        assert done.returncode == 1 and "not on this machine" in done.stderr


def test_a_pinned_base_that_was_loaded_from_a_file_is_known_by_its_id(
    daemon: dict[str, str], busybox_image: str, tmp_path: Path
) -> None:
    """A loaded image has no digest; FROM with the digest would ask the network."""
    identity = docker("image", "inspect", "-f", "{{.Id}}", busybox_image)
    entry = {"digest": "sha256:" + "0" * 64, "id": identity}
    lock = tmp_path / "image.lock.json"
    lock.write_text(json.dumps({"images": {busybox_image: entry}}))
    base = pinned(own_base(busybox_image), read_lock(lock))
    assert base.digest and present_base(base, lock).reference == busybox_image


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    daemon: dict[str, str], busybox_image: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        done = Cli()("image", "save", disk / "busybox.tar", busybox_image)
        assert done.returncode == 2 and "the disk has 1.0 MiB free" in done.stderr, done.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_user_who_may_not_use_the_socket_is_told_of_the_group(daemon: dict[str, str]) -> None:
    """In the words of the client that is installed here."""
    done = subprocess.run(
        ["docker", "ps"], capture_output=True, text=True, user=65534, group=65534, extra_groups=[]
    )
    assert done.returncode != 0
    assert "newgrp docker" in (failure(["ps"], done.stderr, done.returncode).hint or ""), done.stderr
