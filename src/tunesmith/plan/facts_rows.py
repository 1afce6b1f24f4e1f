"""Published rows as they are read: a file of JSON lines, numbers that were written as texts, the peak."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.plan.facts_types import Row, Skipped

NUMBERS = ("lora_rank", "seq_len", "micro_batch", "grad_accum", "num_gpus", "peak_gib")
NUMBER = re.compile(r"\d{1,3}(,\d{3})+|\d+(\.\d+)?([eE][+-]?\d+)?")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines. Raises UserError naming the first line that is none, and for a file
    without a row."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: {error}", hint="name a file of JSON lines") from error
    # A JSON text may hold U+2028 and the like as they are, which str.splitlines takes for ends of lines.
    lines = enumerate(text.split("\n"), 1)
    rows = [_row(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise UserError(
            f"{path}: no rows", hint="one JSON object a line, each with an id and what it measured"
        )
    return rows


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}", hint="one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: {line.strip()[:60]!r} is not a JSON object", hint="one JSON object a line")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise UserError(f"{place}: 'id' is {row.get('id')!r}, not a text", hint="give the row its id")
    return row


def with_numbers(row: Row) -> Row:
    """The row with its numbers as numbers where they were written as texts, or whole ones with a point."""
    config = row.get("config")
    found = {name: _number(row[name]) for name in NUMBERS if name in row}
    if isinstance(config, dict):
        found["config"] = {name: _number(value) for name, value in config.items()}
    return row | found


def _number(value: Any) -> Any:
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value.replace(",", ""))
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def measured(row: Row) -> float | Skipped:
    """The measured peak in GiB, or why there is none. row: `with_numbers`."""
    if row.get("outcome") not in (None, "ok"):
        return Skipped(f"no measured peak: the outcome is {row['outcome']}")
    peak = row.get("peak_gib")
    if peak is None:
        return Skipped("no measured peak")
    if isinstance(peak, bool) or not isinstance(peak, int | float) or not 0 < peak < math.inf:
        return Skipped(f"the measured peak is {peak!r}, not a number of GiB above 0")
    return float(peak)
