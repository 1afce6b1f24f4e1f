"""Train a recipe, or go on with its unfinished run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import filelock

from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.paths import new_folder, write_json, write_text
from tunesmith.core.progress import console, say
from tunesmith.core.run_folder import RunFolder
from tunesmith.hub.lock import make_lock
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.config import context_length, load_config
from tunesmith.model.hardware import pick_device
from tunesmith.model.tokenizer import load_tokenizer, save_tokenizer
from tunesmith.recipe.load import dump_yaml, load_recipe
from tunesmith.recipe.resolve import resolve, without_secrets
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint
from tunesmith.train.engines import check_engine
from tunesmith.train.group import is_lost_peer, join_group, leave_group, share
from tunesmith.train.ranks import Ranks, ranks_from
from tunesmith.workflows.launch import processes_here, wait_for_the_end
from tunesmith.workflows.resume import (
    check_same_recipe,
    data_hashes,
    earlier_recipe,
    facts_for,
    finished_result,
    idle_ranks,
    other_ranks,
)
from tunesmith.workflows.run_facts import run_folder
from tunesmith.workflows.token_facts import token_facts
from tunesmith.workflows.train_job import Job, Start, TrainResult, open_job, train_job


def train_recipe(recipe_path: Path, overrides: list[str], *, fresh: bool = False) -> TrainResult:
    """Train the recipe to its end, going on from the last checkpoint of its unfinished run.

    As one of several processes (`ranks_from` the environment) this one takes its part; rank 0 alone decides
    and writes. fresh: move an earlier run of the name aside and start anew. Raises UserError for bad input
    and for a recipe, model or data that changed since the run began; PlanRefused; RunFailed; Interrupted.
    """
    ranks = ranks_from(os.environ)
    recipe = load_recipe(recipe_path, overrides)
    run = run_folder(recipe, recipe_path)
    with in_group(recipe, ranks), sole_trainer(run) if ranks.first else nullcontext():
        start = share(begin(recipe, run, ranks, fresh=fresh) if ranks.first else None, ranks)
        if start.finished is not None:
            say(f"{run.path}: this run is finished; --fresh trains it again")
            return TrainResult(run, **start.finished, already_finished=True)
        job = open_job(start, run, resume_command(recipe_path, overrides), ranks)
        if ranks.first:
            write_inputs(job, recipe_path)
        return train_job(job)


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
    """What rank 0 finds, and all ranks go by."""
    if fresh:
        move_aside(run)
    earlier = earlier_recipe(run)
    resolved, files = resolve_recipe(recipe, run, ranks)
    return Start(
        recipe=resolved,
        files=files,
        checkpoint=run.latest_checkpoint(),
        resumed=run.lock.is_file(),
        finished=finished_result(run),
        notes=other_ranks(earlier, resolved) + idle_ranks(resolved, ranks),
    )


def plan_recipe(recipe_path: Path, overrides: list[str]) -> dict[str, Any]:
    """What `train_recipe` would do, as plain values; nothing is trained or written into the run folder."""
    recipe = load_recipe(recipe_path, overrides)
    run = run_folder(recipe, recipe_path)
    ranks = Ranks(size=processes_here(recipe), local_size=processes_here(recipe))
    job = open_job(begin(recipe, run, ranks, fresh=False), run, resume_command(recipe_path, overrides), ranks)
    return {"run": str(run.path), "data": job.data.prepared.as_dict()} | job.plan.as_dict()


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
    checkpoint.clear_leftovers(run)
    write_text(run.recipe, recipe_path.read_text(encoding="utf-8"))
    if job.recipe.serve.api_key:
        run.recipe.chmod(0o600)
    write_text(run.resolved, dump_yaml(without_secrets(job.recipe)))
    if not run.lock.is_file():
        with new_folder(run.path / "tokenizer") as folder:
            save_tokenizer(job.tokenizer, folder)
        write_json(run.plan, job.plan.as_dict())
        write_json(run.lock, make_lock(job.files, data_hashes(job.recipe)) | {"tokens": _token_facts(job)})


def _token_facts(job: Job) -> dict[str, Any]:
    """Of the tokenizer as it was saved, which is the one that will be served."""
    trust = job.recipe.model.trust_remote_code
    saved = load_tokenizer(job.run.path / "tokenizer", trust_remote_code=trust)
    return token_facts(saved, getattr(job.model, "generation_config", None))


def resolve_recipe(recipe: Recipe, run: RunFolder, ranks: Ranks) -> tuple[Recipe, ModelFiles]:
    """The recipe without "auto" and the model's files; the values of an unfinished run are kept.

    Raises UserError with every difference when the run was begun with another recipe.
    """
    model = recipe.model
    files = resolve_model(
        model.path, revision=model.revision, endpoints=model.endpoint, offline=model.offline
    )
    limit = context_length(load_config(files.folder, trust_remote_code=model.trust_remote_code))
    earlier = earlier_recipe(run)
    if recipe.parallel.engine == "auto" and ranks.size > 1:
        parallel = recipe.parallel.model_copy(update={"engine": "ddp"})
        recipe = recipe.model_copy(update={"parallel": parallel})
    resolved = resolve(recipe, facts_for(recipe, limit, earlier, ranks.local_size))
    if resolved.hardware.processes != ranks.local_size:
        raise UserError(
            f"hardware.processes: {resolved.hardware.processes}, but {ranks.local_size} were started here",
            hint="leave it 'auto' under torchrun or srun; else start with 'tunesmith train'",
        )
    check_engine(resolved, ranks)
    if earlier is not None:
        check_same_recipe(run, earlier, resolved)
    return resolved, files


def resume_command(recipe_path: Path, overrides: list[str]) -> str:
    return shlex.join(
        ["tunesmith", "train", str(recipe_path), *(part for o in overrides for part in ("--set", o))]
    )
