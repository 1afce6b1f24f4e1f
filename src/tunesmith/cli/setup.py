"""tunesmith setup: install what a host still needs."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError

if TYPE_CHECKING:
    from tunesmith.workflows.setup import HostSetup

app = typer.Typer(add_completion=False)


class DockerSource(StrEnum):
    docker_io = "docker.io"
    docker_ce = "docker-ce"


MOST_WORDS = 16

EXAMPLES = """Examples:

tunesmith setup --dry-run

tunesmith setup --registry-mirror https://your.mirror --data-root /data/docker

tunesmith setup --target ubuntu@10.0.0.5 --target ubuntu@10.0.0.6 --yes

tunesmith setup --cluster cluster.yaml --dry-run

tunesmith setup --bundle /media/usb/bundle

tunesmith setup --script setup.sh
"""


@app.command(epilog=EXAMPLES)
def setup(
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and change nothing."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask before applying the plan."),
    target: list[str] | None = typer.Option(
        None, help="user@host[:port] over ssh, or @chroot/DIR; repeat it for several. Default: this host."
    ),
    inventory: Path | None = typer.Option(None, help="YAML file with hosts: host, user, port, key."),
    cluster: Path | None = typer.Option(None, help="Cluster file: all of its hosts."),
    ssh_key: Path | None = typer.Option(
        None, help="Private key for --target. Default: ssh agent and ~/.ssh."
    ),
    ask_sudo_password: bool = typer.Option(
        False, "--ask-sudo-password", help="Ask for the sudo password of the hosts (the same for all)."
    ),
    docker: DockerSource | None = typer.Option(
        None,
        help="Where docker comes from. Default: docker.io on Ubuntu and Debian, docker-ce elsewhere.",
    ),
    docker_mirror: str = typer.Option(
        "https://download.docker.com", help="Mirror of Docker's package host, for docker-ce."
    ),
    toolkit_mirror: str = typer.Option(
        "https://nvidia.github.io/libnvidia-container", help="Mirror of the repository of NVIDIA's toolkit."
    ),
    registry_mirror: list[str] | None = typer.Option(
        None, help="Mirror of docker.io images; repeat it, the first is tried first."
    ),
    data_root: str | None = typer.Option(None, help="Folder where docker keeps images and containers."),
    proxy: str | None = typer.Option(None, help="Proxy for dockerd, and for the downloads of this setup."),
    no_proxy: str = typer.Option("localhost,127.0.0.1,::1", help="Hosts that are reached without it."),
    user: str | None = typer.Option(None, help="Who shall use docker without sudo. Default: who calls."),
    toolkit: bool | None = typer.Option(
        None, "--toolkit/--no-toolkit", help="NVIDIA's toolkit or not. Default: where a GPU is found."
    ),
    bundle: Path | None = typer.Option(None, help="Take the packages from this bundle; no network is used."),
    facts: Path | None = typer.Option(None, help="Plan for a facts file of 'tunesmith doctor --record'."),
    script: Path | None = typer.Option(
        None, help="Write the plan to this file as a bash script; change nothing."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Install what a host still needs: docker, NVIDIA's container toolkit, settings. Shows the plan first."""
    from tunesmith.workflows.setup import SetupOptions, Where
    from tunesmith.workflows.setup import setup as run

    options = SetupOptions(
        docker=docker.value if docker else None,
        toolkit=toolkit,
        user=user,
        data_root=data_root,
        registry_mirrors=tuple(registry_mirror or ()),
        proxy=proxy,
        no_proxy=no_proxy,
        docker_mirror=docker_mirror,
        toolkit_mirror=toolkit_mirror,
        bundle=bundle,
    )
    where = Where(tuple(target or ()), inventory, ssh_key, facts, cluster)
    password = typer.prompt("sudo password", hide_input=True, err=True) if ask_sudo_password else None
    hosts = run(
        where,
        options,
        # With --json stdout is for the one object at the end.
        show=lambda found: show_plans(found, script, to_stderr=json),
        confirm=lambda: yes or confirm(),
        dry_run=dry_run,
        script=script,
        sudo_password=password,
    )
    if json:
        print_json(
            {"hosts": [host.as_dict() for host in hosts], "dry_run": dry_run, "ok": all(h.ok for h in hosts)}
        )
    for host in hosts:
        show_outcome(host, to_stderr=json)
    if not all(host.ok for host in hosts):
        raise typer.Exit(1)


