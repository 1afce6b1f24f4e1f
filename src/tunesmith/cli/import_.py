"""tunesmith import: another tool's training file as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith import xtuner qwen1_5_0_5b_chat_full_alpaca_e3.py -o recipe.yaml

tunesmith import xtuner config.py --compat -o compared.yaml
"""


@app.callback(epilog=EXAMPLES)
def main() -> None:
    """Turn another tool's training file into a recipe. It is read, never run."""


@app.command(epilog=EXAMPLES)
def xtuner(
    config: Path = typer.Argument(metavar="CONFIG.py", help="A config of xtuner 0.1."),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="RECIPE", help="The recipe to write; without it, it is printed."
    ),
    compat: bool = typer.Option(
        False, "--compat", help="Reproduce xtuner's token ids, labels, packs, order and learning rates."
    ),
    deepspeed: bool = typer.Option(
        False, "--deepspeed", help="The config was run with --deepspeed, which drops the last micro-batches."
    ),
    xtuner: Path | None = typer.Option(
        None, help="Folder or wheel of xtuner, to read its prompt sentences from; found if it is installed."
    ),
    force: bool = typer.Option(False, "--force", help="Write over a recipe that is there."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Turn an xtuner 0.1 config into a recipe, and tell line by line what became what."""
    from tunesmith.workflows.import_xtuner import import_xtuner

    found = import_xtuner(
        config, output, xtuner=xtuner, compat=compat, deepspeed=deepspeed, force=force
    ).as_dict()
    if json:
        print_json(found)
        return
    show(found)


def show(found: dict[str, Any]) -> None:
    for line in found["lines"]:
        became = line["became"] or "-"
        why = f"  ({line['why']})" if line["why"] else ""
        typer.echo(f"{line['line']:>4}  {line['written'][:60]:<60}  {became}{why}", err=True)
    if found["differences"]:
        typer.echo("\nWhat is done otherwise than by xtuner:", err=True)
    for difference in found["differences"]:
        typer.echo(f"  - {difference}", err=True)
    typer.echo("", err=True)
    typer.echo(found["recipe"] if found["recipe"] else found["text"], nl=not found["text"].endswith("\n"))
