"""How long a recipe's training takes: its step traced, its operations measured here or known of a card."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model.batch import Batch
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.plan.card_rates import card_rates
from tunesmith.plan.cards import Card
from tunesmith.plan.duration import (
    Arithmetic,
    Load,
    Operation,
    Pass,
    RunLoad,
    StepTime,
    TimePlan,
    factor_of,
    plan_run_time,
)
from tunesmith.plan.operations import Call, Calls
from tunesmith.plan.probe import guess_s, measure, write_rate
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_parallel import passes_of
from tunesmith.workflows.plan_step import RecipeStep, Work

Device = Literal["cpu", "cuda"]
Seconds = Callable[[Mapping[Call, int]], float]

# Micro-batches that are looked at to find the typical one.
LOOKED_AT = 64
# The probe takes no more than this share of the run, and no more than so many seconds.
PROBE_SHARE, PROBE_S = 0.03, 4.0
# Where no disk is there to be measured: a SATA SSD.
ASSUMED_DISK_BYTES_PER_S = 500e6


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A step's calls, with the micro-batch that it was traced on. passes: how many of them the step had."""

    calls: Calls
    load: Load
    passes: int
    eval_load: Load | None = None

    def counts(self, *phases: str) -> Mapping[Call, int]:
        return self.calls.of(*phases)


def load_of(batch: Batch) -> Load:
    """What a micro-batch is to the model."""
    lengths = np.diff(batch.starts).astype(np.int64)
    return Load(tokens=batch.num_tokens, squares=int((lengths * lengths).sum()), labels=batch.num_supervised)


def trace_calls(recipe: Recipe, config: Any, work: Work, *, device: Device) -> Traced:
    """The operations of one step of the resolved recipe, all layers, on `work`. config: of the model, as
    transformers has it. Raises UserError for what the recipe asks of the model and it has not."""
    trace = Trace()
    calls = Calls(trace)
    trace.listeners.append(calls)
    step = RecipeStep(recipe, config, work, layers=config.get_text_config().num_hidden_layers, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True), trace:
        step.run(trace)
    return traced_by(calls, recipe, work)


def traced_by(calls: Calls, recipe: Recipe, work: Work) -> Traced:
    """What a listener heard while `work` was traced."""
    held_out = None if work.eval_batch is None else load_of(work.eval_batch)
    assert recipe.hardware.processes != "auto"
    passes = passes_of(recipe, recipe.hardware.processes)
    return Traced(calls=calls, load=load_of(work.batch), passes=passes, eval_load=held_out)


# -- what a run does -----------------------------------------------------------------------------------------


