"""The time of a planned run: the operations that its memory trace has seen, measured or known of a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.model.batch import Batch
from tunesmith.plan.cards import Card, this_card
from tunesmith.plan.duration import TimePlan
from tunesmith.plan.operations import Call, Calls
from tunesmith.plan.scale import Sends, card_network
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_link import assumed_network, measured_network
from tunesmith.workflows.plan_probe import Device, load_of
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import (
    PROBE_SHARE,
    Traced,
    card_step,
    exchange_of,
    guessed_s,
    plan_time,
    probed_step,
    run_load,
    together,
    traced_by,
)

# Starting processes to time their messages takes about so long, most of it for torch to begin.
MEASURING_S = 8.0


@dataclass
class Ear:
    """Hears the operations of a step that is traced whole, or with a few layers and a few more."""

    heard: list[Calls] = field(default_factory=list)
    _whole: dict[int, Calls] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)

    def __call__(self, trace: Trace) -> None:
        self.heard.append(Calls(trace))
        self.traces.append(trace)
        trace.listeners.append(self.heard[-1])

    def calls(self, layers: int) -> Calls:
        """The operations of the step with all layers."""
        if layers not in self._whole:
            self._whole[layers] = self._carried(layers) if len(self.heard) > 1 else self.heard[0]
        return self._whole[layers]

    def _carried(self, layers: int) -> Calls:
        """With all layers: each between the two ends adds the same operations."""
        few, more = self.heard
        steps = layers - self.traces[1].num_layers
        # The optimizer takes all weights in one call, of which longer lists cannot be made up.
        longer = _growth(few, more, steps)
        counts: Any = Counter()
        for key in more.counts.keys() | few.counts.keys():
            now = more.counts[key]
            counts[key] = now * longer if key[0] == "update" else now + steps * (now - few.counts[key])
        found = Calls(more.trace)
        found.counts, found.operations = counts, few.operations | more.operations
        return found


def _growth(few: Calls, more: Calls, steps: int) -> float:
    """Bytes that the update touches with all layers over those with the more of two numbers of layers."""
    then, now = (_update_bytes(calls) for calls in (few, more))
    return (now + steps * (now - then)) / now if now else 1.0


def _update_bytes(calls: Calls) -> int:
    found: Counter[Call] = calls.of("update")
    return sum(calls.operations[call].num_bytes * count for call, count in found.items())


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is timed. steps, tokens, labels: of the run; batches: of a 0-based step; save_bytes: of one
    checkpoint; start_bytes: read before the first step."""

    recipe: Recipe
    steps: int
    batches: Any
    tokens: int
    labels: int
    eval_batches: Sequence[Batch] = ()
    save_bytes: int = 0
    start_bytes: int = 0


def time_of(
    run: Run,
    work: Work,
    ear: Ear,
    config: Any,
    *,
    device: Device,
    card: Card | None,
    folder: Path | None,
    price_per_hour: float | None = None,
    measured: Sequence[tuple[Sequence[Batch], float]] = (),
) -> TimePlan:
    """The plan of a run whose memory trace `ear` has heard on `work`. card: looked up, None: measured here;
    folder: of checkpoints here; measured: real steps (`plan_time`)."""
    text = config.get_text_config()
    load, typical = run_load(
        run.recipe,
        run.steps,
        run.batches,
        tokens=run.tokens,
        labels=run.labels,
        eval_batches=run.eval_batches,
        save_bytes=run.save_bytes,
        start_bytes=run.start_bytes,
    )
    traced: Traced = traced_by(ear.calls(text.num_hidden_layers), run.recipe, work)
    if card is None:
        some = replace(work, batch=typical)
        step = probed_step(run.recipe, config, some, traced, load, device=device)
    else:
        step = card_step(traced, card, text.vocab_size)
    if load.processes > 1:
        known = card or (this_card() if device == "cuda" else None)
        network = _network(run.recipe, text, known, guessed_s(step.arithmetic, load, device))
        step = (
            together(step, traced, run.recipe, network)
            if card is None
            else replace(step, exchange=exchange_of(traced, run.recipe, network))
        )
    return plan_time(
        replace(load, largest=load_of(work.batch)),
        step,
        device=device,
        card=card,
        folder=folder,
        price_per_hour=price_per_hour,
        measured=measured,
    )


def _network(recipe: Recipe, text: Any, card: Card | None, guessed: float) -> Sends:
    """What the processes of a recipe send over: between cards as their data sheets say, on a CPU measured,
    or assumed for a run that is too short to be worth it. guessed: seconds of the run."""
    processes, threads = recipe.hardware.processes, recipe.hardware.threads
    assert processes != "auto" and threads != "auto"
    if card is not None:
        return card_network(card, processes)
    if PROBE_SHARE * guessed < MEASURING_S:
        return assumed_network(processes)
    sizes = {"hidden": text.hidden_size, "intermediate": text.intermediate_size}
    return measured_network(processes, threads=threads, **sizes)
