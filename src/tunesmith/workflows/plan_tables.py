"""Tables of what fits: all methods for one model on one card, and all sizes of models on all cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from tunesmith.core.cpu import physical_cores
from tunesmith.core.errors import UserError
from tunesmith.core.forks import side_by_side
from tunesmith.core.progress import say
from tunesmith.core.units import GIB
from tunesmith.plan import fit
from tunesmith.plan.cards import Card, card_named
from tunesmith.plan.changes import applied
from tunesmith.plan.sizes import config_of
from tunesmith.plan.timeline import Category
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_fit import Case, target_of
from tunesmith.workflows.plan_machine import named_machine
from tunesmith.workflows.plan_memory import full_batch
from tunesmith.workflows.plan_step import Work

# Settings that are of one way of training alone: back to what they are when nobody gives them.
PLAIN: Mapping[str, Any] = {
    "method.rslora": False,
    "method.dora": False,
    "method.lora_plus_ratio": None,
    "method.modules_to_save": [],
    "method.freeze": [],
    "train.memory": "normal",
    "train.lr": "auto",
    "train.optimizer": "adamw",
    "train.precision": "auto",
    "train.stochastic_rounding": False,
    "train.optimizer_in_backward": False,
    "train.activation_offload": False,
    "train.micro_batch_size": 1,
}
PURE = {"train.precision": "bf16-pure", "train.stochastic_rounding": True}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full, fp32": {"method.type": "full", "train.precision": "fp32"},
    "full, 16-bit products": {"method.type": "full"},
    "full, bf16 weights": {"method.type": "full", **PURE},
    "full, bf16 weights, 8-bit averages": {"method.type": "full", **PURE, "train.optimizer": "adamw-8bit"},
    "LoRA": {"method.type": "lora"},
    "QLoRA": {"method.type": "qlora"},
}
# The chart's methods, from the best on, all with activations computed again.
CHART: Mapping[str, Mapping[str, Any]] = {
    "full": METHODS["full, 16-bit products"],
    "low": METHODS["full, bf16 weights, 8-bit averages"],
    "LoRA": METHODS["LoRA"],
    "QLoRA": METHODS["QLoRA"],
}
CHART_SIZES = (
    "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b",
    "llama-3.1-70b",
)  # fmt: skip
CHART_CARDS = (
    "rtx3060", "t4", "rtx4080", "rtx3090", "rtx5090", "l40s", "a100-40", "a100-80", "h100", "h200", "b200",
)  # fmt: skip
CHART_LENGTH = 2048
# What does not depend on the number of packs.
STATES: tuple[Category, ...] = ("weights", "quantised weights", "gradients", "optimizer state")
MOST_PROCESSES = 4  # each takes some hundred MiB


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A way of training. needed_bytes: with one pack at a time; at_least: it is that much and more, which is
    not looked into; micro_batch_size: the most packs at once that fit, 0 if none does; tokens_per_s: of one
    process with as many, where the card's rates are known."""

    method: str
    checkpointing: str
    needed_bytes: int
    at_least: bool
    fits: bool
    micro_batch_size: int
    tokens_per_s: float | None

    def cells(self) -> tuple[str, ...]:
        need = f"{'> ' if self.at_least else ''}{self.needed_bytes / GIB:,.1f}"
        speed = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        return (
            self.method,
            self.checkpointing,
            need,
            "yes" if self.fits else "no",
            str(self.micro_batch_size or "-"),
            speed,
        )

    def text(self) -> str:
        """One line, for whoever waits for the table."""
        _, _, need, _, most, speed = self.cells()
        fits = f"{most} packs at most, {speed} tokens/s" if self.fits else "does not fit"
        return f"{self.method}, checkpointing {self.checkpointing}: {need} GiB, {fits}"


@dataclass(frozen=True, kw_only=True)
class MethodTable:
    """All ways of training one model on one machine. length: tokens of a pack."""

    machine: str
    capacity_bytes: int
    length: int
    rows: tuple[MethodRow, ...]

    HEAD = ("method", "checkpointing", "GiB at 1", "fits", "most packs", "tokens/s")

    def cells(self) -> list[tuple[str, ...]]:
        """The table with its head."""
        return [self.HEAD, *(row.cells() for row in self.rows)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}


def method_table(case: Case, methods: Sequence[str] = tuple(METHODS)) -> MethodTable:
    """The methods side by side for the case's recipe, at its length; each row is told when it is known.

    Raises UserError for a recipe that cannot work.
    """
    capacity = target_of(case).capacity_bytes
    resolved = target_of(case).resolve(applied(case.recipe, {**PLAIN, **METHODS["LoRA"]}))
    length = resolved.data.max_length
    assert length != "auto"
    jobs = [
        partial(_row_of, case, length, name, checkpointing)
        for name in methods
        for checkpointing in ("none", "full")
    ]
    rows: dict[int, MethodRow] = {}
    for number, row in side_by_side(jobs, _processes()):
        if row is not None:
            say(row.text())
            rows[number] = row
    ordered = tuple(rows[number] for number in sorted(rows))
    return MethodTable(machine=case.machine.name, capacity_bytes=capacity, length=length, rows=ordered)


def _processes() -> int:
    """That trace side by side: a copy of a process that uses a GPU could not."""
    return 1 if torch.cuda.is_initialized() else min(MOST_PROCESSES, physical_cores())


