"""The compose file: what a person reads, and what both generations of compose make of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.unit.image.test_services import HOME, options
from tunesmith.core.errors import UserError
from tunesmith.image.compose import add_services, compose_yaml, read_compose, same_service, written_services
from tunesmith.image.services import Options, make_services

BASE = HOME / ".tunesmith"
EVERY = ["lab", "train", "serve"]


def text_of(names: list[str], **given: Any) -> str:
    made = everything(**given)
    return compose_yaml(make_services(names, made), made, base=BASE)


def everything(**given: Any) -> Options:
    return options(**{"recipe": HOME / "r.yaml", "run": "m"} | given)


def parsed(text: str) -> dict[str, Any]:
    return dict(YAML(typ="safe", pure=True).load(text)["services"])


def test_nothing_secret_is_in_the_file() -> None:
    text = text_of(EVERY, lab_password=True)
    services = parsed(text)
    assert services["lab"]["secrets"] == ["lab_token", "lab_password.json"]
    assert services["serve"]["secrets"] == ["api_key"]
    assert "./secrets/lab_token" in text
    for service in services.values():
        for name, value in service["environment"].items():
            assert value is None or not any(word in name for word in ("KEY", "PASSWORD")), name
            assert "TOKEN" not in name or value.startswith("/run/secrets/"), name


def test_files_belong_to_the_caller_and_privileges_cannot_grow() -> None:
    for service in parsed(text_of(EVERY)).values():
        assert service["user"] == "1000:1000" and service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and service["init"] is True


def test_ports_are_published_on_loopback_unless_told_otherwise() -> None:
    services = parsed(text_of(EVERY))
    assert services["lab"]["ports"] == ["127.0.0.1:8888:8888"]
    assert services["serve"]["ports"] == ["127.0.0.1:8000:8000"] and "ports" not in services["train"]
    assert parsed(text_of(["lab"], bind="::1"))["lab"]["ports"] == ["[::1]:8888:8888"]
    host = parsed(text_of(EVERY, host_network=True))
    assert all(s["network_mode"] == "host" and "ports" not in s for s in host.values())


def test_shared_memory_and_limits() -> None:
    own = parsed(text_of(["train"], gpus="nvidia"))["train"]
    assert (own["ipc"], own["shm_size"]) == ("private", "31g")
    assert own["ulimits"] == {"memlock": -1, "stack": 67108864}
    hosts = parsed(text_of(["train"], ipc="host"))["train"]
    assert hosts["ipc"] == "host" and "shm_size" not in hosts and hosts["ulimits"] == {"stack": 67108864}


@pytest.mark.parametrize(
    ("gpus", "device"),
    [
        ("cdi", {"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"], "capabilities": ["gpu"]}),
        ("nvidia", {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}),
    ],
)
def test_gpus(gpus: str, device: dict[str, Any]) -> None:
    for service in parsed(text_of(EVERY, gpus=gpus)).values():
        assert service["deploy"]["resources"]["reservations"]["devices"] == [device]


def test_no_gpus_on_a_cpu_host() -> None:
    text = text_of(EVERY)
    assert "gpu" not in text and "deploy" not in text


def test_selinux_relabels_the_mounts() -> None:
    volumes = parsed(text_of(["train"], selinux=True))["train"]["volumes"]
    assert volumes[0] == "../data:/workspace/data:z" and volumes[-1] == "../r.yaml:/workspace/r.yaml:ro,z"


def test_paths_are_relative_where_the_project_could_be_moved() -> None:
    volumes = parsed(text_of(["lab"]))["lab"]["volumes"]
    assert "../notebooks:/workspace/notebooks" in volumes and "./home:/workspace/.home" in volumes
    assert "/home/ada/.cache/tunesmith:/workspace/models" in volumes


def test_names_that_compose_would_misread() -> None:
    services = parsed(text_of(["train"], recipe=HOME / "a$b.yaml"))
    assert services["train"]["command"][-1] == "/workspace/a$$b.yaml"
    with pytest.raises(UserError, match="path with a colon"):
        text_of(["lab"], notebooks=HOME / "a:b")


def test_a_service_is_added_and_the_rest_kept_to_the_letter() -> None:
    first = text_of(["lab"]).replace("127.0.0.1:8888", "127.0.0.1:9999")
    first = first.replace("    restart: ", "    # changed by hand\n    restart: ")
    made = everything()
    both = add_services(first, make_services(["serve"], made), made, base=BASE)
    lab_block = first[first.index("  lab:") : first.index("secrets:\n  lab_token")]
    assert lab_block in both
    assert list(parsed(both)) == ["lab", "serve"]
    assert "api_key:" in both and both.count("lab_token:\n") == 1


def test_writing_a_service_anew_changes_it_alone() -> None:
    made = everything()
    text = text_of(EVERY)
    again = add_services(text, make_services(["train"], made), made, base=BASE)
    assert again == text
    other = everything(shm_gib=5)
    changed = parsed(add_services(text, make_services(["train"], other), other, base=BASE))
    assert changed["train"]["shm_size"] == "5g" and changed["lab"]["shm_size"] == "31g"


def test_same_service_sees_values_and_not_comments() -> None:
    made = everything()
    lab = make_services(["lab"], made)[0]
    text = text_of(EVERY)
    assert same_service(text.replace("    restart: ", "    # note\n    restart: "), lab, made, base=BASE)
    assert not same_service(text.replace("unless-stopped", "always"), lab, made, base=BASE)
    assert not same_service(text_of(["train"]), lab, made, base=BASE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("services: [", "line 1"),
        ("a: 1\n", "has no services"),
        ("- 1\n", "has no services"),
        ("services:\n  lab: {}\n lab: 1\n", "line 3"),
    ],
)
def test_files_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_compose(text, "compose.yaml")


def test_a_file_written_by_hand_is_understood(tmp_path: Path) -> None:
    text = """\
