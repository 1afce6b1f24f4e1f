"""tunesmith train: train a recipe, or resume its unfinished run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.cli.plan import end_with
from tunesmith.core.loading import first_load

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Examples: tunesmith train recipe.yaml | tunesmith train recipe.yaml --set train.lr=1e-4 "
    "--set name=second | tunesmith train recipe.yaml --dry-run"
)
def train(
    recipe: Path = typer.Argument(metavar="RECIPE", help="The recipe file, or an xtuner 0.1 config (.py)."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Move an earlier run of this name aside and start anew."
    ),
    nnodes: int = typer.Option(1, "--nnodes", min=1, help="Machines that train together."),
    node_rank: int = typer.Option(0, "--node-rank", min=0, help="Number of this machine, from 0."),
    rendezvous: str | None = typer.Option(
        None, "--rendezvous", metavar="HOST:PORT", help="Where the machines meet: a free port of machine 0."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="As 'tunesmith plan': train nothing."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train a recipe. The same command resumes a run that was stopped or killed, exactly where it was."""
    from tunesmith.workflows.import_xtuner import recipe_for
    from tunesmith.workflows.launch import Cluster, enter_worker, launch, processes_to_start

    enter_worker(os.environ)
    recipe = recipe_for(recipe)
    cluster, overrides = Cluster(nnodes, node_rank, rendezvous), set_ or []
    processes = 0 if dry_run else processes_to_start(recipe, overrides, cluster)
    if processes:
        outcome = launch(recipe, overrides, fresh=fresh, processes=processes, cluster=cluster)
        _print(outcome.value, json)
        raise typer.Exit(outcome.code)
    with first_load("torch"):
        from tunesmith.workflows.plan_recipe import PlanOptions, plan_recipe
        from tunesmith.workflows.train import train_recipe

    if dry_run:
        end_with(plan_recipe(recipe, overrides, PlanOptions(rows=0)), json)
    _print(train_recipe(recipe, overrides, fresh=fresh).as_dict(), json)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    elif "run" in result:
        print(result["run"])
