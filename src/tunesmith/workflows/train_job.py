"""A run from its resolved recipe on: load, plan, train, report."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import Interrupted
from tunesmith.core.events import EventLog
from tunesmith.core.paths import write_json, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, manifest_fault
from tunesmith.core.units import duration_text
from tunesmith.hub.lock import versions
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.recipe.load import dump_yaml
from tunesmith.recipe.resolve import resolve_steps, without_secrets
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint, states
from tunesmith.train.engines import SHARDED, make_engine
from tunesmith.train.group import share, wait_for_all
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.metrics import final_events, peak_gib
from tunesmith.train.ranks import Ranks
from tunesmith.train.report import report
from tunesmith.train.watch import Watch
from tunesmith.workflows.plan import RunPlan, holds_still, make_plan, refuse
from tunesmith.workflows.plan_machine import Machine, this_machine
from tunesmith.workflows.plan_model import PlannedModel
from tunesmith.workflows.plan_subject import Subject
from tunesmith.workflows.plan_view import short_lines
from tunesmith.workflows.run_data import RunData
from tunesmith.workflows.train_data import open_data
from tunesmith.workflows.train_model import make_model
from tunesmith.workflows.train_samples import make_sampler


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to. train_seconds: with evaluations, samples and saves; tokens_per_s and
    step_seconds: of the steps alone; eval_loss_before: of the model as it was."""

    run: RunFolder
    steps: int
    tokens: int
    supervised_tokens: int
    train_seconds: float
    step_seconds: float
    tokens_per_s: float
    final_loss: float | None
    eval_loss: float | None
    eval_loss_before: float | None
    peak_gib: float
    resumed: bool = False
    already_finished: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run.path)}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run stands, as rank 0 found it. recipe: resolved but for what depends on the steps; written: as
    the user has it; config: of the model; checkpoint: to go on from; resumed: the run had begun; fresh: one
    that has is moved aside; finished: its result; notes: warnings."""

    recipe: Recipe
    written: Recipe
    files: ModelFiles
    config: Any
    checkpoint: Path | None
    resumed: bool
    fresh: bool = False
    finished: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run learns from. recipe: resolved, its steps too."""

    recipe: Recipe
    tokenizer: Any
    data: RunData


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to train: everything loaded and checked. plan: of rank 0."""

    recipe: Recipe
    run: RunFolder
    files: ModelFiles
    tokenizer: Any
    data: RunData
    model: Any
    plan: RunPlan | None
    start: Start
    resume_command: str
    ranks: Ranks

    @property
    def warnings(self) -> list[str]:
        return [*self.start.notes, *self.data.prepared.warnings, *self.data.steps.warnings]


# -- getting ready ------------------------------------------------------------------------------------------


def open_inputs(start: Start) -> Inputs:
    """The tokenizer and the rows of a run. Raises UserError for whatever is wrong with them."""
    recipe = start.recipe
    _prepare_torch(recipe)
    template = Path(recipe.model.chat_template) if recipe.model.chat_template else None
    tokenizer = load_tokenizer(
        start.files.tokenizer,
        chat_template=template,
        trust_remote_code=recipe.model.trust_remote_code,
        new_tokens=recipe.model.new_tokens,
    )
    data = open_data(recipe, tokenizer)
    return Inputs(recipe=resolve_steps(recipe, data.steps.total_steps), tokenizer=tokenizer, data=data)


def plan_job(start: Start, inputs: Inputs, run: RunFolder) -> RunPlan:
    """The plan of a run on this machine, before its model is loaded. Raises PlanRefused, and leaves nothing
    but the plan."""
    recipe, resumed = inputs.recipe, start.resumed and not start.fresh
    count = recipe.hardware.processes
    assert count != "auto" and recipe.hardware.device != "auto"
    machine = this_machine(recipe.hardware.device, processes=count)
    plan = make_plan(
        Subject(
            recipe=recipe,
            written=start.written,
            run=run.path,
            model=PlannedModel(name=start.files.name, config=start.config, tokenizer=start.files.tokenizer),
            machine=machine,
            data=inputs.data,
            tokenizer=inputs.tokenizer,
            gpus=count,
            present_bytes=checkpoint.folder_bytes(run.checkpoints) if resumed else 0,
        ),
        earlier=planned_before(run, recipe, machine) if resumed else None,
    )
    if not plan.works and not run.lock.is_file():
        with suppress(OSError):  # a disk too full for the plan must not hide why it is refused
            write_json(run.plan, plan.as_dict())
    refuse(plan)
    return plan


def planned_before(run: RunFolder, recipe: Recipe, machine: Machine) -> dict[str, Any] | None:
    """The plan that the run began with, where recipe and machine are what they were."""
    try:
        same = run.resolved.read_text(encoding="utf-8") == dump_yaml(without_secrets(recipe))
        plan: dict[str, Any] = json.loads(run.plan.read_text(encoding="utf-8"))
        return plan if same and holds_still(plan, machine) else None
    except (OSError, ValueError, KeyError, TypeError):  # moved from elsewhere, or of another version
        return None


def open_job(
    start: Start, run: RunFolder, command: str, ranks: Ranks, inputs: Inputs, plan: RunPlan | None
) -> Job:
    """Load the model of a run that is planned."""
    recipe, files = inputs.recipe, start.files
    model = make_model(_loaded_on(recipe), files, inputs.tokenizer, start.checkpoint)
    if start.checkpoint is not None and recipe.parallel.engine in SHARDED:
        states.read_adapter(start.checkpoint, model)  # while it is whole; other engines read it themselves
    job = Job(
        recipe=recipe,
        run=run,
        files=files,
        tokenizer=inputs.tokenizer,
        data=inputs.data,
        model=model,
        plan=plan,
        start=start,
        resume_command=command,
        ranks=ranks,
    )
    _tell(job)
    return job


def _loaded_on(recipe: Recipe) -> Recipe:
    """The recipe that says where the model is loaded: what will be sharded, in host memory."""
    if recipe.parallel.engine not in SHARDED:
        return recipe
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"device": "cpu"})})


def _prepare_torch(recipe: Recipe) -> None:
    assert recipe.hardware.threads != "auto"
    torch.set_num_threads(recipe.hardware.threads)
    if recipe.hardware.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _tell(job: Job) -> None:
    for counts in job.data.prepared.counts:
        say(f"{counts.file}: {counts.format}, {counts.kept:,} of {counts.rows:,} rows kept")
    told = set(job.warnings)
    for warning in job.warnings:
        say(f"warning: {warning}")
    if job.plan is None:
        return
    for found in job.plan.warnings:
        if found.what not in told:
            say(f"warning: {found.what}; {found.remedy}")
    for line in short_lines(job.plan):
        say(line)


# -- training ----------------------------------------------------------------------------------------------


def train_job(job: Job) -> TrainResult:
    """Train, then let rank 0 write the report; the event `end` makes the run finished."""
    ranks = job.ranks
    with EventLog(job.run.events if ranks.first else Path(os.devnull)) as events:
        task = task_of(job)
        trainer = Trainer(task, events, make_engine(job.model, task.objective, job.recipe, ranks))
        _begin(job, trainer, events)
        try:
            with Watch(ranks):
                state = trainer.run()
        except Interrupted:
            wait_for_all(ranks)  # rank 0 is still saving
            raise
        result = share(_finish(job, trainer, events, state) if ranks.first else None, ranks)
    say(
        f"trained {result['steps']} steps in {duration_text(result['train_seconds'])}, "
        f"{result['tokens_per_s']:,.0f} tokens/s; {job.run.path}"
    )
    return TrainResult(job.run, **result, resumed=job.start.resumed)


def _finish(job: Job, trainer: Trainer, events: EventLog, state: checkpoint.State) -> dict[str, Any]:
    # A kill between the last save and the removal of an older one leaves that, and no other save comes.
    checkpoint.prune(job.run, job.recipe.train.keep_checkpoints)
    result = _result(job, state, peak_gib(trainer.device))
    assert job.plan is not None
    write_text(job.run.report, report(job.run.path.name, job.run.events, job.plan.as_dict(), result))
    events.write("end", status="finished", step=state.step, **result)
    return result


def task_of(job: Job) -> Task:
    recipe = job.recipe
    steps = job.data.steps
    return Task(
        recipe=recipe,
        run=job.run,
        model=job.model,
        total_steps=steps.total_steps,
        batches=steps,
        longest=steps.longest(),
        epochs_after=steps.epochs_after,
        eval_batches=job.data.eval_batches,
        sample=make_sampler(recipe, job.tokenizer, job.model),
        resume_command=job.resume_command,
        objective=job.data.objective(job.model),
        lr=job.data.lr,
    )


def _begin(job: Job, trainer: Trainer, events: EventLog) -> None:
    steps = job.data.steps.total_steps
    events.write(
        "start", run=str(job.run.path), total_steps=steps, processes=job.ranks.size, versions=versions()
    )
    events.write("data", **job.data.prepared.as_dict())
    if job.plan is not None:
        known = {"run", "data", "samples"}  # of the other events
        events.write("plan", **{key: value for key, value in job.plan.as_dict().items() if key not in known})
    for warning in job.warnings:
        events.write("warning", what=warning)
    for folder in sorted(job.run.checkpoints.glob("step-*")):
        fault = manifest_fault(folder)
        if fault:
            say(f"warning: {folder} is damaged and passed over: {fault}")
            events.write("warning", what=f"damaged checkpoint passed over: {fault}", path=str(folder))
    if job.start.checkpoint is not None:
        trainer.restore(job.start.checkpoint)
        say(f"resuming {job.run.path} after step {trainer.state.step} of {steps}")
    elif job.start.resumed:
        events.write("resume", step=0, checkpoint=None)
        say(f"resuming {job.run.path}, which had saved no checkpoint, from the beginning")


def _result(job: Job, state: checkpoint.State, peak: float) -> dict[str, Any]:
    evals = final_events(job.run.events, "eval")
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "train_seconds": round(state.train_s, 3),
        "step_seconds": round(state.step_s, 3),
        "tokens_per_s": round(state.tokens / state.step_s, 1) if state.step_s else 0.0,
        "final_loss": state.loss,
        "eval_loss": float(evals[-1]["loss"]) if evals else None,
        "eval_loss_before": float(evals[0]["loss"]) if evals else None,
        "peak_gib": round(peak, 3),
    }
