"""Train a recipe in workers of a Ray cluster: the same training, started and restarted by Ray Train."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tunesmith.cluster.launch import COMMAND
from tunesmith.cluster.ray_train import Nodes, Workers, ask, connected, listen, train_together, workers_of
from tunesmith.core.errors import Interrupted, RunFailed, TunesmithError, UserError
from tunesmith.core.net import free_port
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder
from tunesmith.core.stop import ask_to_stop
from tunesmith.core.store import Store, is_url
from tunesmith.hub.lock import versions
from tunesmith.recipe.load import load_recipe, override
from tunesmith.recipe.schema import Recipe
from tunesmith.train.group import is_lost_peer
from tunesmith.train.ranks import ranks_from
from tunesmith.workflows.launch import as_error
from tunesmith.workflows.run_facts import run_folder, run_url
from tunesmith.workflows.train import train_recipe
from tunesmith.workflows.train_job import TrainResult


def train_on_ray(
    recipe_path: Path, overrides: list[str], address: str, *, fresh: bool = False, workers: str | None = None
) -> TrainResult:
    """Train the recipe on the Ray cluster at `address`: auto, HOST:PORT or ray://HOST:PORT.

    workers: "4", or "2:8" for as many as the cluster has room for; None: one for every GPU, or for every
    node without GPUs. A run that was begun elsewhere goes on here, and the other way round. What a worker
    that dies had done since the last checkpoint is done again, exactly.
    Raises as `train_recipe` does; RunFailed when Ray has given up.
    """
    recipe = load_recipe(recipe_path, overrides)
    with connected(address) as nodes:
        chosen = workers_for(recipe, nodes, workers)
        say(f"Ray: {nodes.count} nodes, {nodes.cpus} CPUs, {nodes.gpus} GPUs; {chosen.text}")
        if chosen.least > (nodes.gpus if chosen.gpu else nodes.cpus):
            say("warning: that is more than the cluster has; waiting until it has grown")
        sent = parcel(recipe, recipe_path, overrides, fresh=fresh)
        # A job has been told what a person types.
        sent["command"] = os.environ.get(COMMAND) or command_of(recipe_path, overrides, address, workers)
        name = recipe.name or recipe_path.stem
        result = train_together(take_part, sent, chosen, name=name)
    if "signal" in result:
        raise Interrupted(result["signal"], result["error"]["what"], result["error"]["hint"])
    if "error" in result:
        raise as_error(result["error"], result["who"])
    return TrainResult(**result | {"run": RunFolder(Path(result["run"]))})


def workers_for(recipe: Recipe, nodes: Nodes, wanted: str | None) -> Workers:
    """How many workers, and on what. Raises UserError where the recipe cannot have them."""
    device, processes = recipe.hardware.device, recipe.hardware.processes
    if device == "cuda" and nodes.gpus == 0:
        raise UserError("hardware.device: cuda, but the Ray cluster has no GPU", hint="hardware.device: auto")
    gpu = device != "cpu" and nodes.gpus > 0
    single = recipe.parallel.engine == "single"
    if wanted is not None:
        least, most = workers_of(wanted)
        if single and most > 1:
            raise UserError(
                f"--workers {wanted}, but parallel.engine is single", hint="--set parallel.engine=auto"
            )
        return Workers(least, most, gpu)
    each = 1 if processes == "auto" else processes
    count = 1 if single else nodes.gpus if gpu and processes == "auto" else each * nodes.count
    return Workers(count, count, gpu)


def parcel(recipe: Recipe, recipe_path: Path, overrides: list[str], *, fresh: bool) -> dict[str, Any]:
    """What every worker is told. Folders are named in full: a worker starts in one of its own."""
    laid_over = [*overrides, "hardware.processes=auto"]
    if not is_url(recipe.output_dir):
        laid_over.append(override("output_dir", str(run_folder(recipe, recipe_path).path.parent)))
    return {
        "path": str(recipe_path.absolute()),
        "text": recipe_path.read_text(encoding="utf-8"),
        "overrides": laid_over,
        "folder": str(Path.cwd()),
        "fresh": fresh,
    }


def command_of(recipe_path: Path, overrides: list[str], address: str, workers: str | None) -> str:
    """What a person types to go on with the run."""
    args = ["tunesmith", "train", str(recipe_path), "--cluster", address]
    args += ["--workers", workers] if workers else []
    return shlex.join([*args, *(part for override in overrides for part in ("--set", override))])


# -- in a worker -------------------------------------------------------------------------------------------


def take_part(sent: dict[str, Any]) -> dict[str, Any]:
    """One worker's part of the training: the result, or the error that no retry can mend.

    An error leaves no other worker waiting: it is raised, so that Ray ends them all, and told by all that
    come after.
    """
    if told := ask(sent["ledger"], "fault"):
        return dict(told)
    ranks = ranks_from(os.environ)
    listen(sent["ledger"], ask_to_stop)
    try:
        if Path(sent["folder"]).is_dir():
            os.chdir(sent["folder"])
        recipe_path, overrides = recipe_here(sent), sent["overrides"]
        recipe = load_recipe(recipe_path, overrides)
        meet_again(recipe, recipe_path)
        os.environ[COMMAND] = sent["command"]
        fresh = sent["fresh"] and ranks.first and is_still_there(recipe, recipe_path, sent["ledger"])
        return train_recipe(recipe_path, overrides, fresh=fresh).as_dict()
    except TunesmithError as error:
        told = {"error": error.as_dict(), "who": f"rank {ranks.rank}"}
        if isinstance(error, Interrupted):  # all ranks, after the same step
            return told | {"signal": error.exit_code - 128}
        if ranks.size == 1:
            return told
        if not (isinstance(error, RunFailed) and error.__cause__ and is_lost_peer(error.__cause__)):
            ask(sent["ledger"], "give_up", told)
        raise RuntimeError(str(error)) from None


def recipe_here(sent: dict[str, Any]) -> Path:
    """The recipe's file: the very one where this machine sees it, else a copy."""
    path = Path(sent["path"])
    if path.is_file() and path.read_text(encoding="utf-8") == sent["text"]:
        return path
    copy = Path(tempfile.mkdtemp(prefix="tunesmith-recipe-")) / path.name
    copy.write_text(sent["text"], encoding="utf-8")
    return copy


