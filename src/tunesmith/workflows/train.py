"""Train a recipe, or go on with its unfinished run: load, plan, train, report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from tunesmith.core.errors import UserError
from tunesmith.core.events import EventLog
from tunesmith.core.paths import cache_dir, new_folder, write_json, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, manifest_holds
from tunesmith.core.units import duration_text
from tunesmith.data.batches import StepPlan, eval_batches
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.hub.lock import make_lock, versions
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.load import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    save_tokenizer,
)
from tunesmith.recipe.load import dump_yaml, load_recipe
from tunesmith.recipe.resolve import resolve, resolve_steps, without_secrets
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.metrics import final_events, peak_gib
from tunesmith.train.precision import base_dtype, cast_trained
from tunesmith.train.report import report
from tunesmith.workflows.data import step_plan
from tunesmith.workflows.open_model import load_files
from tunesmith.workflows.plan import RunPlan, plan_run
from tunesmith.workflows.resume import (
    check_same_inputs,
    check_same_recipe,
    data_hashes,
    earlier_recipe,
    facts_for,
    finished_result,
)
from tunesmith.workflows.train_samples import make_sampler

EVAL_TOKENS = 2048
ALIGNMENT = 64


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
class Job:
    """A run that is ready to train: everything loaded, planned and checked."""

    recipe: Recipe
    run: RunFolder
    files: ModelFiles
    tokenizer: Any
    prepared: Prepared
    steps: StepPlan
    model: Any
    plan: RunPlan
    checkpoint: Path | None
    resume_command: str


def train_recipe(recipe_path: Path, overrides: list[str], *, fresh: bool = False) -> TrainResult:
    """Train the recipe to its end, going on from the last checkpoint of its unfinished run.

    fresh: move an earlier run of the name aside and start anew. Raises UserError for bad input and for a
    recipe, model or data that changed since the run began; PlanRefused; RunFailed; Interrupted.
    """
    recipe = load_recipe(recipe_path, overrides)
    run = run_folder(recipe, recipe_path)
    with sole_trainer(run):
        if fresh:
            move_aside(run)
        resolved, files = resolve_recipe(recipe, run)
        known = finished_result(run)
        if known is not None:
            say(f"{run.path}: this run is finished; --fresh trains it again")
            return TrainResult(run, **known, already_finished=True)
        job = open_job(resolved, files, run, resume_command(recipe_path, overrides))
        resumed = run.lock.is_file()
        write_inputs(job, recipe_path)
        return train_job(job, resumed=resumed)


def plan_recipe(recipe_path: Path, overrides: list[str]) -> dict[str, Any]:
    """What `train_recipe` would do, as plain values; nothing is trained or written into the run folder."""
    recipe = load_recipe(recipe_path, overrides)
    run = run_folder(recipe, recipe_path)
    resolved, files = resolve_recipe(recipe, run)
    job = open_job(resolved, files, run, resume_command(recipe_path, overrides))
    return {"run": str(run.path), "data": job.prepared.as_dict()} | job.plan.as_dict()


# -- the run folder ----------------------------------------------------------------------------------------


def run_folder(recipe: Recipe, recipe_path: Path) -> RunFolder:
    return RunFolder((Path(recipe.output_dir).expanduser() / (recipe.name or recipe_path.stem)).absolute())


@contextmanager
def sole_trainer(run: RunFolder) -> Iterator[None]:
    """Hold the run's lock, which ends with the process. Raises UserError when another process holds it."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run.path.parent / f".{run.path.name}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{run.path}: another process is training this run",
            hint="wait for it or stop it; a second training needs another name: --set name=NAME",
        ) from None
    try:
        yield
    finally:
        lock.release()


def move_aside(run: RunFolder) -> None:
    """Rename an earlier run to NAME.1, or the first such name that is free."""
    if not run.path.exists():
        return
    number = 1
    while (target := run.path.with_name(f"{run.path.name}.{number}")).exists():
        number += 1
    run.path.rename(target)
    say(f"moved the earlier run to {target}")


def write_inputs(job: Job, recipe_path: Path) -> None:
    """The files that describe the run. The lock is last: with it the run has begun."""
    run = job.run
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe, recipe_path.read_text(encoding="utf-8"))
    if job.recipe.serve.api_key:
        run.recipe.chmod(0o600)
    write_text(run.resolved, dump_yaml(without_secrets(job.recipe)))
    if not run.lock.is_file():
        with new_folder(run.path / "tokenizer") as folder:
            save_tokenizer(job.tokenizer, folder)
        write_json(run.plan, job.plan.as_dict())
        write_json(run.lock, make_lock(job.files, data_hashes(job.recipe)))
    else:
        checkpoint.clear_leftovers(run)


# -- getting ready -----------------------------------------------------------------------------------------


def resolve_recipe(recipe: Recipe, run: RunFolder) -> tuple[Recipe, ModelFiles]:
    """The recipe without "auto" and the model's files; the values of an unfinished run are kept.

    Raises UserError with every difference when the run was begun with another recipe.
    """
    model = recipe.model
    files = resolve_model(
        model.path, revision=model.revision, endpoints=model.endpoint, offline=model.offline
    )
    limit = context_length(load_config(files.folder, trust_remote_code=model.trust_remote_code))
    earlier = earlier_recipe(run)
    resolved = resolve(recipe, facts_for(recipe, limit, earlier))
    if earlier is not None:
        check_same_recipe(run, earlier, resolved)
    return resolved, files


