"""Train a recipe, or go on with its unfinished run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from tunesmith.cluster.launch import COMMAND
from tunesmith.core.errors import PlanRefused, RunFailed, TunesmithError, UserError
from tunesmith.core.paths import new_folder, write_json, write_text
from tunesmith.core.progress import console, say
from tunesmith.core.run_folder import RunFolder
from tunesmith.hub.lock import make_lock
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.config import context_length, load_config
from tunesmith.model.hardware import pick_device
from tunesmith.model.tokenizer import load_tokenizer, save_tokenizer
from tunesmith.plan.auto import has_auto, kept
from tunesmith.recipe.load import dump_yaml, load_recipe
from tunesmith.recipe.resolve import resolve, without_secrets
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint
from tunesmith.train.engines import check_engine
from tunesmith.train.group import is_lost_peer, join_group, leave_group, share
from tunesmith.train.ranks import Ranks, ranks_from
from tunesmith.workflows.launch import wait_for_the_end
from tunesmith.workflows.plan import RunPlan
from tunesmith.workflows.plan_machine import this_machine
from tunesmith.workflows.plan_model import PlannedModel
from tunesmith.workflows.plan_recipe import settled
from tunesmith.workflows.resume import (
    check_same_inputs,
    check_same_recipe,
    data_hashes,
    earlier_recipe,
    facts_for,
    finished_result,
    idle_ranks,
    other_ranks,
)
from tunesmith.workflows.run_facts import run_folder, run_url
from tunesmith.workflows.store import (
    Carrier,
    bring_checkpoint,
    carrying,
    move_aside,
    move_aside_in_store,
    take,
)
from tunesmith.workflows.token_facts import token_facts
from tunesmith.workflows.train_job import (
    Inputs,
    Job,
    Start,
    TrainResult,
    open_inputs,
    open_job,
    plan_job,
    train_job,
)


def train_recipe(recipe_path: Path, overrides: list[str], *, fresh: bool = False) -> TrainResult:
    """Train the recipe to its end, going on from the last checkpoint of its unfinished run.

    As one of several processes (`ranks_from` the environment) this one takes its part; rank 0 alone decides
    and writes. fresh: move an earlier run of the name aside and start anew. Raises UserError for bad input
    and for a recipe, model or data that changed since the run began; PlanRefused; RunFailed; Interrupted.
    """
    ranks = ranks_from(os.environ)
    recipe = load_recipe(recipe_path, overrides)
    run, url = run_folder(recipe, recipe_path), run_url(recipe, recipe_path)
    with ExitStack() as held:
        # Before the processes meet: those that a plan imagines take the place of a real group.
        found = look_ahead(recipe, run, ranks, held, fresh=fresh, url=url) if ranks.first else None
        keep = recipe.train.keep_checkpoints
        carrier = held.enter_context(carrying(run, url if ranks.first else None, keep=keep))
        held.enter_context(in_group(recipe, ranks))
        start = brought(agree(found, ranks), run, ranks, url)
        if start.finished is not None:
            say(f"{url or run.path}: this run is finished; --fresh trains it again")
            _start(carrier)
            return TrainResult(run, **start.finished, already_finished=True)
        inputs = found.inputs if isinstance(found, Outlook) and found.inputs else open_inputs(start)
        plan = found.plan if isinstance(found, Outlook) else None
        job = open_job(start, run, resume_command(recipe_path, overrides), ranks, inputs, plan)
        if ranks.first:
            write_inputs(job, recipe_path, url)
        _start(carrier)
        return train_job(job)


def _start(carrier: Carrier | None) -> None:
    if carrier is not None:
        carrier.start()


@dataclass(frozen=True)
class Outlook:
    """What rank 0 knows before it meets the others. inputs, plan: None of a run that is finished."""

    start: Start
    inputs: Inputs | None = None
    plan: RunPlan | None = None


def look_ahead(
    recipe: Recipe, run: RunFolder, ranks: Ranks, held: ExitStack, *, fresh: bool, url: str | None = None
) -> Outlook | TunesmithError:
    """Take the run's lock, find where it stands, and plan it. Returns an error where others wait for it."""
    try:
        held.enter_context(sole_trainer(run))
        if url is not None:
            take(run, url, fresh=fresh)
        start = begin(recipe, run, ranks, fresh=fresh)
        if start.finished is not None:
            return Outlook(start)
        inputs = open_inputs(start)
        if start.resumed:
            check_same_inputs(run, start.files, inputs.recipe)
            if url is not None and ranks.size > ranks.local_size:
                Carrier(run, url, keep=recipe.train.keep_checkpoints).carry()  # others bring it from there
        return Outlook(start, inputs, plan_job(start, inputs, run))
    except TunesmithError as error:
        if ranks.size == 1:
            raise
        return error


def agree(found: Outlook | TunesmithError | None, ranks: Ranks) -> Start:
    """Where the run stands, on every rank. Raises what rank 0 has found wrong."""
    fault = found if isinstance(found, TunesmithError) else None
    told = (type(fault) is PlanRefused, fault.what, fault.hint) if fault else None
    start, other = share((found.start if isinstance(found, Outlook) else None, told), ranks)
    if fault is not None:
        raise fault
    if other is not None:
        raise (PlanRefused if other[0] else UserError)(*other[1:])
    assert start is not None
    return start