services:
  lab:
    image: mine
    user: "7:8"
    volumes:
      - ./a:/a
      - ../b:/b:ro,z
      - kept:/kept
      - {type: bind, source: /c, target: /c, read_only: true}
    secrets: [t, external]
  other: {image: x, user: ada}
  bare:
secrets:
  t: {file: ./secrets/t}
  external: {external: true}
"""
    found = written_services(text, tmp_path / "p" / "compose.yaml")
    lab = found["lab"]
    assert lab.user == (7, 8) and lab.image == "mine"
    assert lab.mounts == [(tmp_path / "p/a", False), (tmp_path / "b", True), (Path("/c"), True)]
    assert lab.secrets == {"t": tmp_path / "p/secrets/t"}
    assert found["other"].user is None and found["bare"].image == ""


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_docker_compose_reads_what_was_meant(tmp_path: Path) -> None:
    """Debian's 1.29 reads YAML 1.1 and has a schema of its own: a restart of `no` or a user 1000:50 must last."""
    text = text_of(EVERY, uid=1000, gid=50, gpus="cdi", recipe=HOME / "a$b.yaml", selinux=True)
    folder = tmp_path / ".tunesmith"
    (folder / "secrets").mkdir(parents=True)
    for name in ("lab_token", "api_key"):
        (folder / "secrets" / name).touch()
    (folder / "compose.yaml").write_text(text)
    done = subprocess.run(
        ["docker-compose", "-f", "compose.yaml", "config"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    read = YAML(typ="safe", pure=True).load(done.stdout)["services"]
    assert read["train"]["restart"] == "no" and read["train"]["user"] == "1000:50"
    assert read["train"]["command"][-1] in ("/workspace/a$b.yaml", "/workspace/a$$b.yaml")
    assert read["lab"]["environment"]["JUPYTER_TOKEN_FILE"] == "/run/secrets/lab_token"
    device = read["serve"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["device_ids"] == ["nvidia.com/gpu=all"], json.dumps(read, default=str)
