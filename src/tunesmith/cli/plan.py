"""tunesmith plan: tokens, memory, time and disk of a training before a second of it is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console

from tunesmith.cli.data import print_row
from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load
from tunesmith.core.progress import say

if TYPE_CHECKING:
    from tunesmith.workflows.plan import RunPlan
    from tunesmith.workflows.plan_tables import CardTable

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith plan recipe.yaml

tunesmith plan recipe.yaml --gpu rtx3090 --price-per-hour 0.25

tunesmith plan recipe.yaml --gpu h100 --gpus 8 --model qwen2.5-72b

tunesmith plan recipe.yaml --gpu rtx3090 --table

tunesmith plan --card-table
"""


@app.command(epilog=EXAMPLES)
def plan(
    recipe: Path | None = typer.Argument(None, metavar="RECIPE", help="The recipe file."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    model: str | None = typer.Option(
        None, help="A model in place of the recipe's: a folder (config.json suffices), a hub id, a size."
    ),
    gpu: str | None = typer.Option(None, metavar="CARD", help="Plan for this card, such as rtx3090."),
    gpus: int | None = typer.Option(None, min=1, help="How many cards."),
    price_per_hour: float | None = typer.Option(None, min=0, help="Of the machine: the plan says the cost."),
    steps: int = typer.Option(0, min=0, max=3, help="Take so many real steps here for their time: 2 or 3."),
    rows: int = typer.Option(2, min=0, help="Rendered samples to show."),
    table: bool = typer.Option(False, "--table", help="All methods side by side on that machine."),
    card_table: bool = typer.Option(
        False, "--card-table", help="Which model sizes fit which cards by which method; no recipe is needed."
    ),
    facts: Path | None = typer.Option(
        None, metavar="FILE", help="Predict published peaks (JSON lines) and set both side by side."
    ),
    markdown: Path | None = typer.Option(
        None, metavar="FILE", help="With --facts: also write the table of every row there."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Predict a training: tokens, steps, memory, time, disk, without a weight. Exit code 3: cannot work."""
    _check(recipe, table=table, card_table=card_table, facts=facts)
    if markdown is not None and facts is None:
        raise UserError(f"tunesmith plan: --markdown {markdown} without --facts", hint="leave it out")
    say(f"plan {facts or recipe or 'the card table'}")
    with first_load("torch"):
        from tunesmith.workflows.import_xtuner import recipe_for
        from tunesmith.workflows.plan_recipe import PlanOptions, find_case, plan_recipe
        from tunesmith.workflows.plan_tables import card_table as make_card_table
        from tunesmith.workflows.plan_tables import method_table

    if facts is not None:
        _print_facts(facts, markdown, json)
    elif card_table:
        chart = make_card_table()
        _print_table(chart, json)
        if not json:
            _print_needs(chart)
    else:
        assert recipe is not None
        options = PlanOptions(
            gpu=gpu, gpus=gpus, price_per_hour=price_per_hour, real_steps=steps, rows=rows, model=model
        )
        recipe, overrides = recipe_for(recipe), set_ or []
        if table:
            _print_table(method_table(find_case(recipe, overrides, options)), json)
        else:
            end_with(plan_recipe(recipe, overrides, options), json)


def _check(recipe: Path | None, *, table: bool, card_table: bool, facts: Path | None) -> None:
    """Raise UserError unless one thing is asked for."""
    wholes = {"--card-table": card_table, "--facts": facts is not None}
    given = [name for name, wanted in {"--table": table, **wholes}.items() if wanted]
    if len(given) > 1:
        both = " and ".join(given)
        raise UserError(f"tunesmith plan: {both}: one of them at a time", hint="leave the other out")
    alone = next((name for name, wanted in wholes.items() if wanted), None)
    if alone is None and recipe is None:
        raise UserError("tunesmith plan: a recipe is missing", hint="tunesmith plan recipe.yaml")
    if alone is not None and recipe is not None:
        raise UserError(f"tunesmith plan: {recipe} with {alone}, which takes no recipe", hint="leave it out")


def _print_table(found: Any, as_json: bool) -> None:
    from tunesmith.workflows.plan_view import table

    if as_json:
        print_json(found.as_dict())
        return
    for line in table(found.cells()):
        typer.echo(line)


def _print_needs(chart: CardTable) -> None:
    from tunesmith.workflows.plan_view import table

    typer.echo(f"\nGiB that each needs at {chart.length} tokens, without CUDA's context:\n")
    for line in table(chart.need_cells()):
        typer.echo(line)


def _print_facts(path: Path, markdown: Path | None, as_json: bool) -> None:
    from tunesmith.workflows.plan_facts import plan_facts

    found = plan_facts(path, table=markdown, progress=say)
    if as_json:
        print_json(found)
        return
    median, ninth = found["median_abs_error"], found["p90_abs_error"]
    told = "" if median is None else f"; error: median {median:.1%}, nine in ten within {ninth:.1%}"
    typer.echo(f"{found['n']} rows predicted, {found['skipped']} skipped{told}")


def end_with(plan: RunPlan, as_json: bool) -> NoReturn:
    """Print the plan, and end the command: with 3 for a run that cannot work."""
    from tunesmith.workflows.plan_view import plan_lines

    if as_json:
        print_json(plan.as_dict())
    else:
        _show(plan.samples, plan_lines(plan))
    raise typer.Exit(0 if plan.works else 3)


def _show(samples: list[Any], lines: list[str]) -> None:
    """The samples, what is learned marked, then the plan."""
    console = Console(highlight=False, soft_wrap=True)
    for row in samples:
        print_row(console, row)
    if samples:
        console.print()
    for line in lines:
        console.print(line, markup=False)
