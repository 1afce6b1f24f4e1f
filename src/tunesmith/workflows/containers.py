"""tunesmith up, down, ps, logs, shell: the containers of a project folder, through docker's own compose."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.progress import say
from tunesmith.core.units import duration_text
from tunesmith.image.compose import Written
from tunesmith.image.docker import docker, find_image
from tunesmith.image.services import LAB_PORT, NOTEBOOK, SERVE_PORT
from tunesmith.workflows.compose_project import (
    IMAGES,
    Project,
    Wanted,
    caller,
    images_of,
    open_project,
    prepare,
    render,
    update_compose_file,
)
from tunesmith.workflows.container_state import (
    Container,
    compose,
    compose_command,
    compose_show,
    container_ids,
    containers,
    last_lines,
    network_ids,
)
from tunesmith.workflows.lab_files import (
    HASH,
    check_locked,
    check_port,
    check_token,
    free_port,
    password_config,
    put_notebook,
    refuse_open,
)

SETTLE_S = 8.0
POLL_S = 0.5
LOG_LINES = 20


@dataclass(frozen=True)
class Up:
    """The containers that were asked for, all well. `lab_url`: with the token, where JupyterLab is one."""

    project: Project
    containers: list[Container]
    lab_url: str | None
    secrets: list[Path]

    def as_dict(self) -> dict[str, Any]:
        return {
            "project": str(self.project.folder),
            "compose_file": str(self.project.compose_file),
            "services": [container.as_dict() for container in self.containers],
            "lab_url": self.lab_url,
            "secrets": [str(path) for path in self.secrets],
        }


def render_compose(
    services: Sequence[str] = ("lab",), wanted: Wanted | None = None, *, project: Path | None = None
) -> str:
    """The compose file with these services as `tunesmith up` would write it into the project folder.

    Raises UserError for an unknown service, train without a recipe, serve without a run, and bad options.
    """
    return render(open_project(project), services, wanted or Wanted())


def up(
    names: Sequence[str],
    wanted: Wanted,
    *,
    project: Path | None = None,
    anew: bool = False,
    token: str | None = None,
    timeout_s: float = 600.0,
) -> Up:
    """Start the services, and wait until each is healthy (or, without a health check, has stayed up a while).

    Without names: those of the compose file, or lab where there is none. Raises UserError for what cannot
    start, TunesmithError with the last lines of its log when a service dies or is not healthy in time.
    """
    where = open_project(project)
    names = list(names) or list(where.services()) or ["lab"]
    check_token(token)
    command = compose_command()
    wanted = _with_free_ports(wanted, [] if anew else list(where.services()))
    if "lab" in names and wanted.bind:
        refuse_open(wanted.bind, wanted.password)
    _refuse_missing_images(where, names, wanted, anew)
    update_compose_file(where, names, wanted, anew=anew)
    services = {name: service for name, service in where.services().items() if name in names}
    config = None if wanted.password is None else password_config(_hashed(wanted.password, services))
    recreate = ["--force-recreate"] if prepare(where, names, password_config=config, token=token) else []
    _put_notebook(services)
    _refuse_taken_ports(where, wanted, names)
    earlier = {one.id: one.restarts for one in containers(where)}
    compose(command, where, "up", "-d", "--no-build", *recreate, *names)
    found = _wait(where, names, timeout_s, earlier)
    secrets = [path for service in services.values() for path in service.secrets.values()]
    return Up(where, found, _lab_url(where, services, found), secrets)


def down(project: Path | None = None) -> dict[str, int]:
    """Remove the project's containers, networks and secrets; the mounts and the compose file stay.

    Returns how many of each were removed.
    """
    where = open_project(project)
    counts = {"containers": len(container_ids(where)), "networks": len(network_ids(where))}
    if where.compose_file.is_file() and any(counts.values()):
        try:
            compose(compose_command(), where, "down", "--remove-orphans")
        except TunesmithError as error:  # a file that compose cannot read must not keep them alive
            say(f"{error.what}; removing the containers one by one")
    if left := container_ids(where):
        docker("rm", "--force", "--volumes", *left)
    if networks := network_ids(where):
        docker("network", "rm", *networks)
    counts["secrets"] = len(list(where.secrets.glob("*")))
    shutil.rmtree(where.secrets, ignore_errors=True)
    return counts


def ps(project: Path | None = None) -> list[Container]:
    """The project's containers, running or not, by service."""
    return containers(open_project(project))


def logs(services: Sequence[str], *, follow: bool, tail: int | None, project: Path | None = None) -> int:
    """Print what the containers printed; `tail`: only the last lines of each. Returns the exit code."""
    where = _existing(project)
    for name in services:
        _refuse_unknown(where, name)
    options = [*(["--follow"] if follow else []), *([] if tail is None else [f"--tail={tail}"])]
    colour = [] if sys.stdout.isatty() else ["--no-color"]
    return compose_show(compose_command(), where, "logs", *options, *colour, *services, to_stdout=True)


