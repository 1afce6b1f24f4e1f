"""tunesmith data: the rows of a recipe as the model will see them, and what becomes of each."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Show and check the rows of a recipe.",
    epilog="Example: tunesmith data check recipe.yaml",
)

RECIPE = typer.Argument(metavar="RECIPE", help="The recipe file.")
SET = typer.Option(None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


COUNTED = {
    "  rows": {
        "rows": "read",
        "kept": "kept",
        "dropped": "dropped (too long)",
        "truncated": "truncated",
        "empty": "empty",
        "duplicate": "duplicate",
        "unsupervised": "unsupervised",
    },
    "  tokens": {"tokens_kept": "kept", "tokens_supervised": "of them learned", "tokens_dropped": "dropped"},
}


@app.command(epilog="Example: tunesmith data show recipe.yaml -n 3 --source 0")
def show(
    recipe: Path = RECIPE,
    n: int = typer.Option(3, "-n", min=1, help="Rows to show."),
    source: int = typer.Option(0, min=0, help="The source, as N in data.sources.N."),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Print rows as the model will see them; the tokens it learns are green, or in ⟦brackets⟧."""
    with first_load("torch"):
        from tunesmith.workflows.data import show_rows

    rows = show_rows(recipe, set_ or [], count=n, source=source)
    if json:
        print_json({"rows": [row.as_dict() for row in rows]})
        return
    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        print_row(console, row, f"; {row.fate}")


def print_row(console: Console, row: Any, note: str = "") -> None:
    """A row (`workflows.data.ShownRow`) as the model will see it, below a line on its origin."""
    head = f"{row.file}: {row.row} ({row.format}): {row.tokens} tokens, {row.supervised_tokens} learned"
    console.print(Text(f"--- {head}{note}", style="bold"))
    for part, spans in groupby(row.spans, key=lambda span: span.part):
        if part:
            console.print(Text(f"{part}:", style="bold"))
        console.print(marked([(s.text, s.supervised) for s in spans], colour=console.is_terminal))


def marked(spans: list[tuple[str, bool]], *, colour: bool) -> Text:
    """Texts one after the other, those that are learned green, or in brackets where there is no colour."""
    text = Text()
    for raw, supervised in spans:
        shown = CONTROL.sub(lambda found: repr(found.group())[1:-1], raw)
        if colour:
            text.append(shown, style="green" if supervised else "dim")
        else:
            text.append(f"⟦{shown}⟧" if supervised else shown)
    return text


@app.command(epilog="Example: tunesmith data check recipe.yaml --json")
def check(recipe: Path = RECIPE, set_: list[str] | None = SET, json: bool = JSON) -> None:
    """Count what becomes of every row and token of a recipe; tokenises what is not in the cache."""
    with first_load("torch"):
        from tunesmith.workflows.data import check_data

    found = check_data(recipe, set_ or [])
    if json:
        print_json(found)
    else:
        _print_check(found)


def _print_check(found: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for counts in found["files"]:
        console.print(f"{counts['file']}: {counts['format']}, for {counts['used_for']}", markup=False)
        _print_counts(console, counts)
    if len(found["files"]) > 1:
        console.print(f"all {len(found['files'])} files")
        _print_counts(console, found["totals"])
    lengths, packing, epoch = found["row_tokens"], found["packing"], found["epoch"]
    told = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    console.print(f"rows      {found['train_rows']:,} to train on, {found['eval_rows']:,} held out")
    console.print(f"lengths   {told} tokens; max_length {found['max_length']:,}")
    fill = f"{packing['packs']:,} packs, {packing['efficiency']:.1%} full" if packing["on"] else "off"
    console.print(f"packing   {fill}")
    console.print(
        f"epoch     {epoch['steps']:,} optimizer steps, {epoch['tokens']:,} tokens, "
        f"{epoch['supervised']:,} of them learned; {found['total_steps']:,} steps in all"
    )
    for warning in found["warnings"]:
        console.print(f"note      {warning}", markup=False)


def _print_counts(console: Console, counts: dict[str, Any]) -> None:
    for unit, names in COUNTED.items():
        told = ", ".join(f"{counts[key]:,} {name}" for key, name in names.items())
        console.print(f"{unit:<10}{told}")
