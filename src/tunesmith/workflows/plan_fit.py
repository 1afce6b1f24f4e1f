"""What makes a recipe fit a machine, and what its "auto"s come to there: `plan.fit` and `plan.auto`, asked of
the real memory plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.units import bytes_text
from tunesmith.model.config import context_length
from tunesmith.model.shape import meta_model
from tunesmith.plan.auto import Choice, choose, has_auto
from tunesmith.plan.cards import CARDS
from tunesmith.plan.changes import applied
from tunesmith.plan.fit import Fix, Target, cheapest_fix, most_saving
from tunesmith.plan.memory import MemoryPlan
from tunesmith.plan.sizes import SIZES, config_of, num_parameters
from tunesmith.recipe.resolve import Facts, resolve
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engines import SHARDED, check_engine
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.data import step_plan
from tunesmith.workflows.plan_duration import Ear
from tunesmith.workflows.plan_machine import Machine, facts_on
from tunesmith.workflows.plan_memory import CONTEXT_BYTES, plan_memory, worst_batch
from tunesmith.workflows.plan_probe import load_of
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import card_step, traced_by
from tunesmith.workflows.run_data import RunData

# Of a CPU's memory, which is also everyone else's, what a choice made by itself may take.
CPU_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A memory plan, and what its trace has heard, by which a card's time is known."""

    memory: MemoryPlan
    ear: Ear | None
    work: Work


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planned again with other settings.

    recipe: as written, with its "auto"s; config: of the model, as transformers has it; work: what the step of
    the recipe as it stands is traced on; data: its rows, None where they are not counted; gpus: cards that
    may be used; timed: whether traces are to tell the time on a card; told: whether each is
    told to whoever waits; traces: of resolved recipes, and works: of their sizes, each made once.
    """

    recipe: Recipe
    machine: Machine
    config: Any
    work: Work
    data: RunData | None = None
    gpus: int = 1
    timed: bool = True
    told: bool = False
    traces: dict[str, Traced] = field(default_factory=dict, compare=False)
    works: dict[tuple[Any, ...], Work] = field(default_factory=dict, compare=False)

    def traced(self, resolved: Recipe) -> Traced:
        key = resolved.model_dump_json()
        if key not in self.traces:
            self.traces[key] = self._trace(resolved)
        return self.traces[key]

    def _trace(self, resolved: Recipe) -> Traced:
        ear = Ear() if self.timed and self.machine.card is not None else None
        work, context = self._work(resolved), self.machine.context_bytes
        memory = plan_memory(
            resolved,
            self.config,
            work,
            device=self.machine.device,
            exact=False,
            listen=ear,
            **({} if context is None else {"context_bytes": context}),
        )
        if self.told:
            say(f"{_in_short(resolved)}: {bytes_text(self.machine.needed_bytes(memory))}")
        return Traced(memory=memory, ear=ear, work=work)

    def _work(self, resolved: Recipe) -> Work:
        train = resolved.train
        key = (resolved.data.max_length, train.micro_batch_size, train.grad_accumulation)
        if key not in self.works:
            self.works[key] = work_for(resolved, self.work, self.data)
        return self.works[key]

    def tokens_per_s(self, resolved: Recipe) -> float:
        """Of one process of the resolved recipe on the machine's card."""
        card, text = self.machine.card, self.config.get_text_config()
        found = self.traced(resolved)
        assert card is not None and found.ear is not None
        heard = traced_by(found.ear.calls(text.num_hidden_layers), resolved, found.work)
        step = card_step(heard, card, text.vocab_size)
        passes, load = resolved.train.grad_accumulation, load_of(found.work.batch)
        return passes * load.tokens / (passes * step.pass_s(load) + step.update_s)


def _in_short(resolved: Recipe) -> str:
    """What distinguishes one candidate from the next."""
    train, method = resolved.train, resolved.method
    return (
        f"{method.type}, {train.micro_batch_size} x {resolved.data.max_length} tokens, {train.precision}, "
        f"{train.optimizer}, checkpointing {train.gradient_checkpointing}"
        f"{', activations in host memory' if train.activation_offload else ''}"
        f"{f', {resolved.parallel.engine}' if resolved.parallel.engine != 'single' else ''}"
    )


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """fix: the cheapest change with which the recipe fits, None if there is none; then least: what needs
    least of all that was looked at, card: the smallest on which that fits, model: the largest known one that
    would fit here with it."""

    fix: Fix | None
    least: Fix | None = None
    card: str | None = None
    model: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "fix": None if self.fix is None else self.fix.as_dict(),
            "least": None if self.least is None else self.least.as_dict(),
            "card": self.card,
            "model": self.model,
        }


def find_remedy(case: Case) -> Remedy:
    """How to make a recipe fit that does not. Makes about ten plans, each told when it is made."""
    say("does not fit: looking for the cheapest change with which it does")
    case = replace(case, told=True)
    target = target_of(case)
    fix = cheapest_fix(case.recipe, target)
    if fix is not None:
        return Remedy(fix=fix)
    least = most_saving(case.recipe, target)
    if case.machine.device == "cpu":
        return Remedy(fix=None, least=least)
    context = case.machine.context_bytes or CONTEXT_BYTES
    card = smallest_card(least.needed_bytes - context)
    return Remedy(fix=None, least=least, card=card, model=largest_model(case, least))


