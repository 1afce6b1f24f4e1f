"""Seconds: what the operations of a step take on a device, and what a run of such steps comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

from tunesmith.core.units import duration_text
from tunesmith.plan.scale import NOTHING_SENT, Exchange

Kind = Literal["matmul", "attention", "dequantise", "optimizer", "memory", "message", "none"]
Source = Literal["probe", "probe + steps", "card table", "card table + steps"]

# Between what times the prediction a measured step lies, as docs/concepts/plan-time.md explains.
SPREAD: dict[Source, tuple[float, float]] = {
    "probe": (0.85, 1.2),
    "probe + steps": (0.93, 1.08),
    "card table": (0.75, 1.35),
    "card table + steps": (0.93, 1.08),
}


class Operation(NamedTuple):
    """What an operation costs, whatever its device. name: of torch's operator; flops: floating-point
    operations of its products; num_bytes: read and written, of a message to other processes those that all
    have together; dtype: of its first floating-point operand."""

    name: str
    kind: Kind
    dtype: str
    flops: int
    num_bytes: int


# -- a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through the model: tokens, the squares of the documents' lengths, and tokens with a label."""

    tokens: float
    squares: float
    labels: float

    def times(self, factor: float) -> Load:
        return Load(tokens=self.tokens * factor, squares=self.squares * factor, labels=self.labels * factor)

    @staticmethod
    def sum(loads: Iterable[Load]) -> Load:
        parts = list(loads)
        return Load(
            tokens=sum(load.tokens for load in parts),
            squares=sum(load.squares for load in parts),
            labels=sum(load.labels for load in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Floating-point operations of a forward and backward pass: for every token, for every token that a token
    of the same document may look at (squares), for every label."""

    per_token: float
    per_square: float
    per_label: float

    def flops(self, load: Load) -> float:
        return self.per_token * load.tokens + self.per_square * load.squares + self.per_label * load.labels


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Forward and backward of one micro-batch, or forward alone of held-out rows: its load, and its
    seconds on the device."""

    load: Load
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The parts of a step. one: a micro-batch; update_s: clipping and the optimizer; evaluate: a forward pass
    over held-out rows, None without; exchange: what several processes send each other."""

    arithmetic: Arithmetic
    one: Pass
    update_s: float
    evaluate: Pass | None = None
    exchange: Exchange = NOTHING_SENT

    def pass_s(self, load: Load) -> float:
        """Seconds of a micro-batch, in proportion to its arithmetic."""
        return self.one.seconds * self.arithmetic.flops(load) / self.arithmetic.flops(self.one.load)


# -- a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunLoad:
    """What a run does. steps: optimizer steps; passes: micro-batches of one process; load: of all passes of
    all processes together; processes: among which they are shared; evaluations: how often, each of
    `eval_load`; saves: checkpoints of `save_bytes`; start_bytes: read before the first step; largest: the
    micro-batch that is tried then, None for the mean one."""

    steps: int
    passes: int
    load: Load
    processes: int = 1
    evaluations: int = 0
    eval_load: Load | None = None
    saves: int = 0
    save_bytes: int = 0
    start_bytes: int = 0
    largest: Load | None = None


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Predicted seconds. step_s: of the mean optimizer step, which lies between low_s and high_s (SPREAD);
    sent_s: of it, waiting for messages of other processes;
    train_s: of all steps; total_s: with evaluations, checkpoints and start, sampled answers left out; flops:
    of all steps; source: what the prediction comes from; factor: of real steps over the sum of their
    operations; cost: at the given price."""

    step_s: float
    low_s: float
    high_s: float
    train_s: float
    eval_s: float
    save_s: float
    start_s: float
    total_s: float
    tokens_per_s: float
    flops: int
    source: Source
    device: str
    factor: float = 1.0
    disk_bytes_per_s: float = 0.0
    price_per_hour: float | None = None
    sent_s: float = 0.0

    @property
    def cost(self) -> float | None:
        """Of the whole run, in the price's currency."""
        return None if self.price_per_hour is None else self.price_per_hour * self.total_s / 3600

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cost": self.cost}

    def text(self) -> str:
        cost = "" if self.cost is None else f", {self.cost:,.2f} at {self.price_per_hour:g} an hour"
        return (
            f"{duration_text(self.step_s)} a step ({self.low_s:.3g} to {self.high_s:.3g} s, by "
            f"{self.source}), {self.tokens_per_s:,.0f} tokens/s, {duration_text(self.total_s)} in all{cost}"
        )


def factor_of(predicted_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """What real steps take over what was predicted for them: the median. Raises ValueError for none."""
    if not measured_s or len(predicted_s) != len(measured_s):
        raise ValueError(f"{len(measured_s)} measured steps beside {len(predicted_s)} predicted ones")
    return median(real / said for said, real in zip(predicted_s, measured_s, strict=True))


def plan_run_time(
    step: StepTime,
    run: RunLoad,
    *,
    source: Source,
    device: str,
    disk_bytes_per_s: float,
    factor: float = 1.0,
    price_per_hour: float | None = None,
) -> TimePlan:
    """What a run takes. factor: of real steps over predicted ones (`factor_of`); disk_bytes_per_s: at which
    checkpoints are written and weights are read. Raises ValueError for a run without steps or a disk that
    writes nothing."""
    if run.steps < 1 or run.passes < 1 or disk_bytes_per_s <= 0:
        raise ValueError(f"{run.steps} steps of {run.passes} passes, {disk_bytes_per_s} bytes/s")
    mean = run.load.times(1 / (run.passes * run.processes))
    pass_s, passes = factor * step.pass_s(mean), run.passes / run.steps
    sent_s = step.exchange.waited_s(passes, pass_s)
    step_s = passes * pass_s + factor * step.update_s + sent_s
    parts = {
        "train_s": run.steps * step_s,
        "eval_s": factor * run.evaluations * _evaluation_s(step, run),
        "save_s": run.saves * run.save_bytes / disk_bytes_per_s,
        # The largest micro-batch is tried before the first step.
        "start_s": run.start_bytes / disk_bytes_per_s + factor * step.pass_s(run.largest or mean),
    }
    low, high = SPREAD[source]
    return TimePlan(
        step_s=step_s,
        low_s=low * step_s,
        high_s=high * step_s,
        total_s=sum(parts.values()),
        tokens_per_s=run.load.tokens / parts["train_s"],
        flops=round(step.arithmetic.flops(run.load)),
        source=source,
        device=device,
        factor=factor,
        disk_bytes_per_s=disk_bytes_per_s,
        price_per_hour=price_per_hour,
        sent_s=sent_s,
        **parts,
    )


def _evaluation_s(step: StepTime, run: RunLoad) -> float:
    """One pass over the held-out rows, in proportion to the tokens of the batch that was traced."""
    if step.evaluate is None or run.eval_load is None:
        return 0.0
    return step.evaluate.seconds * run.eval_load.tokens / step.evaluate.load.tokens / run.processes
