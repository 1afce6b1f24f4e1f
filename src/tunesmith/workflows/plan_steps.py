"""Real optimizer steps of a plan's recipe on this machine, for their time: nothing is kept of them."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.errors import UserError
from tunesmith.hub.sources import resolve_model
from tunesmith.model.batch import Batch
from tunesmith.train.engine import SingleEngine
from tunesmith.train.speed import speed_up
from tunesmith.workflows.plan_subject import Subject
from tunesmith.workflows.plan_time import real_steps
from tunesmith.workflows.train_model import make_model

Timed = tuple[Sequence[Batch], float]


def timed_steps(subject: Subject, count: int) -> list[Timed]:
    """The micro-batches of the first `count` steps, each with its seconds. The weights are read.

    Raises UserError where no such step can be taken: for another machine, for several processes, without
    rows, and with an objective that needs a reference.
    """
    recipe, data, why = subject.recipe, subject.data, _fault(subject)
    if why:
        raise UserError(f"--steps {count}: {why}", hint="leave --steps out: time is then worked out")
    assert data is not None
    settings = recipe.model
    files = resolve_model(
        settings.path, revision=settings.revision, endpoints=settings.endpoint, offline=settings.offline
    )
    model = make_model(recipe, files, subject.tokenizer, None)
    speed_up(model, recipe.train)
    engine = SingleEngine(model, data.objective(model), recipe)
    model.train()
    steps = [data.steps(number) for number in range(min(count, data.steps.total_steps))]
    seconds = real_steps(engine, steps, max_norm=recipe.train.max_grad_norm)
    return list(zip(steps, seconds, strict=True))


def _fault(subject: Subject) -> str:
    """Why no real step can be taken; empty where one can."""
    reasons = {
        "the plan is for another machine": not subject.machine.here,
        "rows cannot be read without the model's tokenizer": subject.data is None,
        "several processes are not started for a plan": subject.recipe.parallel.engine != "single",
        f"objective.type {subject.recipe.objective.type} needs more than a step": (
            subject.recipe.objective.type not in ("sft", "orpo")
        ),
    }
    return next((reason for reason, found in reasons.items() if found), "")
