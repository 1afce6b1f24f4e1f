"""Checkpoints: everything that a run needs to go on exactly, never half, never a pickle.

    step-000500/
      weights and optimizer state   as in `train.states`
      state.json      counters and the loss scale
      manifest.json   written last: size and hash of every file

No random state is kept: the loop seeds every micro-batch from (seed, step, micro-batch).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from tunesmith.core.errors import RunFailed
from tunesmith.core.events import DISK_FULL
from tunesmith.core.paths import free_bytes, new_folder, write_json
from tunesmith.core.run_folder import (
    MANIFEST,
    STATE,
    RunFolder,
    manifest_holds,
    write_manifest,
)
from tunesmith.core.units import bytes_text
from tunesmith.model.weights import read_json_file
from tunesmith.train import faults
from tunesmith.train.engine import Engine
from tunesmith.train.precision import LossScale

SMALL_FILES_BYTES = 4 * 1024**2


@dataclass
class State:
    """Where a run stands after `step` optimizer steps. step_s: seconds in the steps alone; train_s: also in
    evaluations, samples and saves. loss: of the last step. max_tokens: micro-batches of more are cut, since
    memory ran out; recent: the losses of the last steps, which tell what a spike is."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    step_s: float = 0.0
    train_s: float = 0.0
    loss: float | None = None
    max_tokens: int | None = None
    recent: list[float] = field(default_factory=list)
    scale: LossScale = field(default_factory=LossScale)


class SaveFailed(RunFailed):
    """A checkpoint could not be written; the earlier ones are untouched. Every process raises it."""


class NoMemoryToSave(SaveFailed):
    """Memory, not the disk, was too small for it."""


def save(run: RunFolder, state: State, engine: Engine, *, keep: int) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep`.

    Where the disk is full, the checkpoint that would have been removed afterwards goes first. Every process
    calls it; rank 0 writes. Raises SaveFailed.
    """
    try:
        target = write(run, state, engine)
    except SaveFailed as error:
        if keep == 1 or isinstance(error, NoMemoryToSave):
            raise
        _prune(run, keep - 1, engine)
        target = write(run, state, engine)
    _prune(run, keep, engine)
    return target


def write(run: RunFolder, state: State, engine: Engine) -> Path:
    """Write the checkpoint of `state.step`; it gets its name when it is complete and on the disk.

    Raises SaveFailed, in every process.
    """
    target, leads = run.checkpoint(state.step), engine.rank == 0
    if _agreed(engine, leads and manifest_holds(target)):  # the one that the run was resumed from
        return target
    fault = _no_room(run, engine) if leads else None
    if not _agreed(engine, fault is not None):
        fill = partial(_fill, target, state, engine) if leads else partial(engine.write, None)
        try:
            found = faults.attempt(fill)
            fault = _no_memory(target, found.reason) if isinstance(found, faults.NoMemory) else None
        except (OSError, SafetensorError) as error:
            fault = _save_failed(target, error)
        if not _agreed(engine, fault is not None):
            return target
    kind = NoMemoryToSave if _agreed(engine, isinstance(fault, NoMemoryToSave)) else SaveFailed
    raise fault or kind(f"{target}: rank 0 could not write the checkpoint")


def _agreed(engine: Engine, here: bool) -> bool:
    """Whether it is so in any process."""
    return engine.sum([float(here)])[0] > 0


def _fill(target: Path, state: State, engine: Engine) -> None:
    gathered = False
    try:
        _unseal(target)
        with new_folder(target) as folder:
            gathered = True
            engine.write(folder)
            write_json(folder / STATE, asdict(state))
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            write_manifest(folder, step=state.step, kind=_kind(engine.model))
    except (OSError, MemoryError):
        if not gathered and engine.num_ranks > 1:
            engine.write(None)  # the others gather, and wait for this one
        raise


def _no_room(run: RunFolder, engine: Engine) -> SaveFailed | None:
    """Why the next checkpoint would not fit on the disk."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    # Before the first step there is no optimizer state: that checkpoint says nothing about the next.
    like = [path for path in run.saved_checkpoints() if path != run.checkpoint(0)]
    need = folder_bytes(like[-1]) if like else engine.num_bytes() + SMALL_FILES_BYTES
    free = free_bytes(run.checkpoints)
    if free >= need:
        return None
    return SaveFailed(
        f"{run.checkpoints}: a checkpoint needs {bytes_text(need)} of disk, {bytes_text(free)} are free",
        hint=_disk_hint(run.checkpoints),
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def restore(folder: Path, engine: Engine) -> State:
    """Put an unharmed checkpoint's weights and moments into the engine.

    The weights of a full fine-tune are the model itself: load it from `folder / "model"`.
    """
    engine.read(folder)
    raw = read_json_file(folder / STATE)
    return State(**(raw | {"scale": LossScale(**raw["scale"])}))


def _prune(run: RunFolder, keep: int, engine: Engine) -> None:
    if engine.rank == 0:
        prune(run, keep)


def prune(run: RunFolder, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints."""
    for path in run.saved_checkpoints()[:-keep]:
        _unseal(path)
        shutil.rmtree(path)


def clear_leftovers(run: RunFolder) -> None:
    """Remove what killed saves, removals and writes left: half-written folders and files, and checkpoints
    without a manifest.

    Only for the holder of the run's lock.
    """
    for path in [*run.checkpoints.glob(".*.partial-*"), *run.checkpoints.glob("step-*")]:
        if path.name.startswith(".") or not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
    for written in (run.recipe, run.resolved, run.lock, run.plan, run.report):
        for half in run.path.glob(f".{written.name}.*"):
            half.unlink()


def _unseal(folder: Path) -> None:
    """Without its manifest a folder is no checkpoint: so a removal cut short leaves none that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)


def _kind(model: Any) -> str:
    return "lora" if isinstance(model, PeftModel) else "full"


def _no_memory(target: Path, reason: str) -> NoMemoryToSave:
    return NoMemoryToSave(
        f"{target}: memory ran out while the checkpoint was written: {reason}; the earlier ones are "
        "untouched",
        hint="free memory on this machine, then give the same command again: the run goes on from its last "
        "checkpoint",
    )


def _save_failed(target: Path, error: Exception) -> SaveFailed:
    # safetensors gives the number in its text only.
    full = any(getattr(error, "errno", None) == n or f"os error {n})" in str(error) for n in DISK_FULL)
    return SaveFailed(
        f"{target}: the checkpoint could not be written: {error}; the earlier ones are untouched",
        hint=_disk_hint(target.parent)
        if full
        else f"check {target.parent}, then give the same command again",
    )


def _disk_hint(folder: Path) -> str:
    return (
        f"free space on the disk of {folder}, then give the same command again: the run goes on from its "
        "last checkpoint; fewer are kept with --set train.keep_checkpoints=1"
    )
