"""What a training does about trouble: batches too large for the memory, losses that jump or are not finite.

`train.loop` decides when it is asked.
"""

from __future__ import annotations

import errno
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from tunesmith.core.errors import RunFailed
from tunesmith.core.events import read_events
from tunesmith.model.batch import Batch
from tunesmith.model.generate import evaluating
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import Engine
from tunesmith.train.objective import Objective

# What the libraries below torch say instead of raising an error of their own kind.
NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
WINDOW = 64  # losses that tell what is usual
FEWEST = 16
SIGMAS = 8.0
SMALLEST_JUMP = 0.1
CUT_TO_EVALUATE = (
    "memory ran out in the evaluation: its batches are cut at borders of documents, which changes its result "
    "by rounding only"
)
MAD_TO_SIGMA = 1.4826  # of a normal distribution: 1 / its 0.75 quantile
T = TypeVar("T")

# -- memory -------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in NO_MEMORY)


def release_memory() -> None:
    """Give back what a failed step held. Call it when its exception is gone: the traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class NoMemory:
    """What was said when memory ran out."""

    reason: str


def attempt(call: Callable[[], T]) -> T | NoMemory:
    """What `call` returns, or that memory ran out. The error is gone by then, and with it the tensors that
    its traceback holds."""
    try:
        return call()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    release_memory()
    return NoMemory(reason)


# -- batches that fit ---------------------------------------------------------------------------------------


def cut(batches: Sequence[Batch], max_tokens: int | None) -> list[Batch]:
    """The batches, each halved until it has at most `max_tokens` tokens or is a single document."""
    if max_tokens is None:
        return list(batches)
    pieces: list[Batch] = []
    for batch in batches:
        halves = halve(batch) if batch.num_tokens > max_tokens else ()
        pieces += cut(halves, max_tokens) if halves else [batch]
    return pieces


def halve(batch: Batch) -> tuple[Batch, ...]:
    """The batch as two, cut at the border of documents nearest to its middle; () for a single document."""
    count, middle = batch.num_documents, batch.num_tokens / 2
    if count < 2:
        return ()
    border = min(range(1, count), key=lambda number: abs(int(batch.starts[number]) - middle))
    return batch.part(0, border), batch.part(border, count)


def documents(batches: Sequence[Batch]) -> list[Batch]:
    """Every document as a batch of its own."""
    return [batch.part(number, number + 1) for batch in batches for number in range(batch.num_documents)]


def smaller(batches: Sequence[Batch]) -> int | None:
    """A limit on tokens that halves the largest batch of several documents; None where there is none."""
    sizes = [batch.num_tokens for batch in batches if batch.num_documents > 1]
    return max(sizes) // 2 if sizes else None


def too_large(batch: Batch, reason: str, recipe: Recipe, step: int) -> RunFailed:
    """The error for a micro-batch that memory does not hold and that cannot be cut or tried again."""
    train = recipe.train
    remedies = [
        *(["train.micro_batch_size=1"] if batch.num_documents > 1 and train.micro_batch_size != 1 else []),
        *(["train.gradient_checkpointing=full"] if train.gradient_checkpointing != "full" else []),
        *(["train.memory=low"] if train.memory == "normal" else []),
        "a smaller data.max_length",
        *(["method.type=lora"] if recipe.method.type == "full" else []),
    ]
    return RunFailed(
        f"step {step}: a micro-batch of {batch.num_tokens} tokens (row {_some(batch.rows)}) does not fit "
        f"into memory: {reason}",
        hint=f"try, in this order: {', '.join(remedies)}",
    )


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")


def too_large_to_evaluate(batch: Batch, reason: str) -> RunFailed:
    """The error for a held-out batch that memory does not hold and that cannot be cut."""
    return RunFailed(
        f"the evaluation: {batch.num_tokens} tokens (row {_some(batch.rows)}) do not fit into memory: "
        f"{reason}",
        hint="free memory, or set eval.max_rows to leave long rows out, and give the same command again; or "
        "take a smaller data.max_length with --fresh",
    )


def no_room_for_update(reason: str, recipe: Recipe, step: int, last: Path | None) -> RunFailed:
    """The error for memory that ran out in the optimizer's update. last: the newest good checkpoint."""
    train, engine = recipe.train, recipe.parallel.engine
    plain = engine in ("auto", "single", "ddp") and train.optimizer == "adamw"
    remedies = [
        *(["train.memory=low"] if train.memory == "normal" else []),
        *(["train.memory=smallest"] if train.memory == "low" and engine in ("auto", "single") else []),
        *(["train.optimizer=adamw-8bit (averages in 8 bits)"] if plain else []),
        *(["train.optimizer=adamw-offload"] if plain and recipe.hardware.device == "cuda" else []),
        *(["parallel.offload=optimizer"] if not plain and recipe.parallel.offload == "none" else []),
        *(["method.type=lora"] if recipe.method.type == "full" else ["a smaller method.rank"]),
    ]
    return RunFailed(
        f"step {step}: memory ran out in the optimizer's update: {reason}. Some weights may be updated and "
        "others not, so the step is not taken again and nothing of it is saved"
        + (f"; the last good checkpoint is {last}" if last else ""),
        hint=f"free memory, and the same command goes on from there; or try with --fresh, in this order: "
        f"{', '.join(remedies)}",
    )


