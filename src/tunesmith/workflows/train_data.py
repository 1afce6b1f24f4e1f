"""The data of a run, and what is minimised on it: one opener for every kind of objective."""

from __future__ import annotations

from typing import Any

from tunesmith.data.batches import eval_batches
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.data import prepared_rows, step_plan
from tunesmith.workflows.run_data import RunData
from tunesmith.workflows.train_compat import open_compat
from tunesmith.workflows.train_preference import check_objective, make_objective

EVAL_TOKENS = 2048


def open_data(recipe: Recipe, tokenizer: Any) -> RunData:
    """Read, tokenise and pack the recipe's rows. Raises UserError for whatever is wrong with them."""
    check_objective(recipe.objective)
    if recipe.compat is not None:
        return open_compat(recipe, tokenizer)
    prepared = prepared_rows(recipe, recipe.data, tokenizer)
    return RunData(
        prepared=prepared,
        steps=step_plan(prepared, recipe.data, recipe.train, recipe.objective),
        eval_batches=eval_batches(prepared.eval, max_tokens=EVAL_TOKENS, max_rows=recipe.eval.max_rows),
        objective=make_objective(recipe, prepared),
    )
