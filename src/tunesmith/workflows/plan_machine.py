"""The machine that a plan is for: this one, or one with cards that are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.memory import HostMemory, host_memory, process_bytes
from tunesmith.core.units import GIB
from tunesmith.model.hardware import pick_device
from tunesmith.plan.cards import Card, card_named, this_card
from tunesmith.plan.host_memory import machine_bytes
from tunesmith.plan.memory import MemoryPlan
from tunesmith.recipe.resolve import Facts
from tunesmith.recipe.schema import Precision, Recipe
from tunesmith.workflows.resume import facts_for

MIB = 1 << 20
BF16_CAPABILITY = (8, 0)  # Ampere: the first that multiplies bf16
Verdict = Literal["fits", "tight", "does not fit", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is planned for.

    capacity_bytes: of one card, or of this machine's memory with swap, a container's limit counted;
    free_bytes: of it now, None on a machine that is not this one; base_bytes: of the process itself beside
    its tensors (a CPU); context_bytes: of CUDA on the card; card: its table entry, if it has one;
    host: this machine's memory, None for another.
    """

    device: Literal["cpu", "cuda"]
    name: str
    capacity_bytes: int
    free_bytes: int | None = None
    base_bytes: int = 0
    context_bytes: int | None = None
    processes: int = 1
    card: Card | None = None
    host: HostMemory | None = None

    @property
    def here(self) -> bool:
        return self.host is not None

    def needed_bytes(self, memory: MemoryPlan) -> int:
        """Of a card by one process; of a CPU's memory by all of them."""
        if self.device == "cuda":
            return memory.needed_bytes
        return self.processes * (memory.needed_bytes + self.base_bytes)

    def verdict(self, memory: MemoryPlan | None) -> Verdict:
        """tight: it fits, but not with the margin, or not in what is free at the moment."""
        if memory is None:
            return "unknown"
        needed = self.needed_bytes(memory)
        if needed - memory.margin_bytes > self.capacity_bytes or not self._host_suffices(memory):
            return "does not fit"
        room = self.capacity_bytes if self.free_bytes is None else self.free_bytes
        return "fits" if needed <= room else "tight"

    def host_bytes(self, memory: MemoryPlan) -> int:
        """Host memory that all processes take for what they load, keep off their cards or gather to save."""
        return max(machine_bytes(memory.host_by_phase, processes=self.processes).values(), default=0)

    def _host_suffices(self, memory: MemoryPlan) -> bool:
        return self.device == "cpu" or self.host is None or self.host_bytes(memory) <= self.host.total_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "name": self.name,
            "processes": self.processes,
            "capacity_bytes": self.capacity_bytes,
            "free_bytes": self.free_bytes,
            "base_bytes": self.base_bytes,
            "host_bytes": None if self.host is None else self.host.total_bytes,
            "here": self.here,
        }


def this_machine(device: Literal["cpu", "cuda"], *, processes: int = 1) -> Machine:
    """The machine that this process runs on. processes: of the run on it."""
    host = host_memory()
    if device == "cpu":
        # What this process takes now, pages of libraries included, it takes while it trains.
        return Machine(
            device="cpu",
            name="the memory of this machine" + (" (a container's limit)" if host.limited else ""),
            capacity_bytes=host.total_bytes,
            free_bytes=host.free_bytes + process_bytes(),
            base_bytes=process_bytes(),
            processes=processes,
            host=host,
        )
    free, total = torch.cuda.mem_get_info()
    card = this_card()
    # What this process has of the card by now, its context too, is the training's own.
    context = None if card is None else int(card.context_mib * MIB)
    return Machine(
        device="cuda",
        name=torch.cuda.get_device_name(),
        capacity_bytes=total,
        free_bytes=min(total, free + torch.cuda.memory_reserved() + (context or 0)),
        context_bytes=context,
        processes=processes,
        card=card,
        host=host,
    )


def named_machine(gpu: str, *, gpus: int = 1) -> Machine:
    """A machine with `gpus` cards of a name. Raises UserError for a name that is not in the table."""
    card = card_named(gpu)
    return Machine(
        device="cuda",
        name=card.name,
        capacity_bytes=int(card.usable_gib * GIB),
        context_bytes=int(card.context_mib * MIB),
        processes=gpus,
        card=card,
    )


def find_machine(recipe: Recipe, gpu: str | None, gpus: int | None) -> Machine:
    """As the options say, else where the recipe would train here. Raises UserError."""
    given = recipe.hardware.processes
    count = gpus or (given if given != "auto" else None)
    if gpu is not None:
        return named_machine(gpu, gpus=count or 1)
    device = pick_device(recipe.hardware.device).type
    if device != "cuda":
        if gpus:
            raise UserError(
                f"--gpus {gpus}: this machine computes on its CPU", hint="name the card: --gpu rtx3090"
            )
        return this_machine("cpu", processes=count or 1)
    most = torch.cuda.device_count()
    if gpus and gpus > most:
        raise UserError(f"--gpus {gpus}: this machine has {most}", hint="name another's card: --gpu rtx3090")
    single = recipe.parallel.engine == "single"
    return this_machine("cuda", processes=count or (1 if single else most))


def facts_on(machine: Machine, recipe: Recipe, context_length: int) -> Facts:
    """What "auto" in a recipe depends on, for that machine."""
    if machine.here:
        return facts_for(recipe, context_length, None, machine.processes)
    return card_facts(machine, context_length)


def card_facts(machine: Machine, context_length: int) -> Facts:
    """What a machine with cards can do, threads and fused kernels as they mostly are."""
    assert machine.card is not None
    modern = machine.card.capability >= BF16_CAPABILITY
    precision: Precision = "bf16" if modern else "fp16"
    return Facts(
        context_length=context_length,
        device="cuda",
        threads=1,
        precision=precision,
        serve_precision="bf16" if modern else "fp16",
        processes=machine.processes,
    )
