"""Checkpoints: everything that a run needs to go on exactly, never half, never a pickle.

    step-000500/
      adapter/ (peft's files) or model/ (a transformers folder)   trained weights as they are, fp32 or bf16
      optimizer.safetensors   AdamW's moments: "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"
      state.json              counters and the loss scale
      manifest.json           written last: size and hash of every file

No random state is kept: the loop seeds every micro-batch from (seed, step, micro-batch).
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.core.errors import RunFailed
from tunesmith.core.paths import free_bytes, new_folder, write_json
from tunesmith.core.run_folder import MANIFEST, RunFolder, manifest_holds, read_manifest, write_manifest
from tunesmith.core.units import bytes_text
from tunesmith.model.adapters import save_adapter
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import ADAPTER_WEIGHTS, read_json_file
from tunesmith.train.precision import LossScale

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMALL_FILES_BYTES = 4 * 1024**2


@dataclass
class State:
    """Where a run stands after `step` optimizer steps. step_s: seconds in the steps alone; train_s: also in
    evaluations, samples and saves. loss: of the last step."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    step_s: float = 0.0
    train_s: float = 0.0
    loss: float | None = None
    scale: LossScale = field(default_factory=LossScale)


def save(run: RunFolder, state: State, model: Any, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint of `state.step`; it gets its name when it is complete and on the disk.

    Raises RunFailed when the disk is full; earlier checkpoints are untouched then.
    """
    target = run.checkpoint(state.step)
    if manifest_holds(target):  # the checkpoint that the run was resumed from
        return target
    check_disk(run, model)
    _unseal(target)
    try:
        with new_folder(target) as folder:
            _write_weights(model, folder)
            save_file(_optimizer_tensors(model, optimizer), folder / OPTIMIZER)
            write_json(folder / STATE, asdict(state))
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            write_manifest(folder, step=state.step, kind=_kind(model))
    except (OSError, SafetensorError) as error:
        raise _save_failed(target, error) from error
    return target


def check_disk(run: RunFolder, model: nn.Module) -> None:
    """Raise RunFailed when the next checkpoint would not fit."""
    need = checkpoint_bytes(model)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    free = free_bytes(run.checkpoints)
    if free < need:
        raise RunFailed(
            f"{run.checkpoints}: a checkpoint needs {bytes_text(need)} of disk, {bytes_text(free)} are free",
            hint=_disk_hint(run.checkpoints),
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: the stored weights and two moments of each trained one."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if isinstance(model, PeftModel):
        return 3 * trained + SMALL_FILES_BYTES
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return frozen + 3 * trained + SMALL_FILES_BYTES


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Put an unharmed checkpoint's adapter and moments into `model` and `optimizer`.

    The weights of a full fine-tune are the model itself: load it from `folder / "model"`.
    """
    if isinstance(model, PeftModel):
        restore_adapter(folder, model)
    _load_optimizer(load_file(folder / OPTIMIZER), model, optimizer)
    raw = read_json_file(folder / STATE)
    return State(**(raw | {"scale": LossScale(**raw["scale"])}))


def restore_adapter(folder: Path, model: PeftModel) -> None:
    tensors = load_file(folder / "adapter" / ADAPTER_WEIGHTS)
    try:
        left = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:  # a tensor of another shape
        raise RunFailed(f"{folder}: its adapter is of another model: {error}") from None
    missing = [name for name in left.missing_keys if "lora_" in name]
    if missing or left.unexpected_keys:
        raise RunFailed(f"{folder}: its adapter is of another model: {(missing + left.unexpected_keys)[0]}")


def prune(run: RunFolder, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints."""
    found = [path for path in run.checkpoints.glob("step-*") if read_manifest(path) is not None]
    for path in sorted(found, key=lambda p: (len(p.name), p.name))[:-keep]:
        _unseal(path)
        shutil.rmtree(path)


def clear_leftovers(run: RunFolder) -> None:
    """Remove what killed saves and removals left: half-written folders, and folders without a manifest.

    Only for the holder of the run's lock.
    """
    for path in [*run.checkpoints.glob(".*.partial-*"), *run.checkpoints.glob("step-*")]:
        if path.name.startswith(".") or not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


def _unseal(folder: Path) -> None:
    """Without its manifest a folder is no checkpoint: so a removal cut short leaves none that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)


def _kind(model: Any) -> str:
    return "lora" if isinstance(model, PeftModel) else "full"


def _write_weights(model: Any, folder: Path) -> None:
    if isinstance(model, PeftModel):
        save_adapter(model, folder / "adapter")
        return
    with quiet():
        model.save_pretrained(folder / "model")


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _names(model)
    return {
        f"{key}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    owners = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        # A copy of its own: memory mapped from a file is aligned differently, which can change the last bit.
        optimizer.state[owners[name]][kind] = value.to(owners[name].device, copy=True)


def _save_failed(target: Path, error: Exception) -> RunFailed:
    # safetensors gives the number in its text only.
    full = any(getattr(error, "errno", None) == n or f"os error {n})" in str(error) for n in DISK_FULL)
    return RunFailed(
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
