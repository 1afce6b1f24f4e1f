"""Published peaks, predicted and set beside: the whole of `tunesmith plan --facts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.plan.test_stack import make_row
from tunesmith.core.errors import UserError
from tunesmith.plan.facts import Scored
from tunesmith.workflows.plan_facts import family, plan_facts, table_markdown


def _write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_is_predicted_or_skipped(tmp_path: Path) -> None:
    told: list[str] = []
    path = _write(
        tmp_path,
        make_row(id="one", peak_gib=0.05),
        make_row(id="oom", outcome="oom", peak_gib=None),
        make_row(id="two", optimizer="lion"),
    )
    found = plan_facts(path, table=tmp_path / "table.md", progress=told.append)
    assert (found["n"], found["skipped"]) == (1, 2)
    one, oom, two = found["rows"]
    assert one["error"] == pytest.approx(one["predicted_gib"] / 0.05 - 1)
    assert oom == {"id": "oom", "skipped": "no measured peak: the outcome is oom"}
    assert "lion" in two["skipped"]
    assert [line.split(":")[0] for line in told] == ["1/3 one", "2/3 oom", "3/3 two"]
    table = (tmp_path / "table.md").read_text()
    assert "| one | lora, 2 x 128 |" in table and "| somebody's | 3 | 1 |" in table


def test_a_bad_file_writes_no_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "kind": "train"}\n{')
    with pytest.raises(UserError, match=":2: not JSON"):
        plan_facts(path, table=tmp_path / "table.md")
    assert not (tmp_path / "table.md").exists()


def test_the_table_says_what_was_not_told() -> None:
    rows = [
        Scored("a", 1.1, 1.0, row={"source": "somebody/their-benchmarks row 2", "model": "Small-1B"}),
        Scored("b", skipped="the loss is not told", row={"source": "somebody/their-benchmarks row 3"}),
    ]
    assert family(rows[0]) == family(rows[1]) == "somebody/their-benchmarks"
    table = table_markdown(rows)
    assert "| somebody/their-benchmarks | 2 | 1 | 10.00% | 10.00% | 10.00% |" in table
    assert "| a | Small-1B | 1.100 | 1.000 | +10.00% |" in table
    assert "| the loss is not told | 1 | b |" in table