def shell(service: str | None, command: Sequence[str], *, project: Path | None = None) -> int:
    """Run a command, or a shell, in a running container on this terminal. Returns its exit code."""
    where = _existing(project)
    if service is not None:
        _refuse_unknown(where, service)
    running = [found.service for found in containers(where) if found.status == "running"]
    name = service or ("lab" if "lab" in running else (running[0] if len(running) == 1 else None))
    if name is None:
        what = f"{len(running)} services run ({', '.join(running)})" if running else "no service runs"
        hint = "name one: tunesmith shell SERVICE" if running else "'tunesmith up' starts them"
        raise UserError(f"{where.folder}: {what}", hint=hint)
    if name not in running:
        raise UserError(f"the service {name} does not run", hint=f"tunesmith up {name}")
    terminal = [] if sys.stdin.isatty() and sys.stdout.isatty() else ["-T"]
    inside = list(command) or ["sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]
    return compose_show(compose_command(), where, "exec", *terminal, name, *inside, to_stdout=True)


def _existing(project: Path | None) -> Project:
    where = open_project(project)
    if not where.compose_file.is_file():
        raise UserError(f"{where.folder}: holds no compose file", hint="'tunesmith up' writes one")
    return where


def _refuse_unknown(project: Project, name: str) -> None:
    known = project.services()
    if name not in known:
        raise UserError(
            f"'{name}' is not a service of {project.compose_file}", hint=f"take one of {', '.join(known)}"
        )


# -- before the containers start -------------------------------------------------------------------------


def _with_free_ports(wanted: Wanted, kept: Collection[str]) -> Wanted:
    """Port 0 replaced by one that is free now: the file must name it. A service that is kept has its port."""
    bind = wanted.bind or "127.0.0.1"
    if wanted.lab_port == 0:
        wanted = replace(wanted, lab_port=None if "lab" in kept else free_port(bind))
    if wanted.serve_port == 0:
        wanted = replace(wanted, serve_port=None if "serve" in kept else free_port(bind))
    return wanted


def _refuse_missing_images(project: Project, names: Sequence[str], wanted: Wanted, anew: bool) -> None:
    """Only those that 'tunesmith image build' makes: compose finds others in their registries."""
    held = {} if anew else {name: service.image for name, service in project.services().items()}
    images = images_of(wanted) | held
    for name in names:
        image = images.get(name)
        if image in IMAGES.values() and find_image(str(image)) is None:
            raise UserError(
                f"the service {name} needs the image {image}, which this machine does not have",
                hint="'tunesmith image build' makes it, 'tunesmith image load FILE' brings it here; "
                "--image NAME takes another",
            )


def _refuse_taken_ports(project: Project, wanted: Wanted, names: Sequence[str]) -> None:
    """Only ports that were asked for now: those of a kept file are docker's to judge."""
    running = {found.service for found in containers(project) if found.status == "running"}
    ports = {"lab": wanted.lab_port or LAB_PORT, "serve": wanted.serve_port or SERVE_PORT}
    for name in [name for name in names if name in ports and name not in running and wanted.said]:
        check_port(wanted.bind or "127.0.0.1", ports[name])


def _hashed(password: str, services: Mapping[str, Written]) -> str:
    """The password as Jupyter's own function hashes it, in a container of the lab's image without network."""
    if "lab" not in services:
        raise UserError("a password is JupyterLab's, and lab is not started", hint="name the service lab")
    run = ("run", "--rm", "-i", "--network", "none", "--entrypoint", "python3", services["lab"].image)
    return docker(*run, "-c", HASH, input=password).strip()


def _put_notebook(services: Mapping[str, Written]) -> None:
    if "lab" not in services:
        return
    folders = [
        path for path, read_only in services["lab"].mounts if path.name == "notebooks" and not read_only
    ]
    for folder in folders[:1]:
        say(f"notebook  {put_notebook(folder, services['lab'].user or caller(None))}")


# -- until they are well ---------------------------------------------------------------------------------


def _wait(
    project: Project, names: Sequence[str], timeout_s: float, earlier: Mapping[str, int]
) -> list[Container]:
    """The containers of `names` once all are well. Raises TunesmithError when one dies, or time is up.

    earlier: how often docker had restarted each container before this start; that is past.
    """
    start, shown = time.monotonic(), dict.fromkeys(names, "")
    while True:
        passed = time.monotonic() - start
        found = [
            replace(one, restarts=max(0, one.restarts - earlier.get(one.id, 0)))
            for one in containers(project)
            if one.service in shown
        ]
        for one in found:
            state = f"{one.status} {one.health}".strip()
            if shown[one.service] != state:
                shown[one.service] = state
                say(f"{one.service}: {state} after {duration_text(passed)}")
            if one.fault:
                _raise_dead(project, one)
        if len(found) == len(shown) and all(_is_well(one, passed) for one in found):
            return found
        if passed > timeout_s:
            late = [one for one in found if not _is_well(one, passed)]
            if late:
                _raise_dead(project, late[0], f"was not healthy after {duration_text(timeout_s)}")
            raise TunesmithError(f"not every service has a container after {duration_text(timeout_s)}")
        time.sleep(POLL_S)


def _is_well(one: Container, passed_s: float) -> bool:
    """Healthy; without a health check: ended well, or running for a while."""
    if one.health:
        return one.health == "healthy"
    return (one.status == "exited" and one.exit_code == 0) or (
        one.status == "running" and passed_s >= SETTLE_S
    )


def _raise_dead(project: Project, one: Container, fault: str | None = None) -> None:
    """Stop a service that failed, or docker would start it again and again."""
    fault = fault or one.fault
    tail = last_lines(one, LOG_LINES)
    docker("stop", "--time", "10", one.id)
    raise TunesmithError(
        f"the service {one.service} {fault}; its last lines:\n{tail or '(it printed nothing)'}",
        hint=f"all of it: tunesmith logs {one.service}",
    )


def _lab_url(project: Project, services: Mapping[str, Written], found: Sequence[Container]) -> str | None:
    """JupyterLab's URL with its token, after it was seen to refuse a stranger and to let the token in."""
    lab = next((one for one in found if one.service == "lab"), None)
    path = services["lab"].secrets.get("lab_token") if lab else None
    if lab is None or path is None or not lab.url:
        return None
    token = path.read_text(encoding="utf-8")
    try:
        check_locked(lab.url, token)
    except TunesmithError:
        docker("stop", "--time", "10", lab.id)
        raise
    return f"{lab.url}/lab/tree/notebooks/{NOTEBOOK}?token={token}"
