"""What a load came to: a table for the terminal, and times by load as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from tunesmith.workflows.bench_report import COLORS

HEAD = (
    "load",
    "requests",
    "failed",
    "unfinished",
    "tokens/s",
    "req/s",
    "first p50",
    "p95",
    "between p50",
    "p95",
    "whole p95",
)


def table(systems: Sequence[dict[str, Any]]) -> str:
    """One block a system: a line for every level; times to the first token in s, between tokens in ms."""
    lines: list[str] = []
    for system in systems:
        lines += ["", _title(system), "".join(f"{title:>13}" for title in HEAD)]
        lines += [_line(row) for row in system["levels"]]
        lines += [f"  {failure}" for row in system["levels"] for failure in row["failures"]]
    return "\n".join(lines).lstrip("\n")


def _title(system: dict[str, Any]) -> str:
    parts = [system["system"], f"{system['new_tokens']} new tokens"]
    parts += [f"ready in {system['ready_s']:.1f} s"] if "ready_s" in system else []
    parts += [f"peak {system['peak_gib']:.2f} GiB"] if "peak_gib" in system else []
    return ", ".join(parts)


def load_name(row: dict[str, Any]) -> str:
    return f"{row['concurrency']} clients" if row["mode"] == "closed" else f"{row['rate']:g} req/s"


def _line(row: dict[str, Any]) -> str:
    first, between, whole = row["first_token_s"], row["between_tokens_s"], row["whole_s"]
    cells = [
        load_name(row),
        str(row["requests"]),
        str(row["failed"]),
        str(row["unfinished"]),
        f"{row['tokens_per_s']:.1f}",
        f"{row['requests_per_s']:.2f}",
        *(f"{first[q]:.2f}" if first else "" for q in ("p50", "p95")),
        *(f"{between[q] * 1000:.1f}" if between else "" for q in ("p50", "p95")),
        f"{whole['p95']:.2f}" if whole else "",
    ]
    return "".join(f"{cell:>13}" for cell in cells)


def curves_svg(systems: Sequence[dict[str, Any]]) -> str:
    """Output tokens/s and time to the first token (p50 solid, p95 dashed) by load, a colour a system."""
    rows = [row for system in systems for row in system["levels"]]
    loads = list(dict.fromkeys(load_name(row) for row in rows))
    height = 300 + 14 * len(systems)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}" viewBox="0 0 920 {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _panel(systems, loads, 0, "output tokens/s", [(lambda row: row["tokens_per_s"], "")]),
        _panel(
            systems,
            loads,
            460,
            "first token, s (p95 dashed)",
            [(lambda row: _of(row, "p50"), ""), (lambda row: _of(row, "p95"), ' stroke-dasharray="4 3"')],
        ),
    ]
    for number, system in enumerate(systems):
        y = 290 + 14 * number
        parts.append(f'<rect x="50" y="{y - 9}" width="10" height="10" fill="{_color(number)}"/>')
        parts.append(f'<text x="66" y="{y}">{escape(_title(system))}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _of(row: dict[str, Any], quantile: str) -> float:
    return float((row["first_token_s"] or {}).get(quantile, 0.0))


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _panel(
    systems: Sequence[dict[str, Any]],
    loads: Sequence[str],
    x0: int,
    title: str,
    series: Sequence[tuple[Any, str]],
) -> str:
    left, right, top, bottom = x0 + 50, x0 + 440, 30, 240
    rows = [row for system in systems for row in system["levels"]]
    most = max((value(row) for value, _ in series for row in rows), default=0.0) or 1.0
    step = (right - left - 20) / max(1, len(loads) - 1)

    def place(row: dict[str, Any], number: float) -> str:
        x = left + 10 + step * loads.index(load_name(row))
        return f"{x:.1f},{bottom - (bottom - top) * number / most:.1f}"

    parts = [
        f'<text x="{left}" y="18" font-weight="bold">{escape(title)}</text>',
        f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" fill="none" stroke="#888"/>',
        f'<text x="{x0 + 4}" y="{top + 4}">{most:.3g}</text><text x="{x0 + 4}" y="{bottom}">0</text>',
    ]
    for number, load in enumerate(loads):
        x = left + 10 + step * number
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(load)}</text>')
    for number, system in enumerate(systems):
        for value, dash in series:
            points = " ".join(place(row, value(row)) for row in system["levels"])
            stroke = f'stroke="{_color(number)}" stroke-width="1.5"{dash}'
            parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
    return "\n".join(parts)