def run_load(
    recipe: Recipe,
    steps: int,
    batches: Callable[[int], Sequence[Batch]],
    *,
    tokens: int,
    labels: int,
    eval_batches: Sequence[Batch] = (),
    save_bytes: int = 0,
    start_bytes: int = 0,
) -> tuple[RunLoad, Batch]:
    """What the run of a resolved recipe does, and its most typical micro-batch.

    batches: the micro-batches of a 0-based step; tokens, labels: of all steps. The squares of the documents'
    lengths are those of up to LOOKED_AT steps spread over the run, carried on to all tokens.
    """
    seen = [batches(number) for number in _spread(steps, LOOKED_AT)]
    micro = [load_of(batch) for step in seen for batch in step]
    some = Load.sum(micro)
    passes = round(steps * len(micro) / len(seen))
    processes = recipe.hardware.processes
    assert processes != "auto"
    load = Load(tokens=tokens, squares=some.squares * tokens / max(1, some.tokens), labels=labels)
    every = recipe.eval.every
    assert every != "auto" and recipe.train.save_every != "auto"
    run = RunLoad(
        steps=steps,
        passes=max(steps, -(-passes // processes)),
        load=load,
        processes=processes,
        evaluations=_times(steps, every) if eval_batches else 0,
        eval_load=Load.sum(map(load_of, eval_batches)) if eval_batches else None,
        saves=_times(steps, recipe.train.save_every),
        save_bytes=save_bytes,
        start_bytes=start_bytes,
    )
    return run, _typical([batch for step in seen for batch in step], load.times(1 / max(1, passes)))


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` numbers below `count`, evenly spread."""
    return sorted({count * number // min(count, most) for number in range(min(count, most))})


def _times(steps: int, every: int) -> int:
    """How often something is done that is due at the beginning, after every so many steps, and at the end."""
    return 1 + (-(-steps // every) if every else 1)


def _typical(batches: Sequence[Batch], mean: Load) -> Batch:
    """The micro-batch that is most like the mean one."""

    def off(batch: Batch) -> float:
        load = load_of(batch)
        return abs(load.tokens / mean.tokens - 1) + 0.2 * abs(load.squares / mean.squares - 1)

    return min(batches, key=off)


# -- seconds -------------------------------------------------------------------------------------------------


def plan_time(
    recipe: Recipe,
    traced: Sequence[Traced],
    run: RunLoad,
    *,
    device: Device,
    vocabulary: int,
    card: Card | None = None,
    folder: Path | None = None,
    price_per_hour: float | None = None,
    measured: Sequence[tuple[Sequence[Batch], float]] = (),
) -> TimePlan:
    """Predict a run of the resolved recipe.

    traced: its step on one or more micro-batches, the typical one and, if it differs, the largest; run: what
    it does; vocabulary: of the model's head; card: looked up in place of a probe of this machine; folder:
    where checkpoints go, None for another machine's disk; measured: real steps, their micro-batches with
    their seconds, by which the sum of the operations is corrected.
    """
    seconds = probed(recipe, traced, run, device=device) if card is None else looked_up(traced, card)
    step = step_time(traced, seconds, vocabulary)
    factor = 1.0
    if measured:
        said = [
            sum(step.pass_s(load_of(batch)) for batch in batches) + step.update_s for batches, _ in measured
        ]
        factor = factor_of(said, [seconds for _, seconds in measured])
    source: Any = ("card table" if card else "probe") + (" + steps" if measured else "")
    return plan_run_time(
        step,
        run,
        source=source,
        device=card.name if card else device,
        disk_bytes_per_s=ASSUMED_DISK_BYTES_PER_S if folder is None else write_rate(folder),
        factor=factor,
        price_per_hour=price_per_hour,
    )


def probed(recipe: Recipe, traced: Sequence[Traced], run: RunLoad, *, device: Device) -> Seconds:
    """Seconds of calls, measured on this machine with the recipe's number of threads (torch's by now)."""
    if device == "cpu" and recipe.train.memory == "normal":
        keep_freed_memory()  # as the run will
    counts: dict[Call, int] = {}
    operations = _operations(traced)
    for one in traced:
        for call, count in one.counts("forward", "backward", "update", "evaluate").items():
            counts[call] = max(counts.get(call, 0), count)
    guessed = run.steps * sum(guess_s(operations[call]) * count for call, count in counts.items())
    found = measure(counts, operations, device=device, budget_s=min(PROBE_S, PROBE_SHARE * guessed))
    return lambda wanted: sum((found.seconds[call] * count for call, count in wanted.items()), 0.0)


def looked_up(traced: Sequence[Traced], card: Card) -> Seconds:
    """Seconds of calls on a card, from its data sheet and what training reaches of it."""
    rates = card_rates(card)
    operations = _operations(traced)
    return lambda wanted: sum((rates.seconds(operations[call]) * n for call, n in wanted.items()), 0.0)


def _operations(traced: Sequence[Traced]) -> dict[Call, Operation]:
    return {call: operation for one in traced for call, operation in one.calls.operations.items()}


def step_time(traced: Sequence[Traced], seconds: Seconds, vocabulary: int) -> StepTime:
    first = traced[0]
    passes = [
        Pass(load=one.load, seconds=seconds(one.counts("forward", "backward")) / one.passes) for one in traced
    ]
    evaluate = None
    if first.eval_load is not None:
        evaluate = Pass(load=first.eval_load, seconds=seconds(first.counts("evaluate")))
    return StepTime(
        arithmetic=arithmetic_of(first, vocabulary),
        passes=passes,
        update_s=seconds(first.counts("update")),
        evaluate=evaluate,
    )


def arithmetic_of(traced: Traced, vocabulary: int) -> Arithmetic:
    """What each token, each pair of tokens and each label cost: attention goes by pairs, a product with the
    head's weights by labels, all others by tokens."""
    parts = {"token": 0.0, "square": 0.0, "label": 0.0}
    for call, count in traced.counts("forward", "backward").items():
        operation = traced.calls.operations[call]
        parts[_goes_by(call, operation.kind, vocabulary)] += operation.flops * count / traced.passes
    load = traced.load
    return Arithmetic(
        per_token=parts["token"] / max(1, load.tokens),
        per_square=parts["square"] / max(1, load.squares),
        per_label=parts["label"] / max(1, load.labels),
    )


def _goes_by(call: Call, kind: str, vocabulary: int) -> Literal["token", "square", "label"]:
    batched = call.func.name() in ("aten::bmm", "aten::baddbmm")
    if kind == "attention" or batched:
        return "square"
    return "label" if any(vocabulary in operand.shape for operand in call.operands) else "token"


# -- real steps ----------------------------------------------------------------------------------------------


def real_steps(engine: Any, steps: Sequence[Sequence[Batch]], *, max_norm: float | None) -> list[float]:
    """Seconds of real optimizer steps on these micro-batches, the first one left out, which warms up.

    engine: around a model that is thrown away after: its weights change, at a learning rate of 0 by rounding
    and decay alone. Raises whatever the steps raise.
    """
    found = []
    for batches in (steps[0], *steps):
        began = time.perf_counter()
        units = max(1, sum(batch.num_supervised for batch in batches))
        engine.begin(0.0, 0)
        for number, batch in enumerate(batches, 1):
            loss = engine.forward(batch)
            engine.backward(loss / units, last=number == len(batches))
            float(loss.detach())
        engine.update(divide_by=1.0, max_norm=max_norm)
        engine.drop_gradients()
        found.append(time.perf_counter() - began)
    return found[1:]
