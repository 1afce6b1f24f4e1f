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
    work, disk, seconds = plan["work"], plan["disk"], plan["duration"]
    saved = [event["bytes"] for event in final_events(events, "checkpoint")]
    rows = [
        ("optimizer steps", work["steps"], result["steps"]),
        ("tokens", f"{work['tokens']:,}", f"{result['tokens']:,}"),
        ("supervised tokens", f"{work['supervised_tokens']:,}", f"{result['supervised_tokens']:,}"),
        ("time in steps", _time(seconds, "train_s"), duration_text(result["step_seconds"])),
        ("time in all", _time(seconds, "total_s"), duration_text(result["train_seconds"])),
        ("tokens/s", _rate(seconds), f"{result['tokens_per_s']:,.0f}"),
        ("a checkpoint", bytes_text(disk["checkpoint_bytes"]), bytes_text(max(saved)) if saved else "-"),
        _memory(plan, result["peak_gib"]),
    ]
    return "## Predicted beside measured\n\n" + _table(("", "predicted", "measured"), rows)


def _time(seconds: dict[str, Any] | None, name: str) -> str:
    return "-" if seconds is None else duration_text(seconds[name])


def _rate(seconds: dict[str, Any] | None) -> str:
    return "-" if seconds is None else f"{seconds['tokens_per_s']:,.0f}"


def _memory(plan: dict[str, Any], peak_gib: float) -> tuple[Any, ...]:
    """On a GPU the blocks that torch has allocated; on a CPU the process: its tensors, and what the program
    took before its model was loaded."""
    memory, measured = plan["memory"], f"{peak_gib:.2f} GiB"
    on_gpu = plan["machine"]["device"] == "cuda"
    name = "peak memory, allocated on the GPU" if on_gpu else "peak memory of the process"
    if memory is None:
        return name, "-", measured
    if on_gpu:
        return name, bytes_text(memory["allocated_bytes"]), measured
    tensors, program = memory["allocated_bytes"], plan["machine"]["base_bytes"]
    parts = f"{bytes_text(tensors)} of tensors, {bytes_text(program)} of the program"
    return name, f"{bytes_text(tensors + program)}: {parts}", measured


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
