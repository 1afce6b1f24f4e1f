"""What the runs come to: medians, ratios, a table for the terminal and the loss curves as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from tunesmith.workflows.bench_flops import peak_flops
from tunesmith.workflows.bench_measure import Measured
from tunesmith.workflows.bench_peers import OURS

REFERENCE_RUN = "fp32 reference"
# A first loss further off means other rows, another mask or another template: not the same work.
SAME_FIRST_LOSS = 0.02
COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def summary(runs: Sequence[Measured], flops_per_token: float, gpu: str | None) -> dict[str, Any]:
    """Of one method: contenders (medians over their runs), the best peer, and ours against it.

    Losses are held to the fp32 reference, or to ours where it did not run.
    """
    names = list(dict.fromkeys(run.contender for run in runs))
    good = {run.contender: run.losses for run in reversed(runs) if not run.failure}
    reference = good.get(REFERENCE_RUN, good[OURS])
    found = {
        n: _contender([r for r in runs if r.contender == n], reference, flops_per_token, gpu) for n in names
    }
    ours = found[OURS]
    rivals = {n: c for n, c in found.items() if n not in (OURS, REFERENCE_RUN) and c.get("same_work")}
    best = max(rivals, key=lambda name: rivals[name]["tokens_per_s"], default=None)
    ratios = {n: _ratios(ours, c) for n, c in found.items() if n != OURS and not c.get("failure")}
    return {"contenders": found, "best_peer": best, "ours_over": ratios}


def _contender(
    runs: Sequence[Measured], reference: Sequence[float], flops_per_token: float, gpu: str | None
) -> dict[str, Any]:
    good = [run for run in runs if not run.failure]
    if not good:
        return {"failure": runs[0].failure}
    rate = statistics.median(run.tokens_per_s for run in good)
    off = _largest_difference([run.losses for run in good], reference)
    peak = peak_flops(gpu)
    gpu_peaks = [run.gpu_peak_gib for run in good if run.gpu_peak_gib is not None]
    return {
        "runs": len(good),
        "tokens_per_s": rate,
        "tokens_per_s_lowest": min(run.tokens_per_s for run in good),
        "tokens_per_s_highest": max(run.tokens_per_s for run in good),
        "tokens_per_cpu_s": statistics.median(run.tokens_per_cpu_s for run in good),
        "peak_gib": statistics.median(run.peak_gib for run in good),
        "gpu_peak_gib": statistics.median(gpu_peaks) if gpu_peaks else None,
        "first_step_s": statistics.median(run.first_step_s for run in good),
        "gflops": rate * flops_per_token / 1e9,
        "mfu": rate * flops_per_token / peak if peak else None,
        "losses": good[-1].losses,
        "loss_off_by": off,
        "same_work": abs(good[0].losses[0] - reference[0]) < SAME_FIRST_LOSS,
        "versions": dict(good[0].versions),
    }


def _largest_difference(curves: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    return max(abs(a - b) for curve in curves for a, b in zip(curve, reference, strict=True))


def _ratios(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_s": ours["tokens_per_s"] / other["tokens_per_s"],
        "tokens_per_cpu_s": ours["tokens_per_cpu_s"] / other["tokens_per_cpu_s"],
        "peak_gib": ours["peak_gib"] / other["peak_gib"],
    }


# -- for people -------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """One block a method: rate, rate by processor second, memory, first step, losses, ours over each."""
    lines: list[str] = []
    for method, part in found["methods"].items():
        head = ["tokens/s", "a CPU s", "peak GiB", "1st step s", "GFLOP/s", "loss off by", "ours over it"]
        lines += ["", f"{method:<22}" + "".join(f"{title:>13}" for title in head)]
        lines += [
            _line(name, entry, part["ours_over"].get(name)) for name, entry in part["contenders"].items()
        ]
        best = part["best_peer"]
        if best:
            over = part["ours_over"][best]
            lines.append(
                f"best peer {best}: ours {over['tokens_per_s']:.2f}x its tokens/s, "
                f"{over['peak_gib']:.2f}x its memory"
            )
    return "\n".join(lines).lstrip("\n")


def _line(name: str, entry: dict[str, Any], over: dict[str, float] | None) -> str:
    if entry.get("failure"):
        return f"{name:<22} failed: {entry['failure']}"
    cells = [
        f"{entry['tokens_per_s']:,.0f}",
        f"{entry['tokens_per_cpu_s']:,.0f}",
        f"{entry['peak_gib'] if entry['gpu_peak_gib'] is None else entry['gpu_peak_gib']:.2f}",
        f"{entry['first_step_s']:.1f}",
        f"{entry['gflops']:,.0f}",
        f"{entry['loss_off_by']:.4f}" if entry["same_work"] else "other work",
        f"{over['tokens_per_s']:.2f}x" if over else "",
    ]
    mfu = f"  MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
    return f"{name:<22}" + "".join(f"{cell:>13}" for cell in cells) + mfu


# -- the picture ------------------------------------------------------------------------------------------


def curves_svg(found: dict[str, Any]) -> str:
    """The loss curve of every contender, one panel a method, with tokens/s in the legend."""
    panels = list(found["methods"].items())
    width, height = 460, 340
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" height="{height}" '
        f'viewBox="0 0 {width * len(panels)} {height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (method, part) in enumerate(panels):
        drawn = {n: c for n, c in part["contenders"].items() if not c.get("failure")}
        parts.append(f'<g transform="translate({number * width},0)">{_panel(method, drawn)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(method: str, drawn: dict[str, Any]) -> str:
    left, right, top, bottom = 45, 440, 30, 210
    losses = [loss for entry in drawn.values() for loss in entry["losses"]]
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0

    def place(step: int, loss: float, steps: int) -> str:
        x = left + (right - left) * step / max(1, steps - 1)
        return f"{x:.1f},{bottom - (bottom - top) * (loss - low) / spread:.1f}"

    parts = [
        f'<text x="{left}" y="18" font-weight="bold">{escape(method)}: loss by step</text>',
        f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" fill="none" stroke="#888"/>',
        f'<text x="4" y="{top + 4}">{high:.2f}</text><text x="4" y="{bottom}">{low:.2f}</text>',
    ]
    for number, (name, entry) in enumerate(drawn.items()):
        color = COLORS[number % len(COLORS)]
        points = " ".join(place(s, v, len(entry["losses"])) for s, v in enumerate(entry["losses"]))
        text = f"{name}: {entry['tokens_per_s']:,.0f} tokens/s, {entry['peak_gib']:.1f} GiB"
        y = bottom + 22 + 14 * number
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5" opacity="0.8"/>',
            f'<rect x="{left}" y="{y - 9}" width="10" height="10" fill="{color}"/>',
            f'<text x="{left + 16}" y="{y}">{escape(text)}</text>',
        ]
    return "".join(parts)
