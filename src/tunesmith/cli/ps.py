"""tunesmith ps: what runs in the containers."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.cli.main import print_json

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith ps

tunesmith ps --json
"""


@app.command(epilog=EXAMPLES)
def ps(
    project: Path | None = typer.Option(
        None, help="Folder of the compose file and the secrets. Default: .tunesmith."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """List the containers of the project, running or not."""
    from tunesmith.workflows.containers import ps as look

    found = look(project)
    if json:
        print_json({"services": [one.as_dict() for one in found]})
        return
    if not found:
        typer.echo("no containers: 'tunesmith up' starts them")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("service", "state", "health", "address", "image", "container"):
        table.add_column(name, overflow="fold")
    for one in found:
        state = one.status if one.status == "running" else f"{one.status} ({one.exit_code})"
        table.add_row(one.service, state, one.health or "-", one.url or "-", one.image, one.id)
    Console(highlight=False).print(table)