def is_still_there(recipe: Recipe, recipe_path: Path, ledger: Any) -> bool:
    """Whether the run that `fresh` moves aside is the one that the first attempt found: a retry goes on with
    the new one."""
    now = mark_of(recipe, recipe_path)
    return bool(ask(ledger, "first", now) == now)


def mark_of(recipe: Recipe, recipe_path: Path) -> str | None:
    """Tells a run from another that takes its place; None where there is none."""
    if url := run_url(recipe, recipe_path):
        lock = Store(url).read("lock.json")
        return None if lock is None else hashlib.sha256(lock).hexdigest()
    path = run_folder(recipe, recipe_path).lock
    found = path.stat() if path.is_file() else None
    return None if found is None else f"{found.st_ino} {found.st_mtime_ns}"


def meet_again(recipe: Recipe, recipe_path: Path) -> None:
    """Leave the group that Ray has formed: a plan imagines another, before `train_recipe` joins the real one
    at a port of its own.

    Raises UserError when the workers differ in versions or do not share the folder of runs.
    """
    first, folder = dist.get_rank() == 0, run_folder(recipe, recipe_path).path.parent
    probe = folder / f".shared-{uuid.uuid4().hex}"
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    said = [(str(probe), free_port(), versions()) if first else None]
    dist.broadcast_object_list(said, src=0)
    assert said[0] is not None
    place, port, theirs = said[0]
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, is_url(recipe.output_dir) or Path(place).exists())
    probe.unlink(missing_ok=True)
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    check_alike(folder, seen, theirs, versions())


def check_alike(folder: Path, seen: list[bool], theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Raise UserError where a rank has not `seen` what rank 0 wrote in `folder`, or has other versions."""
    if not all(seen):
        raise UserError(
            f"output_dir: {folder}: what rank 0 writes there, rank {seen.index(False)} does not see",
            hint="a folder that all nodes share (NFS), or an object store: output_dir: s3://BUCKET/FOLDER",
        )
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if there != here:
            raise UserError(
                f"{name} is {there} on the node of rank 0 and {here} on this one",
                hint="install the same versions on all nodes",
            )
