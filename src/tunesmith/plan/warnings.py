"""What in a plan will disappoint, each with its figure and its remedy. Nothing here stops a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

FEW_EVAL_ROWS = 20
MANY_PASSES = 5
LONG_WARMUP = 0.3  # share of the steps
FEW_STEPS = 10  # of a run too short for its warm-up or its checkpoints to be judged
SMALL_PASS = 512  # tokens of a forward pass below which a GPU waits for its instructions
GAPS = 0.7  # share of a pack that is filled
SHORT_ROWS = 4  # the longest row is so many times shorter than max_length
# Rates that are commonly used for (preference objective, adapters): lowest, highest.
USUAL_LR = {
    (False, False): (1e-6, 1e-4),
    (False, True): (1e-5, 1e-3),
    (True, False): (1e-7, 1e-5),
    (True, True): (1e-6, 2e-4),
}
# Part of what is told of the data (data/counts.py, data/prepare.py, data/batches.py): what to do.
REMEDIES = {
    "longer than max_length and dropped": "raise data.max_length, or set data.too_long: truncate",
    "were cut at max_length": "raise data.max_length, or set data.too_long: drop",
    "lost their stop token": "set data.too_long: drop, or raise data.max_length",
    "are empty and left out": "look at these rows: 'tunesmith data show'",
    "have no token to learn": "look at these rows: they need an answer of the assistant",
    "the content of an earlier one": "set data.duplicates: drop to learn each once",
    "control-token strings": "remove them from the rows unless they are meant as text",
    "rendered differently": "set model.chat_template to one that renders every turn alike",
    "merged into template text": "set model.chat_template to one whose prompt ends with a token of its own",
    "no stop token in this template": "set model.chat_template to one that ends every answer with a token, "
    "or the trained model will not stop",
    "are training rows too": "take those rows out of data.eval_sources, or set data.duplicates: drop",
    "no row is held out": "raise data.eval_fraction, or name data.eval_sources",
    "every epoch is a single step": "lower train.grad_accumulation or train.micro_batch_size",
}


@dataclass(frozen=True)
class Warning:
    """what: the fault with its figure; remedy: what to change, empty where nothing is to be done."""

    what: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is known of a run before it begins, its data counted.

    lr: as in the recipe; highest_lr: of any step; warmup_steps: as the recipe asks for, however few the steps
    are; passes: over the training rows; longest: tokens of the longest row; tokens: of the whole run;
    micro_batches: its forward passes; room: tokens that one may hold; loses_updates: small updates round to
    nothing.
    """

    preference: bool
    adapters: bool
    lr: float
    highest_lr: float
    warmup_steps: int
    steps: int
    passes: float
    save_every: int
    packing: bool
    train_rows: int
    eval_rows: int
    longest: int
    max_length: int
    tokens: int
    micro_batches: int
    room: int
    loses_updates: bool


def warnings_of(course: Course) -> list[Warning]:
    """Everything that is wrong with the course of a run, in the order of the recipe's sections."""
    parts = (_rows(course), _lengths(course), _rate(course), _steps(course), _formats(course))
    return [warning for part in parts for warning in part]


def of_data(texts: Sequence[str]) -> list[Warning]:
    """What the preparation of the data has told, with remedies."""
    return [Warning(text, next((r for part, r in REMEDIES.items() if part in text), "")) for text in texts]


def _rows(c: Course) -> Iterator[Warning]:
    if 0 < c.eval_rows < FEW_EVAL_ROWS:
        rows = c.train_rows + c.eval_rows
        share = math.ceil(100 * FEW_EVAL_ROWS / rows) / 100
        yield Warning(
            f"{c.eval_rows} rows are held out: by chance alone their loss is off by about "
            f"{1 / math.sqrt(c.eval_rows):.0%} of the spread between rows",
            f"raise data.eval_fraction (to {share:g} for {FEW_EVAL_ROWS} rows), or name data.eval_sources"
            if share < 0.5
            else "name data.eval_sources, or gather more rows",
        )
    if c.passes > MANY_PASSES:
        yield Warning(
            f"every row is learned {c.passes:.1f} times: after 3 to {MANY_PASSES} passes the held-out loss "
            "mostly rises while the training loss still falls",
            f"lower train.epochs or train.max_steps (to {max(1, round(c.steps * 3 / c.passes)):,} steps for "
            "3 passes), or gather more rows",
        )


