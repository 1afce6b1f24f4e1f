"""tunesmith doctor: what is wrong with this host, why it matters, and the commands that put it right."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.progress import say

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith doctor

tunesmith doctor --target ubuntu@10.0.0.5

tunesmith doctor --cluster cluster.yaml

tunesmith doctor --record facts.json

tunesmith doctor --facts facts.json --json
"""

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "bright_black"}
INDENT = " " * 6


@app.command(epilog=EXAMPLES)
def doctor(
    facts: Path | None = typer.Option(None, help="Judge the host that is recorded in this file."),
    record: Path | None = typer.Option(None, help="Keep what was found in this file, secrets masked."),
    target: str | None = typer.Option(None, metavar="USER@HOST[:PORT]", help="Look at another host, by ssh."),
    ssh_key: Path | None = typer.Option(None, help="Private key for --target. Default: as ssh finds it."),
    cluster: Path | None = typer.Option(
        None, help="Look at all hosts of this cluster file, and at what they need together."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Look this host over. Nothing is changed, and no root is needed. Exit code 1 when a check fails."""
    from tunesmith.workflows.doctor import doctor as run

    if cluster is not None:
        _refuse_beside_cluster(facts=facts, record=record, target=target, ssh_key=ssh_key)
        _doctor_cluster(cluster, json)
        return
    found = run(facts=facts, target=target, ssh_key=ssh_key, record=record)
    if json:
        print_json(found.as_dict())
    else:
        _show(found.host, found.as_dict())
    if record is not None:
        say(f"recorded in {record}")
    if not found.ok:
        raise typer.Exit(1)


def _refuse_beside_cluster(**given: object) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if named:
        raise UserError(f"--cluster with {', '.join(named)}", hint="the cluster file names hosts and keys")


def _doctor_cluster(path: Path, json: bool) -> None:
    from tunesmith.workflows.doctor_cluster import doctor_cluster

    found = doctor_cluster(path)
    if json:
        print_json(found.as_dict())
    else:
        for host in found.as_dict()["hosts"]:
            if host["error"] is None:
                _show(f"{host['host']}  {host['distro']}", host)
            else:
                typer.echo(f"{host['host']}\n\nerror: {host['error']}")
            typer.echo()
        _show("the hosts together", found.as_dict())
    if not found.ok:
        raise typer.Exit(1)


def _show(host: str, found: dict[str, Any]) -> None:
    """The checks as text: one line for each that is well, the rest with reason and fix."""
    checks = found["checks"]
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    typer.echo(f"{host}\n")
    for check in checks:
        if check["status"] != "skip":
            _show_check(check, width)
    skipped = [check["id"] for check in checks if check["status"] == "skip"]
    if skipped:
        text = f"skip  not looked at: {', '.join(skipped)}"
        typer.echo(textwrap.fill(text, width, subsequent_indent=INDENT, break_on_hyphens=False))
    counts = {status: sum(check["status"] == status for check in checks) for status in COLOURS}
    typer.echo(f"\n{', '.join(f'{number} {status}' for status, number in counts.items() if number)}")
    if any(check["fix"] for check in checks):
        typer.echo("Fixes are lines for a root shell ('sudo -i'), to be run from the top down.")


def _show_check(check: dict[str, Any], width: int) -> None:
    status = check["status"]
    mark = (
        typer.style(f"{status:<6}", fg=COLOURS[status], bold=status == "fail")
        if _colour()
        else f"{status:<6}"
    )
    text = textwrap.fill(f"{check['title']}: {check['found']}", width - len(INDENT), break_on_hyphens=False)
    typer.echo(mark + text.replace("\n", f"\n{INDENT}"))
    if status == "ok":
        return
    typer.echo(textwrap.fill(check["why"], width, initial_indent=INDENT, subsequent_indent=INDENT))
    if check["fix"]:
        typer.echo(f"{INDENT}fix:")
    for line in check["fix"]:
        # Never wrapped, and notes are comments: the lines are there to be copied as they stand.
        typer.echo(f"{INDENT}  {line}")
    typer.echo()


def _colour() -> bool:
    return sys.stdout.isatty()
