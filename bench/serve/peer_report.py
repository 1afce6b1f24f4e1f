"""What the comparison came to: medians over the repetitions, ratios, a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tunesmith.workflows.bench_serve_report import load_name

Row = dict[str, Any]


def summary(runs: Sequence[Row]) -> Row:
    """One system: the median of every figure over its runs, and of tokens/s also the least and the most."""
    last = runs[-1]
    each = [[run["levels"][number] for run in runs] for number in range(len(last["levels"]))]
    return last | {
        "runs": len(runs),
        "ready_s": statistics.median(run["ready_s"] for run in runs),
        "peak_gib": max(run["peak_gib"] for run in runs),
        "greedy": next(run["greedy"] for run in runs if run["greedy"]),
        "levels": [_level(rows) for rows in each],
    }


def _level(rows: Sequence[Row]) -> Row:
    rates = [row["tokens_per_s"] for row in rows]
    times = ("first_token_s", "between_tokens_s", "whole_s")
    middle = {name: _times([row[name] for row in rows if row[name]]) for name in times}
    counts = {name: sum(row[name] for row in rows) for name in ("requests", "failed", "unfinished")}
    failures = sorted({text for row in rows for text in row["failures"]})
    low_high = {"least_tokens_per_s": min(rates), "most_tokens_per_s": max(rates)}
    rate = {"tokens_per_s": statistics.median(rates)} | low_high
    return rows[-1] | middle | counts | rate | {"failures": failures, "sent": rows[-1]["requests"]}


def _times(found: Sequence[dict[str, float]]) -> dict[str, float] | None:
    if not found:
        return None
    return {name: statistics.median(times[name] for times in found) for name in found[0]}


def ratios(systems: Sequence[Row], ours: str) -> dict[str, dict[str, float]]:
    """Ours over each other system, in tokens/s, by level; of a level that was cut, what came counts."""
    mine = next((system for system in systems if system["system"] == ours), None)
    if mine is None:
        return {}
    return {
        other["system"]: {
            load_name(theirs): round(level["tokens_per_s"] / theirs["tokens_per_s"], 2)
            for level, theirs in zip(mine["levels"], other["levels"], strict=True)
            if theirs["tokens_per_s"]
        }
        for other in systems
        if other is not mine
    }


def markdown(result: Row) -> str:
    lines = [
        f"{result['date']}, {result['machine']}, {result['threads']} threads.",
        "",
        f"`{result['command']}`",
        "",
        *_rates(result),
        "",
        *_latencies(result),
        "",
        *(f"- {system['system']}: {_versions(system)}; {system['way']}" for system in result["systems"]),
        *(f"- {name}: not measured: {why}" for name, why in result["failures"].items()),
    ]
    return "\n".join(lines) + "\n"


def _rates(result: Row) -> list[str]:
    loads = [load_name(row) for row in result["systems"][0]["levels"]] if result["systems"] else []
    head = ["output tokens/s", *loads, "ready s", "peak GiB (PSS)", "greedy against fp32", "runs"]
    lines = [_row(head), _row(["---"] * len(head))]
    for system in result["systems"]:
        over = result["ours_over"].get(system["system"], {})
        cells = [_rate(row, over.get(load_name(row))) for row in system["levels"]]
        rest = [
            f"{system['ready_s']:.1f}",
            f"{system['peak_gib']:.2f}",
            system["greedy"],
            str(system["runs"]),
        ]
        lines.append(_row([system["system"], *cells, *rest]))
    return [*lines, "", "In brackets: least and most of the runs. x: ours over it."]


def _rate(row: Row, ratio: float | None) -> str:
    text = f"{row['tokens_per_s']:.1f} ({row['least_tokens_per_s']:.1f}–{row['most_tokens_per_s']:.1f})"
    text += f", {ratio:g}x" if ratio else ""
    for what in ("failed", "unfinished"):
        text += f", {row[what]} of {row['requests']} {what}" if row[what] else ""
    return text


def _latencies(result: Row) -> list[str]:
    head = ["clients", "requests", "system", "first token s p50", "p95", "between tokens ms p50", "p95"]
    lines = [_row(head), _row(["---"] * len(head))]
    for number in range(len(result["systems"][0]["levels"]) if result["systems"] else 0):
        for system in result["systems"]:
            row = system["levels"][number]
            first = _cells(row["first_token_s"], 1, "{:.2f}")
            between = _cells(row["between_tokens_s"], 1000, "{:.1f}")
            lines.append(_row([row["concurrency"], row["sent"], system["system"], *first, *between]))
    return lines


def _cells(times: dict[str, float] | None, scale: float, form: str) -> list[str]:
    return [form.format(times[q] * scale) if times else "" for q in ("p50", "p95")]


def _versions(system: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in system["versions"].items())


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
