"""The warnings of a plan: what its rows, its steps and its learning rates come to."""

from __future__ import annotations

from math import ceil

from tunesmith.plan.warnings import Course, Warning, of_data, warnings_of
from tunesmith.recipe.schema import Recipe
from tunesmith.train.optim import make_schedule
from tunesmith.workflows.plan_subject import Subject, WorkPlan
from tunesmith.workflows.run_data import RunData


def warnings_on(subject: Subject, work: WorkPlan) -> list[Warning]:
    data = subject.data
    if data is None:
        return []
    told = of_data([*data.prepared.warnings, *data.steps.warnings])
    return told + warnings_of(course_of(subject.recipe, data, work))


def course_of(recipe: Recipe, data: RunData, work: WorkPlan) -> Course:
    """What the warnings of a plan are judged by. recipe: resolved, its steps too."""
    train, lengths = recipe.train, data.prepared.train.lengths
    assert train.lr != "auto" and train.save_every != "auto" and recipe.data.max_length != "auto"
    steps, totals, size = data.steps.total_steps, data.steps.totals(), train.micro_batch_size
    assert size != "auto"
    wanted = train.warmup_steps if train.warmup_steps is not None else ceil(train.warmup_ratio * steps)
    full = recipe.method.type == "full"
    return Course(
        preference=recipe.objective.type != "sft",
        adapters=not full,
        lr=train.lr,
        highest_lr=_highest_lr(recipe, data),
        warmup_steps=wanted,
        steps=steps,
        passes=work.passes or 0.0,
        save_every=train.save_every,
        packing=recipe.data.packing,
        train_rows=len(data.prepared.train),
        eval_rows=len(data.prepared.eval),
        longest=int(lengths.max()),
        max_length=recipe.data.max_length,
        tokens=totals.tokens,
        micro_batches=ceil(totals.packs / size),
        room=size * recipe.data.max_length,
        loses_updates=full
        and train.precision == "bf16-pure"
        and train.stochastic_rounding is not True
        and train.optimizer != "adamw-offload",
    )


def _highest_lr(recipe: Recipe, data: RunData) -> float:
    """Of any step; a schedule's highest is where its warm-up ends."""
    steps = data.steps.total_steps
    if data.lr is not None:
        return max(data.lr(step) for step in range(steps))
    schedule = make_schedule(recipe.train, steps)
    return schedule.lr(schedule.warmup_steps)
