"""What is planned, and what its rows come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.batches import StepPlan
from tunesmith.model.batch import Batch
from tunesmith.model.new_tokens import token_ids
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.data import ShownRow, spans_of
from tunesmith.workflows.plan_machine import Machine
from tunesmith.workflows.plan_memory import worst_batch
from tunesmith.workflows.plan_model import PlannedModel
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.run_data import RunData
from tunesmith.workflows.train_samples import prompt_ids


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned. recipe: resolved; written: as the user has it; run: its folder; data, tokenizer: None
    without a tokenizer; gpus: cards that may be used; measured: real steps with their seconds;
    present_bytes: what an earlier part of the same run has already written; notes: what to know of it."""

    recipe: Recipe
    written: Recipe
    run: Path
    model: PlannedModel
    machine: Machine
    data: RunData | None
    tokenizer: Any
    gpus: int = 1
    measured: tuple[tuple[Sequence[Batch], float], ...] = ()
    price_per_hour: float | None = None
    present_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """Optimizer steps and tokens (none of them padding) of the run; None where they cannot be counted.

    batch_tokens, batch_supervised: of the largest micro-batch; passes: over the training rows.
    """

    steps: int | None
    tokens: int | None
    supervised_tokens: int | None
    passes: float | None
    packs: int | None
    batch_tokens: int
    batch_supervised: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def counts_of(data: RunData) -> dict[str, Any]:
    """Rows, packs and lengths of prepared data, as plain values."""
    lengths = data.prepared.train.lengths
    found: dict[str, Any] = {
        "train_rows": len(data.prepared.train),
        "eval_rows": len(data.prepared.eval),
        "longest_row": int(lengths.max()),
        "mean_row": round(float(lengths.mean()), 1),
    }
    steps = data.steps
    if isinstance(steps, StepPlan):
        found["packing"] = {"on": steps.packing, "efficiency": round(steps.pack_efficiency, 4)}
        found["steps_per_epoch"] = steps.steps_per_epoch
    return found


def samples_of(subject: Subject, count: int) -> list[ShownRow]:
    """The first training rows, exactly as they are learned."""
    if subject.data is None or count < 1:
        return []
    store = subject.data.prepared.train
    formats = {counts.file: counts.format for counts in subject.data.prepared.counts}
    shown = []
    for number in range(min(count, len(store))):
        ids, labels = store[number]
        mask = (labels >= 0).tolist()
        file, _, place = store.place(store.row(number)).rpartition(": ")
        branches = store.branches_of(number).tolist()
        spans = spans_of(ids.tolist(), mask, branches, subject.tokenizer)
        row = int(place.split()[-1])
        shown.append(ShownRow(file, row, formats[file], len(ids), sum(mask), "used", spans, ids.tolist()))
    return shown


def work_of(subject: Subject) -> WorkPlan:
    recipe, batch = subject.recipe, largest_batch(subject)
    known: dict[str, Any] = dict.fromkeys(("tokens", "supervised_tokens", "passes", "packs"))
    known["steps"] = recipe.train.max_steps
    if subject.data is not None:
        steps = subject.data.steps
        totals = steps.totals()
        known = {
            "steps": steps.total_steps,
            "tokens": totals.tokens,
            "supervised_tokens": totals.supervised,
            "passes": round(steps.epochs_after(steps.total_steps), 4),
            "packs": totals.packs,
        }
    return WorkPlan(batch_tokens=batch.num_tokens, batch_supervised=batch.num_supervised, **known)


def largest_batch(subject: Subject) -> Batch:
    """The largest micro-batch of the run; the largest that the recipe allows where rows are not known."""
    return worst_batch(subject.recipe) if subject.data is None else subject.data.steps.longest()


def new_token_ids(subject: Subject) -> tuple[int, ...]:
    """The numbers of the recipe's new tokens."""
    if subject.tokenizer is None:
        return ()
    return tuple(token_ids(subject.tokenizer, subject.recipe.model.new_tokens))


def traced_work(subject: Subject, new_ids: tuple[int, ...] = ()) -> Work:
    """The largest micro-batch, the largest batch of held-out rows, the sample prompts with their answers."""
    data, recipe = subject.data, subject.recipe
    if data is None:
        return Work(batch=largest_batch(subject), new_token_ids=new_ids)
    held_out = max(data.eval_batches, key=lambda batch: batch.num_tokens, default=None)
    samples = recipe.samples
    prompts = (prompt_ids(subject.tokenizer, recipe.data.system, text) for text in samples.prompts)
    return Work(
        batch=largest_batch(subject),
        eval_batch=held_out,
        sample_tokens=sum(len(ids) + samples.max_new_tokens for ids in prompts),
        new_token_ids=new_ids,
        objective=data.objective,
    )