def smallest_card(num_bytes: int) -> str | None:
    """The name of the card with the least memory in which torch can reserve so much."""
    enough = [card for card in CARDS.values() if card.room_bytes >= num_bytes]
    return min(enough, key=lambda card: card.memory_gib).name if enough else None


def largest_model(case: Case, least: Fix) -> str | None:
    """The known model with most weights that fits the case's machine with the settings of `least`."""
    recipe = applied(case.recipe, least.settings)
    models = sorted(SIZES, key=lambda name: num_parameters(config_of(name)), reverse=True)
    for name in models:
        other = replace(
            case,
            recipe=recipe,
            config=config_of(name),
            work=Work(batch=case.work.batch),
            data=None,
            traces={},
            works={},
        )
        target = target_of(other)
        try:
            resolved = target.resolve(recipe)
        except UserError:  # its context is shorter than the recipe's rows
            continue
        if target.floor(resolved) <= target.capacity_bytes and target.need(resolved) <= target.capacity_bytes:
            return name
    return None


def resolve_auto(case: Case) -> Choice:
    """The recipe with values for method.type and train.micro_batch_size, where they are "auto"."""
    if not has_auto(case.recipe):
        return Choice(recipe=case.recipe)
    say("looking for the settings that are 'auto'")
    target = target_of(replace(case, told=True))
    if case.machine.device == "cpu":
        target = replace(target, capacity_bytes=int(target.capacity_bytes * CPU_SHARE))
    return choose(case.recipe, target)


def target_of(case: Case) -> Target:
    """What the recipe shall fit: what is free of the machine now, or all of one that is named."""
    machine = case.machine
    limit = context_length(case.config)
    parameters = count_parameters(case.config, case.recipe.model.trust_remote_code)

    def resolved(recipe: Recipe) -> Recipe:
        found = resolve(recipe, _facts(case, recipe, limit))
        processes = found.hardware.processes
        assert processes != "auto"
        check_engine(found, Ranks(size=processes, local_size=processes))
        return found

    return Target(
        capacity_bytes=machine.capacity_bytes if machine.free_bytes is None else machine.free_bytes,
        resolve=resolved,
        need=lambda recipe: _needed(machine, case.traced(recipe).memory),
        floor=lambda recipe: _floor(parameters, recipe) + (machine.context_bytes or 0),
        gpus=case.gpus,
        speed=case.tokens_per_s if case.timed and machine.card is not None else None,
        rows_lost=None if case.data is None else partial(rows_longer, case.data),
    )


def _facts(case: Case, recipe: Recipe, limit: int) -> Facts:
    """Of the machine, with as many processes as the recipe has in mind."""
    given = recipe.hardware.processes
    count = case.machine.processes if given == "auto" else given
    return facts_on(replace(case.machine, processes=count), recipe, limit)


def _needed(machine: Machine, memory: MemoryPlan) -> int:
    """Of the device; without bound where the host does not hold what is put there."""
    needed = machine.needed_bytes(memory)
    host = machine.host
    if machine.device == "cuda" and host is not None and machine.host_bytes(memory) > host.total_bytes:
        return max(needed, 1 << 62)
    return needed


def count_parameters(config: Any, trust_remote_code: bool = False) -> int:
    """Of a model, from two of its layers: all are alike."""
    one, two = (
        sum(
            p.numel()
            for p in meta_model(
                config, torch.bfloat16, layers=n, trust_remote_code=trust_remote_code
            ).parameters()
        )
        for n in (1, 2)
    )
    return one + (config.get_text_config().num_hidden_layers - 1) * (two - one)


def _floor(parameters: int, resolved: Recipe) -> int:
    """Bytes of weights, gradients and averages alone, on every card."""
    train, kind = resolved.train, resolved.method.type
    if resolved.parallel.offload != "none":
        return 0
    if kind == "full":
        weight = 2 if train.precision == "bf16-pure" else 4
        averages = {"adamw-8bit": 2, "adamw-offload": 0}.get(train.optimizer, 2 * weight)
        each: float = weight + averages + (0 if train.optimizer_in_backward else weight)
    else:
        each = 0.5 if kind == "qlora" else 4 if train.precision == "fp32" else 2
    shards = resolved.hardware.processes if resolved.parallel.engine in SHARDED else 1
    assert shards != "auto"
    return int(parameters * each / shards)


# -- what a changed recipe is traced on ---------------------------------------------------------------------


def work_for(resolved: Recipe, work: Work, data: RunData | None) -> Work:
    """The largest micro-batch of a recipe whose micro_batch_size or max_length may have been changed.

    Raises UserError for shorter rows of several answers, which only their data could tell.
    """
    assert resolved.data.max_length != "auto" and resolved.train.micro_batch_size != "auto"
    if data is None:
        return replace(work, batch=worst_batch(resolved))
    if int(data.prepared.train.lengths.max()) > resolved.data.max_length:
        if resolved.objective.type != "sft":
            raise UserError(f"data.max_length: {resolved.data.max_length}: some answers are longer")
        share = work.batch.num_supervised / work.batch.num_tokens
        return replace(work, batch=worst_batch(resolved, supervised=share))
    if resolved.compat is not None:
        return work
    steps = step_plan(data.prepared, resolved.data, resolved.train, resolved.objective)
    return replace(work, batch=steps.longest())


def rows_longer(data: RunData, length: int) -> int:
    """Training rows of more than `length` tokens."""
    return int(np.count_nonzero(data.prepared.train.lengths > length))
