"""Published rows as they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.plan.facts_rows import measured, read_rows, with_numbers
from tunesmith.plan.facts_types import Skipped


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_rows_are_read_and_empty_lines_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"id": "a", "kind": "train"}', "", '{"id": "b", "kind": "kernel"}')
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"kind": "train"}', "'id' is None"),
        ('{"id": ""}', "'id' is ''"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, fault: str) -> None:
    path = _file(tmp_path, '{"id": "a", "kind": "train"}', line)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*" + fault):
        read_rows(path)


def test_a_byte_order_mark_and_separators_within_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"id": "a\u2028b"}\r\n'.encode())
    assert [row["id"] for row in read_rows(path)] == ["a\u2028b"]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_rows_is_no_file_of_facts(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="no rows"):
        read_rows(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("told", "number"),
    [
        ("12", 12),
        ("1,024", 1024),
        (" 7 ", 7),
        ("0.5", 0.5),
        (4.0, 4),
        (4.5, 4.5),
        ("auto", "auto"),
        (True, True),
    ],
)
def test_a_number_is_one_however_it_is_written(told: Any, number: Any) -> None:
    row = with_numbers({"id": "1", "seq_len": told, "config": {"layers": told}})
    assert row["id"] == "1"
    assert (row["seq_len"], row["config"]["layers"]) == (number, number)
    assert type(row["seq_len"]) is type(number)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"outcome": "oom", "peak_gib": None}, "the outcome is oom"),
        ({"outcome": "failed_presumed_oom", "peak_gib": 3.0}, "failed_presumed_oom"),
        ({"outcome": "ok", "peak_gib": None}, "no measured peak"),
        ({"outcome": "ok", "peak_gib": "12 GB"}, "'12 GB', not a number"),
        ({"outcome": "ok", "peak_gib": True}, "not a number"),
        ({"outcome": "ok", "peak_gib": -1}, "not a number of GiB above 0"),
        ({"outcome": "ok", "peak_gib": 0}, "not a number of GiB above 0"),
        ({"outcome": "ok", "peak_gib": math.nan}, "nan, not a number"),
        ({"outcome": "ok", "peak_gib": math.inf}, "inf, not a number"),
    ],
)
def test_rows_without_a_measured_peak(row: dict[str, Any], reason: str) -> None:
    found = measured(row)
    assert isinstance(found, Skipped) and reason in found.reason
