"""tunesmith train: train a recipe, or resume its unfinished run."""

from __future__ import annotations

from pathlib import Path

import typer

from tunesmith.cli.main import print_json

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Examples: tunesmith train recipe.yaml | tunesmith train recipe.yaml --set train.lr=1e-4 "
    "--set name=second | tunesmith train recipe.yaml --dry-run"
)
def train(
    recipe: Path = typer.Argument(metavar="RECIPE", help="The recipe file."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Move an earlier run of this name aside and start anew."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Stop after the plan; train nothing."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train a recipe. The same command resumes a run that was stopped or killed, exactly where it was."""
    from tunesmith.workflows.train import plan_recipe, train_recipe

    if dry_run:
        plan = plan_recipe(recipe, set_ or [])
        if json:
            print_json(plan)
        return
    result = train_recipe(recipe, set_ or [], fresh=fresh)
    if json:
        print_json(result.as_dict())
    else:
        print(result.run.path)