def _row_of(case: Case, length: int, name: str, checkpointing: str) -> MethodRow | None:
    """None for what the recipe's other settings forbid."""
    settings = {**PLAIN, **METHODS[name], "train.gradient_checkpointing": checkpointing}
    work = replace(case.work, batch=full_batch(length, 1))
    one = replace(case, recipe=applied(case.recipe, settings), work=work, data=None, traces={}, works={})
    try:
        return _row(one, name, checkpointing)
    except UserError:
        return None


def _row(case: Case, name: str, checkpointing: str) -> MethodRow:
    target = target_of(case)
    resolved, room = target.resolve(case.recipe), target.capacity_bytes
    floor = target.floor(resolved)
    if floor > room:
        return MethodRow(
            method=name,
            checkpointing=checkpointing,
            needed_bytes=floor,
            at_least=True,
            fits=False,
            micro_batch_size=0,
            tokens_per_s=None,
        )

    def at_once(number: int) -> Recipe:
        return target.resolve(applied(case.recipe, {"train.micro_batch_size": number}))

    def need_of(number: int) -> fit.Need:
        many = at_once(number)
        moments = case.traced(many).memory.moments
        parts = {moment.phase: moment.num_bytes for moment in moments}
        fixed = {m.phase: sum(m.parts.get(category, 0) for category in STATES) for m in moments}
        return fit.Need(target.need(many), parts, fixed)

    need = target.need(resolved)
    size = fit.largest(need_of, room)
    speed = target.speed(at_once(size)) if size and target.speed is not None else None
    return MethodRow(
        method=name,
        checkpointing=checkpointing,
        needed_bytes=need,
        at_least=False,
        fits=need <= room,
        micro_batch_size=size,
        tokens_per_s=speed,
    )


# -- the chart ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that torch reserves, margin included, without the card's CUDA context. at_least: it is that much
    and more, which is more than any card of the chart has, and is not looked into."""

    num_bytes: int
    at_least: bool = False

    def text(self) -> str:
        return f"{'> ' if self.at_least else ''}{self.num_bytes / GIB:,.1f}"


@dataclass(frozen=True, kw_only=True)
class CardTable:
    """Which models fit which cards. needs: {model: {method: need}}, whatever the card; best: {model: {card:
    the best method that fits, or None}}."""

    length: int
    cards: tuple[str, ...]
    needs: Mapping[str, Mapping[str, Need]]
    best: Mapping[str, Mapping[str, str | None]]

    def cells(self) -> list[tuple[str, ...]]:
        """The chart with its head."""
        rows = [(name, *(best[card] or "-" for card in self.cards)) for name, best in self.best.items()]
        return [("model", *self.cards), *rows]

    def need_cells(self) -> list[tuple[str, ...]]:
        """What each method needs, in GiB, with its head."""
        rows = [(name, *(need.text() for need in needs.values())) for name, needs in self.needs.items()]
        return [("model", *CHART), *rows]

    def as_dict(self) -> dict[str, Any]:
        needs = {name: {m: asdict(need) for m, need in found.items()} for name, found in self.needs.items()}
        return {"length": self.length, "cards": list(self.cards), "needs": needs, "best": self.best}


def card_table(
    sizes: Sequence[str] = CHART_SIZES, cards: Sequence[str] = CHART_CARDS, *, length: int = CHART_LENGTH
) -> CardTable:
    """The chart: for every model of `sizes` and card of `cards` the best method that fits, with micro-batches
    of one pack of `length` tokens and activations computed again.

    Every model and method is traced once, for what it needs does not depend on the card. Raises UserError for
    names that are not in the tables.
    """
    known = {name: card_named(name) for name in cards}
    largest_card = max(known.values(), key=lambda card: card.room_bytes)
    jobs = [partial(_needs, name, length, largest_card) for name in sizes]
    found = dict(side_by_side(jobs, _processes()))
    needs = {name: found[number] for number, name in enumerate(sizes)}
    best = {name: {card: _best(needs[name], known[card]) for card in cards} for name in sizes}
    return CardTable(length=length, cards=tuple(cards), needs=needs, best=best)


def _needs(name: str, length: int, largest_card: Card) -> dict[str, Need]:
    base = Recipe.model_validate({"model": {"path": name}, "data": {"sources": [{"path": "rows"}]}})
    settings = {**PLAIN, "data.max_length": length, "train.gradient_checkpointing": "full"}
    machine = named_machine(largest_card.name)
    config, work = config_of(name), Work(batch=full_batch(length, 1))
    found = {}
    for method, more in CHART.items():
        recipe = applied(base, {**settings, **more})
        case = Case(recipe=recipe, machine=machine, config=config, work=work, timed=False)
        found[method] = _need(case, largest_card)
    say(f"{name}: " + ", ".join(f"{method} {need.text()} GiB" for method, need in found.items()))
    return found


def _need(case: Case, largest_card: Card) -> Need:
    target = target_of(case)
    resolved = target.resolve(case.recipe)
    floor = target.floor(resolved)
    if floor > largest_card.room_bytes:
        return Need(num_bytes=floor, at_least=True)
    memory = case.traced(resolved).memory
    return Need(num_bytes=memory.reserved_bytes + memory.margin_bytes)


def _best(needs: Mapping[str, Need], card: Card) -> str | None:
    return next((method for method, need in needs.items() if need.num_bytes <= card.room_bytes), None)
