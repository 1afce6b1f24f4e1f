"""`report.md` of a run: predicted beside measured, before beside after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.events import read_events
from tunesmith.core.units import bytes_text, duration_text
from tunesmith.train.metrics import final_events

WORST_ROWS = 5


def report(name: str, events: Path, plan: dict[str, Any], result: dict[str, Any]) -> str:
    """The page. plan: as in plan.json; result: the fields of the `end` event."""
    evals = final_events(events, "eval")
    parts = [
        f"# {name}\n",
        _measured(plan, result, events),
        _losses(evals, events),
        _samples(events),
        _trouble(events),
    ]
    return "\n".join(part for part in parts if part)


def _measured(plan: dict[str, Any], result: dict[str, Any], events: Path) -> str:
    work, disk = plan["work"], plan["disk"]
    saved = [event["bytes"] for event in final_events(events, "checkpoint")]
    predicted_s = "-" if work["seconds"] is None else duration_text(work["seconds"])
    rows = [
        ("optimizer steps", work["steps"], result["steps"]),
        ("tokens", f"{work['tokens']:,}", f"{result['tokens']:,}"),
        ("supervised tokens", f"{work['supervised_tokens']:,}", f"{result['supervised_tokens']:,}"),
        ("time in steps", predicted_s, duration_text(result["step_seconds"])),
        ("time in all", "-", duration_text(result["train_seconds"])),
        ("tokens/s", "-", f"{result['tokens_per_s']:,.0f}"),
        ("a checkpoint", bytes_text(disk["checkpoint_bytes"]), bytes_text(max(saved)) if saved else "-"),
        ("peak memory", "-", f"{result['peak_gib']:.2f} GiB"),
    ]
    return "## Predicted beside measured\n\n" + _table(("", "predicted", "measured"), rows)


def _losses(evals: list[dict[str, Any]], events: Path) -> str:
    steps = final_events(events, "step")
    rows: list[tuple[Any, ...]] = []
    if steps:
        first, last = steps[0], steps[-1]
        rows.append((f"training loss, step {first['step']} and {last['step']}", _loss(first), _loss(last)))
    if evals:
        rows.append(("held-out loss", _loss(evals[0]), _loss(evals[-1])))
    return "## Before beside after\n\n" + _table(("", "before", "after"), rows)


def _samples(events: Path) -> str:
    prompts: dict[str, list[str]] = {}
    for event in final_events(events, "sample"):
        prompts.setdefault(str(event["prompt"]), []).append(str(event["answer"]))
    rows = [(prompt, answers[0], answers[-1]) for prompt, answers in prompts.items()]
    return "## Answers\n\n" + _table(("prompt", "before", "after"), rows) if rows else ""


def _trouble(events: Path) -> str:
    """What did not go as planned, in the order in which it came; nothing when all did."""
    rows: list[tuple[Any, ...]] = []
    for event in read_events(events):
        if event["event"] == "resume":
            rows.append((event["step"], "the run was resumed"))
        elif event["event"] == "out_of_memory":
            told = f"micro-batches of more than {event['max_tokens']:,} tokens are cut from here on"
            rows.append((event["step"], f"out of memory: {told}"))
        elif event["event"] == "warning" and "step" in event:
            worst = ", ".join(str(row["row"]) for row in event.get("rows", [])[:WORST_ROWS])
            rows.append((event["step"], event["what"] + (f"; the worst rows: {worst}" if worst else "")))
    return "## What happened on the way\n\n" + _table(("step", "what"), rows) if rows else ""


def _loss(event: dict[str, Any]) -> str:
    return f"{float(event['loss']):.4f}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
