"""tunesmith logs: what the containers printed."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith logs

tunesmith logs -f train

tunesmith logs lab --tail 50
"""


@app.command(epilog=EXAMPLES)
def logs(
    services: list[str] | None = typer.Argument(None, metavar="[SERVICE]...", help="Default: all."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on printing until Ctrl-C."),
    tail: int | None = typer.Option(None, min=0, help="Only the last lines of each service."),
    project: Path | None = typer.Option(
        None, help="Folder of the compose file and the secrets. Default: .tunesmith."
    ),
) -> None:
    """Print what the containers printed."""
    from tunesmith.workflows.containers import logs as show

    code = show(services or [], follow=follow, tail=tail, project=project)
    if code:
        raise SystemExit(code)
