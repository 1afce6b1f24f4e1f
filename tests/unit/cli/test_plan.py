from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.main import dispatch
from tunesmith.core.errors import UserError


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ([], "a recipe is missing"),
        (["--table"], "a recipe is missing"),
        (["--card-table", "--facts", "rows.jsonl"], "--card-table and --facts: one of them at a time"),
        (["recipe.yaml", "--table", "--card-table"], "--table and --card-table: one of them at a time"),
        (["recipe.yaml", "--card-table"], "recipe.yaml with --card-table, which takes no recipe"),
        (["recipe.yaml", "--gpus", "0"], "--gpus"),
    ],
)
def test_one_thing_is_asked_for(args: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        dispatch(["plan", *args])


def test_facts_that_are_no_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("no json\n")
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        dispatch(["plan", "--facts", str(path), "--json"])