def _lengths(c: Course) -> Iterator[Warning]:
    if c.packing:
        fill = c.tokens / (c.micro_batches * c.room) if c.micro_batches else 1.0
        if fill < GAPS and c.micro_batches > FEW_STEPS:
            yield Warning(
                f"packs are {fill:.0%} full: rows of up to {c.longest:,} tokens leave gaps in packs of "
                f"{c.max_length:,}",
                "data.packing: false with a larger train.micro_batch_size computes the same without packs",
            )
        return
    tokens = c.tokens / c.micro_batches if c.micro_batches else SMALL_PASS
    if tokens < min(SMALL_PASS, c.max_length / SHORT_ROWS) and c.micro_batches > FEW_STEPS:
        yield Warning(
            f"data.packing is off: a forward pass has {tokens:,.0f} tokens on average where "
            f"{c.max_length:,} fit, and passes so small leave the hardware idle",
            "set data.packing: true, or raise train.micro_batch_size",
        )
    if c.longest * SHORT_ROWS <= c.max_length:
        yield Warning(
            f"data.max_length is {c.max_length:,} and the longest row has {c.longest:,} tokens: it costs "
            "nothing here (no padding is computed), but other tools reserve memory for it",
            f"--set data.max_length={_rounded(c.longest)} says what is there",
        )


def _rate(c: Course) -> Iterator[Warning]:
    if c.highest_lr < 0.5 * c.lr:
        yield Warning(
            f"the learning rate never reaches train.lr {c.lr:g}: the highest of any step is "
            f"{c.highest_lr:.2g}",
            "shorten the warm-up (train.warmup_steps, train.warmup_ratio), or take more steps",
        )
    elif c.warmup_steps > LONG_WARMUP * c.steps and c.steps >= FEW_STEPS:
        reached = (
            f"train.lr {c.lr:g} is reached at the last step alone"
            if c.warmup_steps >= c.steps
            else f"{c.steps - c.warmup_steps:,} steps are left after it"
        )
        yield Warning(
            f"the warm-up takes {c.warmup_steps:,} of {c.steps:,} steps: {reached}",
            f"--set train.warmup_steps={max(1, round(0.03 * c.steps))}",
        )
    low, high = USUAL_LR[c.preference, c.adapters]
    if not low <= c.lr <= high:
        kind = ("preferences with " if c.preference else "") + ("adapters" if c.adapters else "all weights")
        told = "nothing may be learned" if c.lr < low else "the loss may diverge"
        yield Warning(
            f"train.lr is {c.lr:g}: for {kind} {low:g} to {high:g} is usual, and {told}",
            f"--set train.lr={math.sqrt(low * high):.0e}".replace("e-0", "e-"),
        )


def _steps(c: Course) -> Iterator[Warning]:
    if c.save_every > c.steps > FEW_STEPS:
        yield Warning(
            f"train.save_every is {c.save_every:,} and the run has {c.steps:,} steps: only its end is saved, "
            "and a run that is killed before is lost",
            f"--set train.save_every={max(FEW_STEPS, round(c.steps / 5))}",
        )


def _formats(c: Course) -> Iterator[Warning]:
    if c.loses_updates:
        yield Warning(
            "train.precision is bf16-pure without stochastic rounding: a bf16 weight keeps 8 bits, and an "
            f"update of less than 1/512 of it is lost (train.lr is {c.lr:g})",
            "set train.stochastic_rounding: true, or train.precision: bf16",
        )


def _rounded(tokens: int) -> int:
    """The next multiple of 64."""
    return -(-tokens // 64) * 64