def confirm() -> bool:
    if not sys.stdin.isatty():
        raise UserError(
            "there is no terminal to ask on, so nothing was changed",
            hint="add --yes to apply the plan, or --dry-run",
        )
    return typer.confirm("Apply this plan?", err=True)


def show_plans(hosts: list[HostSetup], script: Path | None, *, to_stderr: bool) -> None:
    for host in hosts:
        typer.echo("\n".join(_plan_lines(host)), err=to_stderr)
    if script:
        typer.echo(f"script    {script}", err=to_stderr)


def _plan_lines(host: HostSetup) -> list[str]:
    """What will be done on a host, why, and with which commands."""
    found = host.as_dict()
    lines = [f"{host.name}  {found['distro'] or ''}".rstrip()]
    if host.error:
        return [*lines, f"  error: {host.error}"]
    lines += [f"  warning: {text}" for text in found["warnings"]]
    lines += [f"    {line}" for line in found["driver_fix"]]
    for number, step in enumerate(found["steps"], 1):
        lines += ["", f"  {number}. {step['title']}", f"     {step['why']}"]
        if step["copies"]:
            folder = str(Path(step["copies"][0]["to"]).parent)
            lines.append(f"       copy {len(step['copies'])} package files to {folder} of the host")
        lines += _command_lines(step)
    return [*lines, ""] if found["steps"] else [*lines, "  nothing to do"]


def _command_lines(step: dict[str, Any]) -> list[str]:
    """The commands as typed; the four that write one file are told as one."""
    files = {f"{file['path']}.tunesmith-new": file for file in step["files"]}
    lines: list[str] = []
    for command in step["commands"]:
        new = next((path for path in files if command[-1] == path or f"of={path}" in command), None)
        if new and command[0] == "dd":
            file = files[new]
            lines.append(f"       write {file['path']} (mode {file['mode']})")
            lines += [f"         | {line}" for line in file["text"].splitlines()]
        elif not new and not any(path in command for path in files):
            lines.append(f"       $ {_short(command)}")
    return lines


def _short(command: list[str]) -> str:
    """A command for people; of a hundred package files it names the first ones."""
    left = len(command) - MOST_WORDS
    return shlex.join(command) if left < 2 else f"{shlex.join(command[:MOST_WORDS])} ... and {left} more"


def show_outcome(host: HostSetup, *, to_stderr: bool) -> None:
    if host.outcome is None:
        return
    found = host.as_dict()
    lines = [f"{host.name}: {len(found['applied'])} of {len(found['steps'])} steps done"]
    for change in found["changed"]:
        lines.append(f"  {change['title']}")
        lines += [
            f"    {when}: {change[when]['status']}, {change[when]['found']}" for when in ("before", "after")
        ]
    if found["failed"]:
        lines += _failure_lines(found)
    if found["left"]:
        lines.append(f"  still needed after the run: {', '.join(found['left'])}")
    typer.echo("\n".join(lines), err=to_stderr or not host.ok)


def _failure_lines(found: dict[str, Any]) -> list[str]:
    failed = found["failed"]
    return [
        f"  done:    {', '.join(found['applied']) or 'nothing'}",
        f"  failed:  {failed['step']}: {_short(failed['command'])}",
        *(f"  | {line}" for line in failed["output"].splitlines()),
        "  to go on: put right what it says, and run the same setup again; steps that are done are skipped",
    ]