def samples_left_out(reason: str) -> str:
    """The warning where memory does not suffice to answer the sample prompts."""
    return (
        f"memory ran out in the answers to samples.prompts: {reason}; they are left out, and training goes "
        "on. Fewer or shorter prompts, a smaller samples.max_new_tokens, or samples.every: 0 need less"
    )


def no_room_for_samples(reason: str) -> RunFailed:
    """The error where the other processes wait for this one in the middle of an answer."""
    return RunFailed(
        f"memory ran out in the answers to samples.prompts, in which all processes take part: {reason}",
        hint="give the same command again with fewer or shorter prompts, a smaller samples.max_new_tokens "
        "or samples.every=0: the run goes on from its last checkpoint",
    )


def no_room_for_reference(reason: str, recipe: Recipe) -> RunFailed:
    """The error where memory does not hold a micro-batch of the pass before the first step."""
    size = recipe.train.micro_batch_size
    remedy = f"train.micro_batch_size={size // 2}" if isinstance(size, int) and size > 1 else "shorter rows"
    return RunFailed(
        f"memory ran out in the reference's log-probabilities, before the first step: {reason}",
        hint=f"free memory, or give the same command again with {remedy}",
    )


def limits_after(events: Path, step: int) -> dict[int, int]:
    """Step: the limit on tokens from it on, for the steps after `step` in which memory once ran out.

    A resumed run cuts its micro-batches where the killed one did, and so computes the same.
    """
    limits: dict[int, int] = {}
    for event in read_events(events, "out_of_memory"):
        if event["step"] > step:
            limits[event["step"]] = min(event["max_tokens"], limits.get(event["step"], event["max_tokens"]))
    return limits


def earlier_limits(engine: Engine, events: Path, step: int) -> dict[int, int]:
    """`limits_after` in every process; rank 0 has the events."""
    found = limits_after(events, step) if engine.rank == 0 else {}
    count = int(engine.sum([len(found)])[0])
    pairs = list(found.items()) or [(0, 0)] * count
    values = [int(value) for value in engine.sum([float(number) for pair in pairs for number in pair])]
    return dict(zip(values[::2], values[1::2], strict=True))


# -- losses -------------------------------------------------------------------------------------------------


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss stands far above the recent ones: by SIGMAS robust standard deviations, and visibly.

    The level is the median of the last FEWEST losses; the noise is taken from the differences between one
    and the next, so that a loss that falls steeply does not pass for a noisy one. Medians and the median
    absolute deviation are not moved by the spikes themselves (Leys et al. 2013,
    doi:10.1016/j.jesp.2013.03.013). With fewer losses nothing is known yet.
    """
    if len(recent) < FEWEST:
        return False
    changes = [after - before for before, after in pairwise(recent)]
    drift = median(changes)
    noise = MAD_TO_SIGMA * median(abs(change - drift) for change in changes) / math.sqrt(2)
    return loss - usual(recent) > max(SIGMAS * noise, SMALLEST_JUMP)


def usual(recent: Sequence[float]) -> float:
    """The level that a loss is compared with."""
    return median(recent[-FEWEST:])


def remember(loss: float, recent: Sequence[float]) -> list[float]:
    """The last WINDOW losses with this one."""
    return [*recent, loss][-WINDOW:]


@dataclass(frozen=True)
class Measured:
    """A row, and what was measured at it: the loss per unit, or the norm of its gradients."""

    row: int
    value: float


def row_losses(engine: Engine, objective: Objective, batches: Sequence[Batch]) -> list[Measured]:
    """Every document's loss per unit with the weights as they are, worst first. All processes take part."""
    parts = documents(batches)
    losses = [0.0] * len(parts)
    with evaluating(engine.model), torch.no_grad():
        for share in engine.shares(parts):
            total = float(engine.forward(share.batch))
            if share.counts:
                losses[share.number] = total / max(1, objective.units(share.batch))
    objective.drain()
    return worst_first(parts, engine.sum(losses))


def row_gradients(engine: Engine, objective: Objective, batches: Sequence[Batch]) -> list[Measured]:
    """The norm of every document's own gradients, worst first; the step's gradients are lost.

    Where a backward pass cannot stand alone (sharded weights, updates within it), its losses instead. All
    processes take part.
    """
    if not engine.retries:
        return row_losses(engine, objective, batches)
    parts = documents(batches)
    norms = [0.0] * len(parts)
    for share in engine.shares(parts):
        engine.model.zero_grad(set_to_none=True)
        engine.backward(engine.forward(share.batch), last=False)
        grads = [p.grad for p in engine.model.parameters() if p.grad is not None]
        norms[share.number] = float(torch.nn.utils.get_total_norm(grads))
    engine.drop_gradients()
    objective.drain()
    return worst_first(parts, engine.sum(norms))


def worst_first(parts: Sequence[Batch], values: Sequence[float]) -> list[Measured]:
    """Those that are not finite, then from the highest down."""
    found = [
        Measured(part.rows[0] if part.rows else number, value)
        for number, (part, value) in enumerate(zip(parts, values, strict=True))
    ]
    return sorted(found, key=lambda item: -item.value if math.isfinite(item.value) else -math.inf)


def rows_text(found: Sequence[Measured], most: int = 5) -> str:
    """The worst rows for people: `row 17 (nan), row 4 (9.21) and 6 more`."""
    shown = ", ".join(f"row {item.row} ({item.value:.4g})" for item in found[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")
