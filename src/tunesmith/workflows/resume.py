"""May an earlier run be gone on with? Only with the recipe, model and data that it was begun with."""

from __future__ import annotations

from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.events import read_events
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder
from tunesmith.data.readers import open_source
from tunesmith.hub.lock import differences, read_lock, verify_model, versions
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.hardware import (
    DTYPES,
    pick_device,
    pick_kernels,
    pick_serving_dtype,
    pick_training_precision,
    set_threads,
)
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resolve import Facts
from tunesmith.recipe.schema import Recipe
from tunesmith.train.ranks import Ranks

# Keys that do not change what is trained; every other change makes another run.
FREE = (
    "name", "output_dir", "model.endpoint", "model.offline", "data.workers", "train.save_every",
    "train.keep_checkpoints", "train.log_every", "train.tensorboard", "eval", "samples", "serve",
    "parallel", "hardware.processes",
)  # fmt: skip


def earlier_recipe(run: RunFolder) -> Recipe | None:
    """The resolved recipe of a run that has begun, else None."""
    return load_recipe(run.resolved) if run.lock.is_file() and run.resolved.is_file() else None


def facts_for(recipe: Recipe, context_length: int, earlier: Recipe | None, processes: int) -> Facts:
    """What this machine can do; for a run that has begun, what it was begun with. The processes on this
    machine divide its cores among them."""
    place = pick_device(recipe.hardware.device)
    serving = {value: key for key, value in DTYPES.items() if key != "bf16-pure"}
    threads = set_threads(recipe.hardware.threads)
    if recipe.hardware.threads == "auto":
        threads = max(1, threads // processes)
    precision = pick_training_precision(recipe.train.precision, place)
    kernels = pick_kernels(place)
    device: Any = place.type
    if earlier is not None:
        assert earlier.hardware.threads != "auto" and earlier.train.precision != "auto"
        precision = earlier.train.precision
        if earlier.hardware.processes == processes:
            threads = earlier.hardware.threads
        device = earlier.hardware.device
        kernels = "liger" if earlier.train.kernels == "liger" else "torch"
    serve_precision: Any = serving[pick_serving_dtype(recipe.serve.precision, place)]
    return Facts(
        context_length=context_length,
        device=device,
        threads=threads,
        precision=precision,
        serve_precision=serve_precision,
        processes=processes,
        kernels=kernels,
    )


def check_same_recipe(run: RunFolder, earlier: Recipe, now: Recipe) -> None:
    """Raise UserError with every `key: old -> new` that would make another run of it."""
    old, new = flat(earlier.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    if earlier.hardware.processes != now.hardware.processes:
        old["hardware.threads"] = new["hardware.threads"]
    changed = [
        f"  {key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key)
    ]
    if changed:
        raise UserError(
            f"{run.path}: this run was begun with another recipe:\n" + "\n".join(changed),
            hint="undo the change to go on with it; --fresh moves it aside and starts anew; or take another "
            "name: --set name=NAME",
        )


def other_ranks(earlier: Recipe | None, now: Recipe) -> list[str]:
    """A warning when the run goes on with another engine or number of processes."""
    if earlier is None:
        return []
    was, is_now = (f"{r.parallel.engine} with {r.hardware.processes} a machine" for r in (earlier, now))
    if was == is_now:
        return []
    return [
        f"the processes were {was} and are {is_now}: the rows of every step are the same, the losses within "
        "about 1e-5 in fp32"
    ]


def idle_ranks(recipe: Recipe, ranks: Ranks) -> list[str]:
    """A warning when a step has fewer micro-batches than there are processes."""
    count = recipe.train.grad_accumulation
    if count >= ranks.size:
        return []
    return [
        f"{ranks.size - count} of {ranks.size} processes have nothing to do: a step has "
        f"{count} micro-batches; set train.grad_accumulation to a multiple of {ranks.size}, and "
        "train.micro_batch_size to less for steps of the same size"
    ]


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested mappings and lists as {"section.key": value}."""
    if isinstance(value, dict) and value:
        pairs = [(f"{place}.{key}" if place else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{place}.{number}", item) for number, item in enumerate(value)]
    else:
        return {place: value}
    return {key: item for name, part in pairs for key, item in flat(part, name).items()}


def _is_free(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in FREE)


def data_hashes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """{"sources.0/rows.jsonl": {"bytes", "sha256"}} of every data file."""
    sections = {"sources": recipe.data.sources, "eval_sources": recipe.data.eval_sources}
    return {
        f"{section}.{number}/{file.name}": {"bytes": file.num_bytes, "sha256": file.digest()}
        for section, sources in sections.items()
        for number, source in enumerate(sources)
        for file in open_source(source, f"data.{section}.{number}")
    }


def check_same_inputs(run: RunFolder, files: ModelFiles, recipe: Recipe) -> None:
    """Raise UserError when a file of the model or the data is not as the run's lock has it."""
    lock = read_lock(run.lock)
    faults = [f"model: {fault}" for fault in verify_model(lock, files)]
    faults += [f"data: {fault}" for fault in differences(lock["data"], data_hashes(recipe))]
    if faults:
        raise UserError(
            f"{run.path}: model or data changed since this run began:\n  " + "\n  ".join(faults[:10]),
            hint="bring the old files back to go on with it, or start anew with --fresh",
        )
    was, now = lock.get("versions", {}), versions()
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            say(f"warning: {name} was {was.get(name)} and is {now.get(name)}: the losses may differ slightly")


def finished_result(run: RunFolder) -> dict[str, Any] | None:
    """The result of a run whose last event says that it is finished, else None."""
    last: dict[str, Any] = {}
    for event in read_events(run.events):
        last = event
    if last.get("event") != "end" or last.get("status") != "finished" or not run.lock.is_file():
        return None
    return {key: value for key, value in last.items() if key not in ("time", "event", "status", "step")}
