"""tunesmith schema: the recipe's JSON Schema, for editors."""

from __future__ import annotations

import typer

from tunesmith.cli.main import print_json
from tunesmith.recipe.schema import Recipe

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: tunesmith schema > recipe.schema.json")
def schema(json: bool = typer.Option(False, "--json", help="The same: the schema is JSON.")) -> None:
    """Print the JSON Schema of the recipe."""
    print_json(Recipe.model_json_schema())
