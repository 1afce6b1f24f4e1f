"""tunesmith keys: who may use an endpoint, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.cli.main import print_json
from tunesmith.core.progress import say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Add, list and revoke the API keys of an endpoint.",
    epilog="Example: tunesmith keys add alice --rate 60/min --expires 30d",
)

FILE = typer.Option(
    None, "--file", help="File of keys. Default: $TUNESMITH_KEYS_FILE, else ~/.config/tunesmith/keys.json."
)
JSON = typer.Option(False, "--json", help="Print one JSON object.")


@app.command(epilog="Example: tunesmith keys add alice --rate 60/min --concurrency 4 --tokens-per-day 100000")
def add(
    name: str = typer.Argument(metavar="NAME", help="Whose key it is: shown in logs and metrics."),
    file: Path | None = FILE,
    rate: str | None = typer.Option(None, help="Requests a period: 10/s, 60/min, 1000/h, 5000/day."),
    concurrency: int | None = typer.Option(None, min=1, help="Requests at the same time."),
    tokens_per_day: int | None = typer.Option(
        None, min=1, help="Tokens of prompts and answers together, a day (UTC)."
    ),
    expires: str | None = typer.Option(None, help="A span (90m, 12h, 30d, 2w) or a date (2027-01-01, UTC)."),
    admin: bool = typer.Option(False, "--admin", help="May load and unload adapters."),
    models: str | None = typer.Option(None, metavar="A,B", help="Models it may use. Default: all."),
    json: bool = JSON,
) -> None:
    """Make a key and print it: only now, for the file has nothing but its hash. Default: no limits."""
    from tunesmith.workflows.keys import KeyOptions
    from tunesmith.workflows.keys import add as run

    options = KeyOptions(
        rate=rate,
        concurrency=concurrency,
        tokens_per_day=tokens_per_day,
        expires=expires,
        admin=admin,
        models=models,
    )
    made = run(name, options, file)
    if json:
        print_json(made)
        return
    typer.echo(made["key"])
    say(f"the key of '{name}' is shown this once; {made['file']} has its hash")


@app.command("list", epilog="Example: tunesmith keys list --json")
def list_(file: Path | None = FILE, json: bool = JSON) -> None:
    """Show names, limits and today's tokens; the keys themselves are stored nowhere."""
    from tunesmith.workflows.keys import list_all

    found = list_all(file)
    if json:
        print_json(found)
        return
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    if not found["keys"]:
        say(f"{found['file']} has no keys")
        return
    table = Table("name", "rate", "at once", "tokens today", "expires", "models", "admin", box=None)
    for key in found["keys"]:
        table.add_row(*_row(key))
    Console(highlight=False, soft_wrap=True).print(table)


def _row(key: dict[str, Any]) -> list[str]:
    quota = key["tokens_per_day"]
    expires = "never" if key["expires"] is None else key["expires"][:16].replace("T", " ")
    return [
        key["name"],
        key["rate"] or "any",
        str(key["concurrency"] or "any"),
        f"{key['tokens_today']:,}" + (f" of {quota:,}" if quota else ""),
        f"{expires} (expired)" if key["expired"] else expires,
        "all" if key["models"] is None else ",".join(key["models"]),
        "yes" if key["admin"] else "",
    ]


@app.command(epilog="Example: tunesmith keys revoke alice")
def revoke(
    name: str = typer.Argument(metavar="NAME", help="As 'tunesmith keys list' shows it."),
    file: Path | None = FILE,
    json: bool = JSON,
) -> None:
    """Take a key away; servers that run refuse it from the next request on."""
    from tunesmith.workflows.keys import revoke as run

    done = run(name, file)
    if json:
        print_json(done)
    else:
        say(f"the key of '{name}' is no longer taken")