def open_job(recipe: Recipe, files: ModelFiles, run: RunFolder, command: str) -> Job:
    """Load data, tokenizer and model, and plan the run."""
    _prepare_torch(recipe)
    template = Path(recipe.model.chat_template) if recipe.model.chat_template else None
    trust = recipe.model.trust_remote_code
    tokenizer = load_tokenizer(files.tokenizer, chat_template=template, trust_remote_code=trust)
    prepared = prepare(recipe.data, tokenizer, cache_dir=cache_dir())
    steps = step_plan(prepared, recipe.data, recipe.train)
    recipe = resolve_steps(recipe, steps.total_steps)
    if run.lock.is_file():
        check_same_inputs(run, files, recipe)
    found = run.latest_checkpoint()
    model = make_model(recipe, files, found)
    present = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    totals = steps.totals()
    plan = plan_run(
        recipe,
        model,
        steps=steps.total_steps,
        tokens=totals.tokens,
        supervised=totals.supervised,
        run=run.path,
        present_bytes=present,
    )
    _tell(prepared, steps, plan)
    return Job(
        recipe=recipe,
        run=run,
        files=files,
        tokenizer=tokenizer,
        prepared=prepared,
        steps=steps,
        model=model,
        plan=plan,
        checkpoint=found,
        resume_command=command,
    )


def _prepare_torch(recipe: Recipe) -> None:
    assert recipe.hardware.threads != "auto"
    torch.set_num_threads(recipe.hardware.threads)
    if recipe.hardware.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def make_model(recipe: Recipe, files: ModelFiles, found: Path | None) -> Any:
    """The model to train: of a full fine-tune's checkpoint if there is one, else the base; adapters fresh."""
    full = recipe.method.type == "full"
    assert recipe.train.precision != "auto"
    dtype = base_dtype(recipe.train.precision, full=full)
    device, trust = recipe.hardware.device, recipe.model.trust_remote_code
    if full and found is not None:
        model = load_model(found / "model", dtype=dtype, device=device, trust_remote_code=trust)
    else:
        model = load_files(files, dtype=dtype, device=device, merge=True, trust_remote_code=trust).model
    assert recipe.data.max_length != "auto"
    attention.install(model, max_length=recipe.data.max_length)
    if not full:
        model = _with_adapters(model, recipe)
    cast_trained(model, recipe.train.precision)
    _align(model)
    if recipe.train.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def _with_adapters(model: Any, recipe: Recipe) -> Any:
    method = recipe.method
    assert method.alpha != "auto"
    return attach_lora(
        model,
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        targets=method.targets,
        rslora=method.rslora,
        seed=recipe.train.seed,
    )


def _align(model: torch.nn.Module) -> None:
    """Weights that lie mapped in a file may be aligned otherwise than those of the resumed run, and a matrix
    product can then differ in its last bit."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _checkpoint_activations(model: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers renamed it in 5.x; both take the settings first.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _tell(prepared: Prepared, steps: StepPlan, plan: RunPlan) -> None:
    for counts in prepared.counts:
        say(f"{counts.file}: {counts.format}, {counts.kept:,} of {counts.rows:,} rows kept")
    for warning in [*prepared.warnings, *steps.warnings]:
        say(f"warning: {warning}")
    say(f"plan: {plan.work.text()}")
    say(f"disk: {plan.disk.text()}")


# -- training ----------------------------------------------------------------------------------------------


def train_job(job: Job, *, resumed: bool) -> TrainResult:
    """Train, then write the report; the event `end` makes the run finished."""
    with EventLog(job.run.events) as events:
        trainer = Trainer(task_of(job), events)
        _begin(job, trainer, events, resumed=resumed)
        state = trainer.run()
        result = _result(job, state, peak_gib(trainer.device))
        write_text(job.run.report, report(job.run.path.name, job.run.events, job.plan.as_dict(), result))
        events.write("end", status="finished", step=state.step, **result)
    say(
        f"trained {result['steps']} steps in {duration_text(result['train_seconds'])}, "
        f"{result['tokens_per_s']:,.0f} tokens/s; {job.run.path}"
    )
    return TrainResult(job.run, **result, resumed=resumed)


def task_of(job: Job) -> Task:
    recipe = job.recipe
    held_out = eval_batches(job.prepared.eval, max_tokens=EVAL_TOKENS, max_rows=recipe.eval.max_rows)
    return Task(
        recipe=recipe,
        run=job.run,
        model=job.model,
        total_steps=job.steps.total_steps,
        batches=job.steps,
        longest=job.steps.longest(),
        epochs_after=job.steps.epochs_after,
        eval_batches=held_out,
        sample=make_sampler(recipe, job.tokenizer, job.model),
        resume_command=job.resume_command,
    )


def _begin(job: Job, trainer: Trainer, events: EventLog, *, resumed: bool) -> None:
    events.write("start", run=str(job.run.path), total_steps=job.steps.total_steps, versions=versions())
    events.write("data", **job.prepared.as_dict())
    events.write("plan", **job.plan.as_dict())
    for warning in [*job.prepared.warnings, *job.steps.warnings]:
        events.write("warning", what=warning)
    for folder in sorted(job.run.checkpoints.glob("step-*")):
        if not manifest_holds(folder):
            say(f"warning: {folder} is damaged and passed over")
            events.write("warning", what="damaged checkpoint passed over", path=str(folder))
    if job.checkpoint is not None:
        trainer.restore(job.checkpoint)
        say(f"resuming {job.run.path} after step {trainer.state.step} of {job.steps.total_steps}")
    elif resumed:
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


def resume_command(recipe_path: Path, overrides: list[str]) -> str:
    return shlex.join(
        ["tunesmith", "train", str(recipe_path), *(part for o in overrides for part in ("--set", o))]
    )
