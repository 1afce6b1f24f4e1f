"""tunesmith fetch: bring a model to this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.units import bytes_text

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith fetch smollm2-135m-instruct

tunesmith fetch Qwen/Qwen2.5-0.5B-Instruct --endpoint https://your.mirror

tunesmith fetch recipe.yaml --lock lock.json
"""


@app.command(epilog=EXAMPLES)
def fetch(
    what: str = typer.Argument(
        metavar="MODEL|RECIPE",
        help="Built-in name, hub id (owner/name), GGUF file, folder of a model, adapter or run; or a recipe.",
    ),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of a hub id."),
    endpoint: list[str] | None = typer.Option(
        None, help="Hub endpoint; repeat it to try several in order. Default: $HF_ENDPOINT, else the hub."
    ),
    offline: bool = typer.Option(False, "--offline", help="Use only what is in the cache."),
    lock: Path | None = typer.Option(None, help="Write the lock (revision, hashes, versions) to this file."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Bring a model to this machine; print its folder, revision and files with their SHA-256."""
    from tunesmith.workflows.fetch import fetch as run

    found = run(what, revision=revision, endpoints=endpoint, offline=offline, lock=lock).as_dict()
    if json:
        print_json(found)
        return
    typer.echo(f"model     {found['model']} ({found['source']}), {bytes_text(found['bytes'])}")
    typer.echo(f"folder    {found['folder']}")
    if found["revision"]:
        typer.echo(f"revision  {found['revision']}")
    if found["adapter"]:
        typer.echo(f"adapter   {found['adapter']}")
    for name, entry in found["files"].items():
        typer.echo(f"  {entry['sha256']}  {bytes_text(entry['bytes']):>10}  {name}")
    if found["lock"]:
        typer.echo(f"lock      {found['lock']}")
