"""What a host has already, as far as its facts tell.

A facts file may lack the probes that only `setup` makes. Then nothing is taken to be missing where docker
itself answers; a host without docker lacks all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.host.checks_docker import OLDEST_DOCKER, docker_gpu
from tunesmith.host.checks_fixes import RESTART
from tunesmith.host.checks_host import CDI_LIST, DOCKER_ROOT, HOOKS, SNAP, Host, numbers
from tunesmith.host.facts import TIMED_OUT, UNKNOWN, Facts

DAEMON_JSON = "/etc/docker/daemon.json"

# Probes of `setup` alone.
HAS_SYSTEMD = "test -d /run/systemd/system"
DOCKER_ENABLED = "systemctl is-enabled docker"
DOCKER_GROUP = "getent group docker"
USER_NAME = "id -un"
COMPOSE = "docker compose version --short"
COMPOSE_V1 = "docker-compose version --short"
RUNTIMES = "docker info -f '{{json .Runtimes}}'"
TOOLKIT_VERSION = "nvidia-ctk --version"
DEAD_MIRRORLIST = "grep -lE '^mirrorlist=.*mirrorlist.centos.org' /etc/yum.repos.d/*.repo"
APT_DOCKER_CE = "dpkg-query -W docker-ce"
OLD_NVIDIA_SOURCES = (
    "grep -l nvidia.github.io /etc/apt/sources.list.d/* | grep -vE '/nvidia-container-toolkit.list$'"
)

CONFIGURE = "nvidia-ctk runtime configure --runtime=docker"
SAFE_TOOLKIT = (1, 17, 8)  # CVE-2025-23266: containers could become root on the host

DockerState = Literal["missing", "snap", "old", "down", "ok"]


@dataclass(frozen=True)
class HostState:
    """What is there. `docker`: "ok" too where this user may not ask a dockerd that runs.

    `gpu`: an NVIDIA GPU is in the machine; `driver`: its driver answers. `runtime`: dockerd knows the nvidia
    runtime; `stale`: dockerd has not seen the toolkit since it was installed. `members` of the group docker:
    None where nobody looked. `user`: who uses docker; None when the facts do not tell.
    """

    docker: DockerState
    docker_ce: bool
    enabled: bool
    compose: bool
    systemd: bool
    gpu: bool
    driver: bool
    toolkit: bool
    toolkit_version: tuple[int, ...]
    runtime: bool
    stale: bool
    daemon: dict[str, Any]
    members: tuple[str, ...] | None
    user: str | None
    containers: tuple[str, ...]
    old_nvidia_sources: tuple[str, ...]


def read_state(facts: Facts) -> HostState:
    """Raises UserError when the host's daemon.json is there but is not a JSON object."""
    host, daemon = Host(facts), _daemon(facts)
    docker, toolkit, gpu_check = _docker(host), _has_toolkit(facts), docker_gpu(host)
    refused = toolkit and gpu_check.status == "fail"
    return HostState(
        docker=docker,
        # Of a package that others only name, dpkg-query prints the name without a version.
        docker_ce=len(facts.answer(APT_DOCKER_CE).stdout.split()) > 1,
        enabled=_not_refuted(facts, DOCKER_ENABLED),
        compose=_compose(facts),
        systemd=_not_refuted(facts, HAS_SYSTEMD),
        gpu=host.gpu != "none",
        driver=host.gpu == "ok",
        toolkit=toolkit,
        toolkit_version=numbers(facts.answer(TOOLKIT_VERSION).stdout),
        runtime=_runtime(facts, docker, daemon) and not (refused and CONFIGURE in gpu_check.fix),
        stale=refused and RESTART in gpu_check.fix,
        daemon=daemon,
        members=_members(facts),
        user=_user(facts),
        containers=tuple(host.gpu_containers),
        old_nvidia_sources=tuple(facts.answer(OLD_NVIDIA_SOURCES).stdout.split()),
    )


def _not_refuted(facts: Facts, command: str) -> bool:
    """Whether a probe answered yes, or was never made."""
    return not facts.has(command) or facts.answer(command).ok


def _docker(host: Host) -> DockerState:
    if host.facts.answer(SNAP).ok or host.facts.answer(DOCKER_ROOT).stdout.startswith("/var/snap/"):
        return "snap"
    if host.docker in ("missing", "podman"):
        return "missing"
    if host.docker in ("down", "hung"):
        return "down"
    return "old" if host.docker_version and host.docker_version < OLDEST_DOCKER else "ok"


def _compose(facts: Facts) -> bool:
    """One that did not answer in time, on a machine under load, is there all the same."""
    known = [facts.answer(c) for c in (COMPOSE, COMPOSE_V1) if facts.has(c)]
    return not known or any(answer.ok or answer.rc == TIMED_OUT for answer in known)


def _has_toolkit(facts: Facts) -> bool:
    answers = (facts.answer(TOOLKIT_VERSION), facts.answer(CDI_LIST))
    return any(a.rc != UNKNOWN for a in answers) or bool(facts.answer(HOOKS).stdout.strip())


def _runtime(facts: Facts, docker: DockerState, daemon: dict[str, Any]) -> bool:
    """Whether dockerd knows the nvidia runtime; a dockerd that was not asked is taken to know it."""
    answer = facts.answer(RUNTIMES)
    if answer.ok:
        return '"nvidia"' in answer.stdout
    return docker != "missing" or "nvidia" in (daemon.get("runtimes") or {})


def _daemon(facts: Facts) -> dict[str, Any]:
    text = facts.file(DAEMON_JSON)
    if text is None or not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{DAEMON_JSON}: is not JSON: {error}",
            hint="dockerd does not start with it either: correct it or move it away, then run setup again",
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{DAEMON_JSON}: holds a {type(found).__name__}, not an object", hint="write {} into it"
        )
    return found


def _members(facts: Facts) -> tuple[str, ...] | None:
    """The members of the group docker; none where the group is not there, None where nobody looked."""
    if not facts.has(DOCKER_GROUP):
        return None
    fields = facts.answer(DOCKER_GROUP).stdout.strip().split(":")
    return tuple(name for name in fields[3].split(",") if name) if len(fields) == 4 else ()


def _user(facts: Facts) -> str | None:
    """Who called: under sudo the one before it."""
    for name in (facts.env.get("SUDO_USER"), facts.answer(USER_NAME).stdout.strip(), facts.env.get("USER")):
        if name:
            return name
    return None
