"""tunesmith down: stop and remove the containers."""

from __future__ import annotations

from pathlib import Path

import typer

from tunesmith.cli.main import print_json

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith down

tunesmith down --project team/.tunesmith
"""


@app.command(epilog=EXAMPLES)
def down(
    project: Path | None = typer.Option(
        None, help="Folder of the compose file and the secrets. Default: .tunesmith."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Remove the containers, their networks and secrets. Mounted folders and the compose file stay."""
    from tunesmith.workflows.containers import down as remove

    counts = remove(project)
    if json:
        print_json({"removed": counts})
        return
    parts = [f"{number} {kind[:-1] if number == 1 else kind}" for kind, number in counts.items() if number]
    typer.echo(f"removed {', '.join(parts)}" if parts else "nothing was there")
