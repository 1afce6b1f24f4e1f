"""A plan as text: paragraphs of at most 100 columns, each line one thing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.core.units import GIB, bytes_text, duration_text
from tunesmith.plan.duration import TimePlan
from tunesmith.plan.memory import MemoryPlan
from tunesmith.plan.timeline import CATEGORIES
from tunesmith.workflows.plan import RunPlan, remedy_text
from tunesmith.workflows.plan_machine import Machine
from tunesmith.workflows.plan_subject import counts_of

WIDTH = 100
HEAD = 11  # columns of a line's name
MIB = 1 << 20


def plan_lines(plan: RunPlan) -> list[str]:
    """The whole plan, samples left out, a title line first."""
    parts = (
        _title(plan),
        _rows(plan),
        _steps(plan),
        memory_lines(plan),
        _time(plan),
        _disk(plan),
        _serving(plan),
        _warnings(plan),
        _end(plan),
    )
    return [line for part in parts for line in part]


def short_lines(plan: RunPlan) -> list[str]:
    """What training says of its plan before it begins."""
    work, size = plan.work, plan.size
    trained = f"{size.trained_parameters:,} of {size.parameters:,} parameters trained"
    lines = [f"plan: {_work_text(plan)}, {trained}"] if work.steps else []
    if plan.earlier is not None:
        lines.append("memory and time: as planned when the run began")
    if plan.memory is not None:
        lines.append(f"memory: {memory_text(plan.subject.machine, plan.memory)}: {plan.verdict}")
    lines += plan.unknown
    if plan.duration is not None:
        lines.append(f"time: {plan.duration.text()}")
    lines.append(f"disk: {plan.disk.text()}")
    return lines


def _title(plan: RunPlan) -> Iterator[str]:
    recipe, size = plan.subject.recipe, plan.size
    method = recipe.method
    kind = "all weights" if method.type == "full" else f"{method.type} of rank {method.rank}"
    yield from _named(
        "model",
        f"{plan.subject.model.name}: {count_text(size.base_parameters)} parameters; {kind}: "
        f"{count_text(size.trained_parameters)} trained "
        f"({size.trained_parameters / size.base_parameters:.2%}); "
        f"{recipe.train.precision}, {recipe.train.optimizer}, checkpointing "
        f"{recipe.train.gradient_checkpointing}",
    )
    yield from _named("machine", _machine_text(plan))


def _machine_text(plan: RunPlan) -> str:
    machine, recipe = plan.subject.machine, plan.subject.recipe
    if machine.device == "cpu":
        text = f"this machine's CPU, {recipe.hardware.threads} threads, {bytes_text(machine.capacity_bytes)}"
        return text + " of memory with swap" * (machine.host is not None and not machine.host.limited)
    many = f"{machine.processes} x " if machine.processes > 1 else ""
    engine = f", {recipe.parallel.engine}" if machine.processes > 1 else ""
    return f"{many}{machine.name}, {bytes_text(machine.capacity_bytes)} of memory{engine}"


def _rows(plan: RunPlan) -> Iterator[str]:
    data = plan.subject.data
    if data is None:
        return
    for counts in data.prepared.counts:
        lost = {
            "too long": counts.dropped,
            "truncated": counts.truncated,
            "empty": counts.empty,
            "duplicate": counts.duplicate,
            "without an answer": counts.unsupervised,
        }
        told = ", ".join(f"{number:,} {name}" for name, number in lost.items() if number)
        yield from _named(
            "rows",
            f"{counts.file}: {counts.format}, {counts.kept:,} of {counts.rows:,} kept"
            + (f" ({told})" if told else "")
            + f"; {counts.tokens_kept:,} tokens, {counts.tokens_supervised:,} of them learned",
        )
    found = counts_of(data)
    packing = found.get("packing", {"on": False})
    packs = f"packs {packing['efficiency']:.0%} full" if packing["on"] else "no packing"
    yield from _named(
        "",
        f"{found['train_rows']:,} to train on, {found['eval_rows']:,} held out; longest row "
        f"{found['longest_row']:,} tokens, mean {found['mean_row']:,.0f}; {packs}",
    )


def _steps(plan: RunPlan) -> Iterator[str]:
    train, work = plan.subject.recipe.train, plan.work
    if work.steps is not None:
        yield from _named("steps", _work_text(plan))
    batch = f"largest micro-batch {work.batch_tokens:,} tokens, {work.batch_supervised:,} of them learned"
    yield from _named(
        "" if work.steps is not None else "steps",
        f"{batch}; {train.micro_batch_size} x {train.grad_accumulation} "
        f"{'packs' if plan.subject.recipe.data.packing else 'rows'} a step",
    )


def _work_text(plan: RunPlan) -> str:
    work = plan.work
    if work.tokens is None:
        return f"{work.steps:,} steps"
    return (
        f"{work.steps:,} steps, {work.passes:.4g} passes over the rows, {work.tokens:,} tokens "
        f"({work.supervised_tokens:,} supervised)"
    )


# -- memory -----------------------------------------------------------------------------------------------


def memory_lines(plan: RunPlan) -> Iterator[str]:
    """The table: what is live at the fullest moment of every phase, and what is needed in all."""
    memory, machine = plan.memory, plan.subject.machine
    if memory is None:
        return
    yield from _named("memory", f"{memory_text(machine, memory)}: {plan.verdict}")
    yield ""
    yield from memory_table(memory)
    yield ""
    yield from _named("", _sum_text(machine, memory))
    if memory.host_bytes or memory.pinned_bytes:
        yield from _named("", _host_text(machine, memory))


def memory_text(machine: Machine, memory: MemoryPlan) -> str:
    """Need against capacity, in one line."""
    each = " each" if machine.processes > 1 and machine.device == "cuda" else ""
    free = ""
    if machine.free_bytes is not None and machine.free_bytes < machine.needed_bytes(memory):
        free = f" ({bytes_text(machine.free_bytes)} free at the moment)"
    return (
        f"{bytes_text(machine.needed_bytes(memory))} needed{each} of "
        f"{bytes_text(machine.capacity_bytes)}{free}, "
        f"fullest in {memory.binding.phase}"
    )


def memory_table(memory: MemoryPlan) -> list[str]:
    """Rows: what takes it; columns: the fullest moment of each phase, the binding one marked."""
    unit, name = (GIB, "GiB") if memory.allocated_bytes >= GIB else (MIB, "MiB")
    binding = memory.binding
    head = [name, *(f"{m.phase}{'*' if m is binding else ''}" for m in memory.moments)]
    rows = [
        [category, *(_cell(m.parts.get(category, 0), unit) for m in memory.moments)]
        for category in CATEGORIES
        if any(m.parts.get(category) for m in memory.moments)
    ]
    rows.append(["in all", *(_cell(m.num_bytes, unit) for m in memory.moments)])
    return table([head, *rows])


def _cell(num_bytes: int, unit: int) -> str:
    return f"{num_bytes / unit:,.2f}" if num_bytes else "-"


def _sum_text(machine: Machine, memory: MemoryPlan) -> str:
    if machine.device == "cpu":
        parts = [
            f"{bytes_text(memory.allocated_bytes)} of tensors",
            f"{bytes_text(machine.base_bytes)} of the program",
        ]
        text = " + ".join(parts)
        return f"{machine.processes} processes x ({text})" if machine.processes > 1 else text
    kept = memory.reserved_bytes - memory.allocated_bytes
    parts = [
        f"{bytes_text(memory.allocated_bytes)} of tensors",
        *([f"{bytes_text(kept)} kept by the allocator"] if kept else []),
        f"{bytes_text(memory.context_bytes)} of CUDA",
        f"{bytes_text(memory.margin_bytes)} margin",
    ]
    return " + ".join(parts)


def _host_text(machine: Machine, memory: MemoryPlan) -> str:
    found = f"host memory: {bytes_text(machine.host_bytes(memory))}"
    if memory.pinned_bytes:
        found += f", {bytes_text(machine.processes * memory.pinned_bytes)} of it pinned"
    return found + (f", of {bytes_text(machine.host.total_bytes)}" if machine.host is not None else "")


# -- time, disk, warnings, end ----------------------------------------------------------------------------


def _time(plan: RunPlan) -> Iterator[str]:
    time = plan.duration
    if time is None:
        return
    yield from _named("time", time.text() if plan.work.steps else step_text(time))


def step_text(time: TimePlan) -> str:
    """Of a run whose steps nobody knows."""
    return (
        f"{duration_text(time.step_s)} a step ({time.low_s:.3g} to {time.high_s:.3g} s, by {time.source}), "
        f"{time.tokens_per_s:,.0f} tokens/s"
    )


def _disk(plan: RunPlan) -> Iterator[str]:
    here = plan.subject.machine.here
    for number, system in enumerate(plan.disk.systems):
        fits = ("" if system.fits else ": does not fit") if here else " of this machine"
        sizes = f"{bytes_text(system.needed_bytes)} needed, {bytes_text(system.free_bytes)} free"
        yield from _named("disk" if number == 0 else "", f"{sizes} at {system.folder}{fits}")
    told = [
        f"{bytes_text(p.num_bytes)} for {p.what}" for p in plan.disk.parts if p.kind == "run" and p.num_bytes
    ]
    yield from _named("", "; ".join(told))
    later = [f"{bytes_text(p.num_bytes)} for a {p.what}" for p in plan.disk.parts if p.kind == "later"]
    yield from _named("", f"if wanted later: {'; '.join(later)}")


def _serving(plan: RunPlan) -> Iterator[str]:
    if plan.serving is not None:
        yield from _named("serving", plan.serving.sentence())


def _warnings(plan: RunPlan) -> Iterator[str]:
    for warning in plan.warnings:
        yield from _named("warning", warning.what)
        if warning.remedy:
            yield from _named("", f"remedy: {warning.remedy}")
    for note in (*plan.subject.notes, *plan.unknown):
        yield from _named("note", note)


def _end(plan: RunPlan) -> Iterator[str]:
    yield ""
    full = plan.disk.full if plan.subject.machine.here else None
    if full is not None:
        lack = bytes_text(full.needed_bytes - full.free_bytes)
        yield f"does not fit: the disk of {full.folder} lacks {lack}"
    if plan.memory is None:
        yield "memory is not known; the rest fits" if full is None else "memory is not known"
    elif full is None or plan.verdict == "does not fit":
        yield plan.verdict
    if plan.remedy is not None:
        yield ""
        for line in remedy_text(plan.remedy).splitlines():
            yield from textwrap.wrap(line, WIDTH, break_on_hyphens=False) if line[:1].islower() else [line]


# -- layout -----------------------------------------------------------------------------------------------


def _named(name: str, text: str) -> Iterator[str]:
    """A line with its name before it, wrapped."""
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:<{HEAD}}",
        subsequent_indent=" " * HEAD,
        break_on_hyphens=False,
        break_long_words=False,
    )


def table(rows: Sequence[Sequence[Any]], *, left: int = 1) -> list[str]:
    """Cells in columns, the first `left` of them to the left, the others to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            f"{value:<{width}}" if column < left else f"{value:>{width}}"
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def count_text(number: int) -> str:
    """`134515008` -> `134.5 M`."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
