"""The containers of a project as docker tells of them, and the compose command that moves them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.image.docker import docker, docker_version, failure
from tunesmith.image.services import NAMES
from tunesmith.workflows.compose_project import Project
from tunesmith.workflows.lab_files import address_of

PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"


@dataclass(frozen=True)
class Container:
    """A container of the project. `health` is '' without a health check, `url` where no port is known."""

    service: str
    id: str
    image: str
    status: str
    health: str
    exit_code: int
    restarts: int
    started: str
    url: str

    @property
    def fault(self) -> str:
        """What is wrong: it ended with an error, docker starts it again and again; '' when nothing is."""
        # Docker calls a container that ended unhealthy too, and has not counted its first restart yet.
        if self.status == "restarting" or (self.status in ("exited", "dead") and self.exit_code != 0):
            return f"ended with code {self.exit_code}"
        if self.restarts:
            return "ends again and again"
        return "is unhealthy" if self.status == "running" and self.health == "unhealthy" else ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def containers(project: Project) -> list[Container]:
    """The project's containers, in the order lab, train, serve, others."""
    ids = container_ids(project)
    found = json.loads(_inspect(ids)) if ids else []
    order = {name: place for place, name in enumerate(NAMES)}
    made = [_container(entry) for entry in found]
    return sorted(made, key=lambda one: (order.get(one.service, len(NAMES)), one.service))


def container_ids(project: Project) -> list[str]:
    return docker("ps", "-aq", "--no-trunc", "--filter", f"label={PROJECT_LABEL}={project.name}").split()


def network_ids(project: Project) -> list[str]:
    return docker("network", "ls", "-q", "--filter", f"label={PROJECT_LABEL}={project.name}").split()


def last_lines(container: Container, count: int) -> str:
    """What the container printed last, both streams."""
    done = proc.run(["docker", "logs", "--tail", str(count), container.id], check=False, timeout_s=30)
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-count:])


def _inspect(ids: list[str]) -> str:
    """One may be removed between `docker ps` and this: the others are told of all the same."""
    done = proc.run(["docker", "inspect", *ids], check=False, timeout_s=60)
    if done.returncode != 0 and "no such" not in done.stderr.lower():
        raise failure(("inspect",), done.stderr.strip(), done.returncode)
    return done.stdout or "[]"


def _container(entry: dict[str, Any]) -> Container:
    state, config = entry["State"], entry["Config"]
    return Container(
        service=str(config["Labels"].get(SERVICE_LABEL, "")),
        id=str(entry["Id"])[:12],
        image=str(config["Image"]),
        status=str(state["Status"]),
        health=str((state.get("Health") or {}).get("Status", "")),
        exit_code=int(state["ExitCode"]),
        restarts=int(entry.get("RestartCount", 0)),
        started=str(state["StartedAt"]),
        url=_url(entry),
    )


def _url(entry: dict[str, Any]) -> str:
    """Where this machine reaches the container; with the host's network its command line tells."""
    for bindings in (entry["HostConfig"].get("PortBindings") or {}).values():
        for binding in bindings or []:
            return f"http://{address_of(binding.get('HostIp') or '0.0.0.0')}:{binding['HostPort']}"
    if entry["HostConfig"].get("NetworkMode") != "host":
        return ""
    bind, port = listens_on([str(part) for part in entry["Config"].get("Cmd") or []])
    return f"http://{address_of(bind)}:{port}" if port else ""


def listens_on(command: list[str]) -> tuple[str, int | None]:
    """(address, port) in a command line of JupyterLab or of `tunesmith serve`; no port: None."""
    given = dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
    given |= {a: b for a, b in pairwise(command) if a.startswith("--") and "=" not in a}
    port = given.get("--ServerApp.port") or given.get("--port") or ""
    bind = given.get("--ServerApp.ip") or given.get("--host") or "127.0.0.1"
    return bind, int(port) if port.isdigit() else None


# -- compose ---------------------------------------------------------------------------------------------


def compose_command() -> list[str]:
    """`docker compose` where the plugin answers, else docker-compose.

    Raises UserError when neither is on this machine, and as `docker_version` does when no daemon answers.
    """
    docker_version()
    if proc.run(["docker", "compose", "version"], check=False, timeout_s=20).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise UserError(
        "neither 'docker compose' nor docker-compose is on this machine",
        hint="'tunesmith setup' installs the package docker-compose-plugin (Debian's own: docker-compose)",
    )


def compose_show(command: list[str], project: Project, *args: str, to_stdout: bool = False) -> int:
    """Run compose on the project's file, on this terminal; its exit code."""
    where = ["-p", project.name, "-f", str(project.compose_file)]
    # A COMPOSE_FILE or COMPOSE_PROFILES of the caller's shell is meant for another project.
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMPOSE_")}
    return proc.show([*command, *where, *args], env=env, to_stdout=to_stdout)


def compose(command: list[str], project: Project, *args: str) -> None:
    """As `compose_show`. Raises TunesmithError when it fails."""
    code = compose_show(command, project, *args)
    if code != 0:
        raise TunesmithError(
            f"'{' '.join(command)} {args[0]}' ended with code {code}",
            hint=f"its reason stands above; the file is {project.compose_file}",
        )
