"""`tunesmith plan --facts`: published memory peaks, each predicted from its configuration and set beside."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.paths import write_text
from tunesmith.plan.facts import Scored, percentile, score, summary
from tunesmith.plan.facts_rows import read_rows

HEAD = "| row | stack | predicted GiB | measured GiB | error |\n|---|---|---:|---:|---:|"


def plan_facts(
    path: Path, *, table: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Predict every row of a file of JSON lines. Returns what `--json` prints (`plan.facts.summary`).

    table: writes there the table of every row as Markdown. progress: told every row as it is done.
    Raises UserError, naming the line, for a file that is not such rows.
    """
    rows = read_rows(path)
    done = []
    for number, row in enumerate(rows, 1):
        scored = score(row)
        done.append(scored)
        progress(f"{number}/{len(rows)} {scored.id}: {_outcome(scored)}")
    if table is not None:
        write_text(table, table_markdown(done))
    return summary(done)


def _outcome(scored: Scored) -> str:
    if scored.skipped is not None:
        return f"skipped: {scored.skipped}"
    return f"{scored.predicted_gib:.2f} GiB, measured {scored.measured_gib:.2f} ({_percent(scored.error)})"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.2%}"


def table_markdown(rows: Sequence[Scored]) -> str:
    """A table of families, one of every row predicted, and one of the reasons of those that were not."""
    families: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        families[family(row)].append(row)
    parts = [_families(families), f"{HEAD}\n" + "\n".join(_line(r) for r in rows if r.skipped is None)]
    return "\n\n".join([*parts, _reasons(rows)]) + "\n"


def family(row: Scored) -> str:
    """The publisher of a row: what stands before the first blank, `scripts` or comma of its source."""
    source = str(row.row.get("source") or row.id)
    return re.split(r"[ ,;]", source, maxsplit=1)[0]


def _families(families: dict[str, list[Scored]]) -> str:
    lines = [
        "| published by | rows | predicted | median error | 90% within | worst |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in families.items():
        errors = sorted(abs(row.error) for row in rows if row.error is not None)
        found = [percentile(errors, 0.5), percentile(errors, 0.9), errors[-1] if errors else None]
        figures = " | ".join("" if value is None else f"{value:.2%}" for value in found)
        lines.append(f"| {name} | {len(rows)} | {len(errors)} | {figures} |")
    return "\n".join(lines)


def _line(scored: Scored) -> str:
    return (
        f"| {scored.id} | {_stack(scored.row)} | {scored.predicted_gib:.3f} | {scored.measured_gib:.3f} | "
        f"{_percent(scored.error)} |"
    )


def _stack(row: dict[str, Any]) -> str:
    """Figures of the configuration in a few words."""
    size = f"{row.get('micro_batch')} x {row.get('seq_len')}" if row.get("seq_len") else ""
    gpus = f"{row['num_gpus']} GPUs" if (row.get("num_gpus") or 1) != 1 else ""
    words = [row.get("model"), row.get("method"), size, gpus]
    return ", ".join(str(word) for word in words if word)


def _reasons(rows: Sequence[Scored]) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.skipped is not None:
            reasons[row.skipped].append(row.id)
    lines = ["| skipped because | rows | the first |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {why} | {len(ids)} | {ids[0]} |" for why, ids in reasons.items())])
