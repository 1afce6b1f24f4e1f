"""Probes on this very machine: real programs, made to hang, to lie and to leak."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tunesmith.host.checks import run_checks
from tunesmith.host.checks_host import DOCKER_VERSION, SMI
from tunesmith.host.facts import TIMED_OUT, Facts, load_facts
from tunesmith.host.probe import about, constant, gather, here, mask, masked


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_this_machine() -> None:
    facts = gather(also=["echo hello"], files=["/etc/hostname"])
    assert facts.answer("echo hello").stdout == "hello\n"
    assert facts.file("/etc/hostname") == Path("/etc/hostname").read_text()
    assert facts.file("/etc/os-release") == Path("/etc/os-release").read_text()
    assert facts.answer("uname -m").stdout.strip() == os.uname().machine
    assert {check.status for check in run_checks(facts) if check.id in ("cpu", "memory", "disk")} <= {
        "ok",
        "warn",
    }


def test_a_docker_that_hangs_is_left_behind(programs: Path) -> None:
    # The shell ignores the signal, and its child would outlive it.
    write_program(programs / "docker", "trap '' TERM; sleep 41.7; sleep 41.7")
    begin = time.monotonic()
    facts = gather()
    assert time.monotonic() - begin < 10
    assert facts.answer(DOCKER_VERSION).rc == TIMED_OUT
    docker = next(check for check in run_checks(facts) if check.id == "docker")
    assert docker.status == "fail" and "does not answer" in docker.found
    end = time.monotonic() + 5
    while (
        left := here(["sh", "-c", "ps -eo args | grep '^sleep 41[.]7'"]).stdout
    ) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == ""


DOCKER = r"""
case "$*" in
  "version -f {{.Server.Version}}") echo 27.3.1;;
  "info -f {{.DockerRootDir}}") echo /;;
  "info -f {{.CgroupDriver}}") echo systemd;;
  "ps --format {{.Names}}") echo lab;;
  "ps --format {{.Image}}") echo 'evil;touch${IFS}pwned';;
  "image ls --format {{.Repository}}:{{.Tag}}") echo "demo:1"; echo "<none>:<none>";;
  "inspect -f {{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}} lab") echo "67108864 private";;
  "inspect -f {{json .HostConfig.DeviceRequests}} {{.HostConfig.Runtime}} lab") echo '[{"Capabilities":[["gpu"]]}] runc';;
  "logs --tail 400 lab") echo "my diary"; echo "x.so: undefined symbol: _Z1a";;
  "image inspect -f {{json .Config.Labels}} demo:1") echo "{}";;
  "history --no-trunc --format {{.CreatedBy}} {{.Comment}} demo:1") echo bash; echo "#(nop) base";;
  "image inspect -f {{.Size}} demo:1") echo 99999999999999;;
  *) exit 1;;
esac
"""


def test_what_first_probes_find_is_looked_at_by_later_ones(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(programs / "docker", DOCKER)
    monkeypatch.chdir(tmp_path)
    facts = gather()
    checks = {check.id: check for check in run_checks(facts)}
    assert {i: checks[i].status for i in ("docker", "docker-shm", "abi", "image-recipe", "disk")} == {
        "docker": "ok", "docker-shm": "warn", "abi": "fail", "image-recipe": "warn", "disk": "warn",
    }  # fmt: skip
    assert "lab" in checks["docker-shm"].found and "demo:1" in checks["image-recipe"].found
    # A name is handed over as an argument: the shell never reads it.
    assert not (tmp_path / "pwned").exists()
    # Of a log only the symptoms are kept.
    assert facts.answer("docker logs --tail 400 lab").stdout == "x.so: undefined symbol: _Z1a\n"


def test_recorded_facts_give_the_same_verdicts(programs: Path, tmp_path: Path) -> None:
    write_program(programs / "docker", DOCKER)
    write_program(programs / "nvidia-smi", 'echo "NVIDIA GeForce RTX 3090, 550.54.14, 8.6, 24576 MiB"')
    facts = gather()
    assert facts.answer(SMI).ok
    facts.save(tmp_path / "facts.json")
    assert run_checks(load_facts(tmp_path / "facts.json")) == run_checks(facts)


def test_the_arguments_of_a_probe() -> None:
    args = about("docker inspect -f '{{.Id}}' ", "a'; rm -rf $HOME").args
    assert args[-1] == "a'; rm -rf $HOME" and "rm -rf" not in args[-3]
    assert constant("uname -m").args[-1] == "sh"


@pytest.mark.parametrize(
    "secret",
    [
        "http://me:s3cret@proxy:3128",
        "Environment=HTTPS_PROXY=http://me:s3cret@proxy:3128",
        "me:s3cret@proxy:3128",
        "Environment=https_proxy=me:s3cret@proxy:3128",
        '["HF_TOKEN=hf_s3cretabcdefgh","A=1"]',
        "OPENAI_API_KEY=s3cret",
        "MY_PASSWORD='s3cret'",
        '{"token": "s3cret", "password": true}',
        "jupyter lab --ServerApp.token=s3cret",
        "jupyter lab --ServerApp.token s3cret",
        "c.PasswordIdentityProvider.hashed_password = 'argon2:s3cret'",
        "http://127.0.0.1:8888/?token=s3cret :: /work",
        "curl -H 'Authorization: Bearer s3cret.x-y'",
        "key sk-s3cretabcdefgh",
    ],
)
def test_secrets_are_masked(secret: str) -> None:
    assert "s3cret" not in mask(secret)
    assert "***" in mask(secret)
    assert mask(mask(secret)) == mask(secret)


@pytest.mark.parametrize(
    "text",
    [
        "--ServerApp.token=''",
        "c.ServerApp.token = ''",
        '["--ServerApp.token=","x"]',
        "tokenizer = 3",
        "https://hf-mirror.com",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text


def test_facts_are_masked_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cretabcdefgh")
    facts = gather(also=["echo $HTTPS_PROXY $HF_TOKEN"])
    assert "s3cret" not in json.dumps(facts.as_dict())
    assert facts.env["HTTPS_PROXY"] == "http://***@127.0.0.1:9"
    assert masked(facts) == facts
    assert isinstance(facts, Facts)
