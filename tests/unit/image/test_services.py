"""What each container runs, sees and offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.image.services import Options, Service, make_services, shm_size_gib

HOME = Path("/home/ada/shop")


def options(**given: Any) -> Options:
    values: dict[str, Any] = {
        "images": {"lab": "img:lab", "train": "img:train", "serve": "img:serve"},
        "models": Path("/home/ada/.cache/tunesmith"),
        "data": HOME / "data",
        "runs": HOME / "runs",
        "notebooks": HOME / "notebooks",
        "secrets": HOME / ".tunesmith/secrets",
        "home": HOME / ".tunesmith/home",
        "uid": 1000,
        "gid": 1000,
        "memory_bytes": 125 * GIB,
    }
    return Options(**values | given)


def one(name: str, **given: Any) -> Service:
    return make_services([name], options(**given))[0]


@pytest.mark.parametrize(
    ("memory_gib", "shm"), [(0.5, 1), (2, 1), (7.9, 1), (8, 2), (125, 31), (128, 32), (256, 64), (2048, 64)]
)
def test_shared_memory_is_a_quarter_of_the_hosts(memory_gib: float, shm: int) -> None:
    assert shm_size_gib(int(memory_gib * GIB)) == shm
    assert options(memory_bytes=int(memory_gib * GIB)).shm == shm
    assert options(memory_bytes=int(memory_gib * GIB), shm_gib=7).shm == 7


def test_the_order_is_fixed_and_names_are_known() -> None:
    made = make_services(["serve", "lab"], options(run="smollm2"))
    assert [service.name for service in made] == ["lab", "serve"]
    with pytest.raises(UserError, match="'labs' is not a service"):
        make_services(["labs"], options())


def test_lab_listens_inside_and_is_published_on_loopback() -> None:
    lab = one("lab", lab_port=9000)
    assert "--ServerApp.ip=0.0.0.0" in lab.command and "--ServerApp.port=8888" in lab.command
    assert lab.port is not None and (lab.port.bind, lab.port.host, lab.port.container) == (
        "127.0.0.1",
        9000,
        8888,
    )
    assert lab.health is not None and (lab.health.path, lab.health.port) == ("/api", 8888)
    assert lab.environment["JUPYTER_TOKEN_FILE"] == "/run/secrets/lab_token"
    assert not any("token" in part.lower() or part == "--allow-root" for part in lab.command)


def test_on_the_hosts_network_the_program_itself_binds_loopback() -> None:
    lab, serve = make_services(
        ["lab", "serve"], options(host_network=True, run="m", lab_port=9, serve_port=10)
    )
    assert "--ServerApp.ip=127.0.0.1" in lab.command and "--ServerApp.port=9" in lab.command
    assert serve.command[-6:-2] == ("--host", "127.0.0.1", "--port", "10")
    assert lab.port is None and serve.port is None


def test_root_and_passwords_in_the_lab() -> None:
    assert "--allow-root" in one("lab", uid=0).command
    with_password = one("lab", lab_password=True)
    assert "--config=/run/secrets/lab_password.json" in with_password.command
    assert [secret.name for secret in with_password.secrets] == ["lab_token", "lab_password.json"]


def test_the_recipe_in_a_mount_is_seen_there_and_another_is_mounted_read_only() -> None:
    inside = one("train", recipe=HOME / "data" / "r.yaml")
    assert inside.command == ("tunesmith", "train", "/workspace/data/r.yaml")
    outside = one("train", recipe=HOME / "r.yaml")
    assert outside.command[-1] == "/workspace/r.yaml"
    mount = outside.mounts[-1]
    assert (mount.source, mount.target, mount.read_only) == (
        HOME / "r.yaml",
        PurePosixPath("/workspace/r.yaml"),
        True,
    )
    assert len(inside.mounts) == len(outside.mounts) - 1
    assert outside.restart == "no" and outside.grace_s >= 60  # time for a checkpoint
    with pytest.raises(UserError, match="train has no recipe"):
        one("train")


def test_serve_takes_a_run_in_the_mount_another_folder_or_a_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "orders"
    run.mkdir(parents=True)
    inside = one("serve", run=str(run), runs=tmp_path / "runs")
    assert inside.command[2] == "/workspace/runs/orders" and inside.mounts[-1].name == "models"
    outside = one("serve", run=str(run))
    assert outside.command[2] == "/workspace/served/orders" and outside.mounts[-1].read_only
    named = one("serve", run="owner/model")
    assert named.command[2] == "owner/model"
    assert named.command[-2:] == ("--api-key-file", "/run/secrets/api_key")
    assert named.health is not None and named.health.path == "/ready"
    with pytest.raises(UserError, match="serve has no model"):
        one("serve")


def test_every_service_has_the_folders_where_a_recipe_looks_for_them() -> None:
    for service in make_services(["lab", "train", "serve"], options(recipe=HOME / "r.yaml", run="m")):
        places = {mount.name: str(mount.target) for mount in service.mounts}
        assert places["data"] == "/workspace/data" and places["runs"] == "/workspace/runs"
        assert service.environment["TUNESMITH_CACHE"] == places["models"] == "/workspace/models"
        assert service.environment["HOME"] not in ("", "/")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_are_ports(port: int) -> None:
    with pytest.raises(UserError, match="not a TCP port"):
        replace(options(), serve_port=port)
