"""How long a recipe's training takes: its step traced, then timed here or looked up for a card."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model.batch import Batch
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.plan.card_rates import card_rates
from tunesmith.plan.cards import Card
from tunesmith.plan.disk import write_rate
from tunesmith.plan.duration import (
    Arithmetic,
    Load,
    Pass,
    RunLoad,
    StepTime,
    TimePlan,
    factor_of,
    plan_run_time,
)
from tunesmith.plan.operations import Call, Calls
from tunesmith.plan.scale import Collective, Exchange, Sends, Traffic, collective_of, traffic_s
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engines import SHARDED
from tunesmith.train.parallel import BUCKET_BYTES
from tunesmith.workflows.plan_parallel import passes_of
from tunesmith.workflows.plan_probe import Device, load_of, probe
from tunesmith.workflows.plan_step import RecipeStep, Work

# Micro-batches that are looked at to find the typical one.
LOOKED_AT = 64
# The probe takes no more than this share of the run, and no more than so many seconds: two steps excepted.
PROBE_SHARE, PROBE_S = 0.03, 3.0
GUESS_FLOPS_PER_S: Mapping[Device, float] = {"cpu": 2e11, "cuda": 2e13}
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
    run: RunLoad,
    step: StepTime,
    *,
    device: Device,
    card: Card | None = None,
    folder: Path | None = None,
    price_per_hour: float | None = None,
    measured: Sequence[tuple[Sequence[Batch], float]] = (),
) -> TimePlan:
    """Predict a run.

    step: of it, by the probe or for `card`; folder: where checkpoints go, None for another machine's disk;
    measured: real steps, their micro-batches with their seconds, by which the step is corrected.
    """
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


def probed_step(
    recipe: Recipe, config: Any, work: Work, traced: Traced, run: RunLoad, *, device: Device
) -> StepTime:
    """The step of a resolved recipe, timed on this machine on `work` with few layers, as one process alone
    takes it. traced: with all."""
    if device == "cpu" and recipe.train.memory == "normal":
        keep_freed_memory()  # as the run will
    arithmetic = arithmetic_of(traced, config.get_text_config().vocab_size)
    budget = min(PROBE_S, PROBE_SHARE * guessed_s(arithmetic, run, device))
    found = probe(recipe, config, work, arithmetic, device=device, budget_s=budget)
    evaluate = None
    if traced.eval_load is not None:
        times = traced.calls.flops("evaluate") / max(1, traced.calls.flops("forward") / traced.passes)
        forward_s = found.forward_s * arithmetic.flops(traced.load) / arithmetic.flops(found.load)
        evaluate = Pass(load=traced.eval_load, seconds=times * forward_s)
    one = Pass(load=found.load, seconds=found.pass_s)
    return StepTime(arithmetic=arithmetic, one=one, update_s=found.update_s, evaluate=evaluate)


def guessed_s(arithmetic: Arithmetic, run: RunLoad, device: Device) -> float:
    """Seconds that the run takes about, before anything is measured."""
    return arithmetic.flops(run.load) / run.processes / GUESS_FLOPS_PER_S[device]


def together(step: StepTime, traced: Traced, recipe: Recipe, network: Sends) -> StepTime:
    """The step that was timed in one process, as each of several takes it: they slow each other down, share
    the update where each holds a part of the weights, and wait for messages."""
    crowding = network.crowding
    part = network.processes if recipe.parallel.engine in SHARDED else 1
    crowded = replace(step.one, seconds=crowding * step.one.seconds)
    held_out = step.evaluate and replace(step.evaluate, seconds=crowding * step.evaluate.seconds)
    update_s = crowding * step.update_s / part
    return replace(
        step,
        one=crowded,
        evaluate=held_out,
        update_s=update_s,
        exchange=exchange_of(traced, recipe, network),
    )


def exchange_of(traced: Traced, recipe: Recipe, network: Sends) -> Exchange:
    """What the processes of the recipe send each other in a step: the messages that the trace has heard."""
    overlaps = recipe.hardware.device == "cuda"
    during = traffic_of(traced, "forward", "backward")
    once = traffic_of(traced, "update")
    if recipe.parallel.engine == "ddp":  # gradients go after the last micro-batch, whatever their number
        once = [*(replace(part, messages=_buckets(part)) for part in during), *once]
        during = []
    return Exchange(
        pass_s=traffic_s(during, network) / traced.passes,
        step_s=traffic_s(once, network),
        pass_parts=sum(part.messages for part in during) / traced.passes,
        step_parts=sum(part.messages for part in once),
        overlaps=overlaps,
    )


def _buckets(part: Traffic) -> float:
    return max(1.0, part.num_bytes / BUCKET_BYTES)


def traffic_of(traced: Traced, *phases: str) -> list[Traffic]:
    """The messages of these phases, by kind. A trace that is carried on to all layers has fewer messages, of
    more bytes, than a real step where buckets are filled over several layers."""
    found: dict[Collective, list[float]] = {}
    for call, count in traced.counts(*phases).items():
        operation = traced.calls.operations[call]
        if operation.kind == "message" and operation.num_bytes:
            sums = found.setdefault(collective_of(operation.name), [0.0, 0.0])
            sums[0] += count
            sums[1] += count * operation.num_bytes
    return [
        Traffic(collective=kind, messages=max(1.0, n), num_bytes=size) for kind, (n, size) in found.items()
    ]


def card_step(traced: Traced, card: Card, vocabulary: int) -> StepTime:
    """The traced step on a card, from its data sheet and what training reaches of it. vocabulary: of the
    model's head."""
    rates, calls = card_rates(card), traced.calls

    def seconds(*phases: str) -> float:
        return rates.all_s((calls.operations[call], n) for call, n in calls.of(*phases).items())

    held_out = traced.eval_load
    return StepTime(
        arithmetic=arithmetic_of(traced, vocabulary),
        one=Pass(load=traced.load, seconds=seconds("forward", "backward") / traced.passes),
        update_s=seconds("update"),
        evaluate=None if held_out is None else Pass(load=held_out, seconds=seconds("evaluate")),
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
    and decay alone; of several processes each takes its part. Raises whatever the steps raise.
    """
    found = []
    for batches in (steps[0], *steps):
        began = time.perf_counter()
        units = max(1, sum(batch.num_supervised for batch in batches))
        shares = engine.shares(batches)
        engine.begin(0.0, 0)
        for number, share in enumerate(shares, 1):
            loss = engine.forward(share.batch)
            engine.backward(loss * (share.counts / units), last=number == len(shares))
            float(loss.detach())
        engine.update(divide_by=1.0, max_norm=max_norm)
        engine.drop_gradients()
        found.append(time.perf_counter() - began)
    return found[1:]