def brought(start: Start, run: RunFolder, ranks: Ranks, url: str | None) -> Start:
    """The same, with its checkpoint on this machine."""
    if url is None or start.checkpoint is None or ranks.first:
        return start
    return replace(start, checkpoint=bring_checkpoint(run, url, start.checkpoint.name))


@contextmanager
def in_group(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """Together with the other processes, if there are any; all but rank 0 are silent.

    Raises RunFailed when one of them is lost.
    """
    if ranks.size == 1 and recipe.parallel.engine in ("auto", "single"):
        yield
        return
    console.quiet = console.quiet or not ranks.first
    device = pick_device(recipe.hardware.device).type
    join_group(ranks, "cuda" if device == "cuda" else "cpu")
    try:
        yield
        leave_group()
    except (RuntimeError, ConnectionError) as error:
        if not is_lost_peer(error):
            raise
        wait_for_the_end(os.environ)
        raise RunFailed(
            f"rank {ranks.rank}: the connection to another process was lost: {str(error).splitlines()[0]}",
            hint="that process tells why it ended; the same command goes on from the last checkpoint",
        ) from error


def begin(recipe: Recipe, run: RunFolder, ranks: Ranks, *, fresh: bool) -> Start:
    """What rank 0 finds, and all ranks go by. fresh: a run that has begun will be moved aside."""
    earlier = None if fresh else earlier_recipe(run)
    written, resolved, files, config = resolve_recipe(recipe, run, ranks, earlier)
    return Start(
        recipe=resolved,
        written=written,
        files=files,
        config=config,
        checkpoint=None if fresh else run.latest_checkpoint(),
        resumed=not fresh and run.lock.is_file(),
        fresh=fresh,
        finished=None if fresh else finished_result(run),
        notes=other_ranks(earlier, resolved) + idle_ranks(resolved, ranks),
    )


# -- the run folder ----------------------------------------------------------------------------------------


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


def write_inputs(job: Job, recipe_path: Path, url: str | None = None) -> None:
    """The files that describe the run. The lock is last: with it the run has begun."""
    run = job.run
    if job.start.fresh:
        move_aside(run)
        if url is not None:
            move_aside_in_store(url)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_leftovers(run)
    write_text(run.recipe, recipe_path.read_text(encoding="utf-8"))
    if job.recipe.serve.api_key:
        run.recipe.chmod(0o600)
    write_text(run.resolved, dump_yaml(without_secrets(job.recipe)))
    if not run.lock.is_file():
        with new_folder(run.path / "tokenizer") as folder:
            save_tokenizer(job.tokenizer, folder)
        assert job.plan is not None
        write_json(run.plan, job.plan.as_dict())
        write_json(run.lock, make_lock(job.files, data_hashes(job.recipe)) | {"tokens": _token_facts(job)})


def _token_facts(job: Job) -> dict[str, Any]:
    """Of the tokenizer as it was saved, which is the one that will be served."""
    trust = job.recipe.model.trust_remote_code
    saved = load_tokenizer(job.run.path / "tokenizer", trust_remote_code=trust)
    return token_facts(saved, getattr(job.model, "generation_config", None))


def resolve_recipe(
    recipe: Recipe, run: RunFolder, ranks: Ranks, earlier: Recipe | None
) -> tuple[Recipe, Recipe, ModelFiles, Any]:
    """The recipe with its method and micro-batch chosen, the recipe without any "auto", the model's files and
    its configuration; the values of an unfinished run are kept.

    Raises UserError with every difference when the run was begun with another recipe.
    """
    model = recipe.model
    files = resolve_model(
        model.path, revision=model.revision, endpoints=model.endpoint, offline=model.offline
    )
    config = load_config(files.folder, trust_remote_code=model.trust_remote_code)
    if recipe.parallel.engine == "auto" and ranks.size > 1:
        parallel = recipe.parallel.model_copy(update={"engine": "ddp"})
        recipe = recipe.model_copy(update={"parallel": parallel})
    if has_auto(recipe):
        recipe = kept(recipe, earlier) if earlier is not None else chosen(recipe, files, config, ranks)
    resolved = resolve(recipe, facts_for(recipe, context_length(config), earlier, ranks.local_size))
    if resolved.hardware.processes != ranks.local_size:
        raise UserError(
            f"hardware.processes: {resolved.hardware.processes}, but {ranks.local_size} were started here",
            hint="leave it 'auto' under torchrun or srun; else start with 'tunesmith train'",
        )
    check_engine(resolved, ranks)
    if earlier is not None:
        check_same_recipe(run, earlier, resolved)
    return recipe, resolved, files, config


def chosen(recipe: Recipe, files: ModelFiles, config: Any, ranks: Ranks) -> Recipe:
    """The recipe with the method and the micro-batch that fit this machine, in place of "auto"."""
    device: Any = pick_device(recipe.hardware.device).type
    machine = this_machine(device, processes=ranks.local_size)
    model = PlannedModel(name=files.name, config=config, tokenizer=files.tokenizer)
    choice = settled(recipe, model, machine)
    for reason in choice.reasons:
        say(reason)
    return choice.recipe


def resume_command(recipe_path: Path, overrides: list[str]) -> str:
    """What a person types to go on: on one of several hosts, where they began it."""
    return os.environ.get(COMMAND) or shlex.join(
        ["tunesmith", "train", str(recipe_path), *(part for o in overrides for part in ("--set", o))]
    )
