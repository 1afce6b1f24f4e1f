"""The plan of a run: exact work, disk, and a refusal with the remedy where it cannot work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import PlanRefused
from tunesmith.core.units import bytes_text
from tunesmith.model.hardware import DTYPES
from tunesmith.plan.disk import DiskPlan, checkpoint_bytes, plan_disk, state_bytes
from tunesmith.plan.work import WorkPlan, matmul_flops, seconds_for
from tunesmith.recipe.schema import Recipe
from tunesmith.train.states import weights_bytes

# Share of a training step that its matrix products take; the rest is attention, norms and the optimizer.
# Measured on two CPU cores: docs/log.md, 2026-11-22.
MATMUL_SHARE = 0.6
PROBE_S = 0.15


@dataclass(frozen=True)
class RunPlan:
    work: WorkPlan
    disk: DiskPlan

    def as_dict(self) -> dict[str, Any]:
        return {"work": self.work.as_dict(), "disk": self.disk.as_dict()}


def plan_run(
    recipe: Recipe,
    model: nn.Module,
    *,
    steps: int,
    tokens: int,
    supervised: int,
    run: Path,
    present_bytes: int = 0,
) -> RunPlan:
    """Plan the training of `model` (adapters attached, gradients switched on where trained).

    recipe: fully resolved; tokens, supervised: of the whole run; present_bytes: what an earlier part of the
    same run has already written. Raises PlanRefused when the disk does not suffice.
    """
    plan = RunPlan(
        _work(recipe, model, steps, tokens, supervised), _disk(recipe, model, steps, run, present_bytes)
    )
    if not plan.disk.fits:
        raise PlanRefused(
            f"{run}: the run needs {bytes_text(plan.disk.needed_bytes)} of disk and "
            f"{bytes_text(plan.disk.free_bytes)} are free",
            hint="free space, set output_dir to another disk, or lower train.keep_checkpoints "
            f"(each checkpoint takes {bytes_text(plan.disk.checkpoint_bytes)})",
        )
    return plan


def _work(recipe: Recipe, model: nn.Module, steps: int, tokens: int, supervised: int) -> WorkPlan:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    full = recipe.method.type == "full"
    body, trained_body, head = _matrices(model, full=full)
    flops = matmul_flops(
        tokens=tokens,
        supervised=supervised,
        body=body,
        head=head,
        trained_body=trained_body,
        full=full,
        recompute=recipe.train.gradient_checkpointing == "full",
    )
    device = next(model.parameters()).device
    assert recipe.train.precision != "auto"
    rate = matmul_rate(DTYPES[recipe.train.precision], device) * MATMUL_SHARE
    return WorkPlan(
        steps=steps,
        tokens=tokens,
        supervised_tokens=supervised,
        trained_parameters=trained,
        total_parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        seconds=seconds_for(flops, rate),
    )


def _matrices(model: nn.Module, *, full: bool) -> tuple[int, int, int]:
    """Weights in the layers' matrices, those (or the adapters') that are trained, and the head's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    trained = sum(m.weight.numel() for m in linears if m.weight.requires_grad)
    frozen = sum(m.weight.numel() for m in linears if not m.weight.requires_grad)
    return (trained if full else frozen), trained, head.weight.numel()


def _disk(recipe: Recipe, model: nn.Module, steps: int, run: Path, present_bytes: int) -> DiskPlan:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.train.optimizer
    assert optimizer != "auto"
    states = sum(p.numel() * state_bytes(optimizer, p.element_size(), count=p.numel()) for p in trained)
    checkpoint = checkpoint_bytes(weights_bytes(model), states)
    assert recipe.train.save_every != "auto"
    saves = -(-steps // recipe.train.save_every)
    return plan_disk(
        run,
        checkpoint=checkpoint,
        keep=recipe.train.keep_checkpoints,
        saves=saves,
        export=4 * sum(p.numel() for p in trained),
        present=present_bytes,
    )


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product of a layer's size, measured for a moment."""
    left, right = (
        torch.ones(512, 1024, dtype=dtype, device=device),
        torch.ones(1024, 1024, dtype=dtype, device=device),
    )
    at_once = 4 if device.type == "cuda" else 1  # fp16 on a CPU takes seconds for each
    left @ right
    _wait(device)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < PROBE_S:
        for _ in range(at_once):
            left @ right
        _wait(device)
        done += at_once
    return done * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
