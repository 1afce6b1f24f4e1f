"""tunesmith quickstart: fine-tune, prove, export and serve a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load
from tunesmith.core.units import duration_text

if TYPE_CHECKING:
    from tunesmith.workflows.quickstart import QuickstartResult

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith quickstart

tunesmith quickstart --output runs/first --json

tunesmith quickstart --output runs/short --rows 100 --set train.lr=1e-3
"""


@app.command(epilog=EXAMPLES)
def quickstart(
    output: Path = typer.Option(Path("runs/quickstart"), help="The run folder."),
    rows: int = typer.Option(600, min=8, help="Training rows to make."),
    test_rows: int = typer.Option(100, min=3, help="Held-out rows to make: other names, other phrasings."),
    seed: int = typer.Option(0, min=0, help="Seed of the rows."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change the shipped recipe, such as train.lr=1e-3; repeatable."
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Remove an earlier quickstart in the folder first."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Fine-tune a 135M model to turn order messages into JSON; prove it, export it, ask it over HTTP.

    Needs two CPU cores and some minutes. A call that was interrupted goes on where it stopped.
    """
    with first_load("torch"):
        from tunesmith.workflows.quickstart import Options
        from tunesmith.workflows.quickstart import quickstart as run

    options = Options(
        output=output, rows=rows, test_rows=test_rows, seed=seed, overrides=tuple(set_), fresh=fresh
    )
    result = run(options)
    if json:
        print_json(result.as_dict())
    else:
        show(result)


def show(result: QuickstartResult) -> None:
    """The table, the endpoint's answers, and where everything lies."""
    console = Console(highlight=False)
    table = Table(title=f"{result.tuned['rows']} held-out messages", title_justify="left")
    for name in ("", "base", "tuned"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("exact match", f"{result.base['exact_match']:.1%}", f"{result.tuned['exact_match']:.1%}")
    table.add_row("loss", f"{result.base['loss']:.3f}", f"{result.tuned['loss']:.3f}")
    console.print(table)
    for answer in result.answers:
        console.print(f"{answer['question']}", markup=False, soft_wrap=True)
        verdict = "right" if answer["correct"] else f"wrong, expected {answer['expected']}"
        console.print(f"  -> {answer['answer']}  {verdict}", markup=False, soft_wrap=True)
    for line in summary(result):
        console.print(line, markup=False, soft_wrap=True)


def summary(result: QuickstartResult) -> list[str]:
    train = result.train
    parity = "token for token" if result.template_parity else "NOT"
    return [
        "",
        f"trained   {train['steps']} steps in {duration_text(train['train_seconds'])}, "
        f"{train['tokens_per_s']:.0f} tokens/s",
        f"endpoint  its prompts are {parity} those of the training",
        f"run       {result.run}",
        f"adapter   {result.adapter}",
        f"merged    {result.merged}",
        "",
        f"talk to it:  tunesmith chat {result.run}",
        f"serve it:    tunesmith serve {result.run}",
        f"your data:   a copy of {result.run / 'quickstart' / 'recipe.yaml'} with other data.sources",
    ]
