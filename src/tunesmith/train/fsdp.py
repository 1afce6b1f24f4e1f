"""Weights, gradients and optimizer states in shards, one a process: torch's FSDP2 (`fully_shard`).

Each decoder layer is gathered when it is computed; what is around the layers (embeddings, head) stays whole
from the forward pass to the end of the backward pass. The optimizer works on the local shards as plain
tensors. Checkpoints are the same files as of one process: tensor after tensor is gathered into rank 0.

FSDP: Zhao et al. 2023, arXiv:2304.11277; ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from tunesmith.model.attention import unwrapped
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import gathered, states
from tunesmith.train.activations import OffloadedActivations
from tunesmith.train.engine import Share
from tunesmith.train.gathered import LocalShards
from tunesmith.train.group import sum_over
from tunesmith.train.objective import Objective
from tunesmith.train.optim import begin_step, clip_factor, make_optimizer, total_norm
from tunesmith.train.parallel import shares_of
from tunesmith.train.precision import autocast
from tunesmith.train.ranks import Ranks


class FsdpEngine:
    """FSDP2. zero_stage 3 frees a layer's weights after its forward pass, 2 keeps them for the backward
    pass. offload: `parameters` keeps shards, gradients and states in host memory and updates there;
    `optimizer` fp32 weights and states only."""

    retries = False
    lockstep = True  # the processes gather weights together: none can take a step again alone

    def __init__(self, model: Any, objective: Objective, recipe: Recipe, ranks: Ranks) -> None:
        assert recipe.train.precision != "auto"
        self.model, self.ranks, self.rank, self.num_ranks = model, ranks, ranks.rank, ranks.size
        self.precision = recipe.train.precision
        self.offload = OffloadedActivations(model) if recipe.train.activation_offload else None
        self.device = _shard(model, recipe, ranks)
        self.shards = LocalShards(_sharded(model))
        train = recipe.train
        if recipe.parallel.offload == "optimizer":
            train = train.model_copy(update={"optimizer": "adamw-offload"})
        self.optimizer = make_optimizer(self.shards.module, train, recipe.method)
        # Only what FSDP calls a forward pass gathers the weights around the layers.
        model.total_of = lambda batch: objective.total(model, batch)
        register_fsdp_forward_method(model, "total_of")

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        return shares_of(batches, self.ranks, even=True)

    def begin(self, lr: float, seed: int) -> None:
        begin_step(self.optimizer, lr, seed)

    def forward(self, batch: Batch) -> Tensor:
        saved = self.offload.context() if self.offload else nullcontext()
        with autocast(self.precision, self.device), saved:
            total: Tensor = self.model.total_of(batch)
        if not torch.is_grad_enabled():
            self._free()  # no backward pass comes that would
        return total

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients are reduced at every micro-batch: kept whole over several, they would take a whole
        # model's memory.
        loss.backward()

    def update(self, *, divide_by: float, max_norm: float | None) -> float:
        grads = self.shards.take_gradients()
        local = total_norm(grads) if grads else 0.0
        norm = math.sqrt(sum_over(self.ranks, [local**2])[0]) / divide_by
        if not math.isfinite(norm):
            return norm
        factor = clip_factor(norm, divide_by=divide_by, max_norm=max_norm)
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        self.optimizer.step()
        return norm

    def drop_gradients(self) -> None:
        self.shards.drop_gradients()

    def sum(self, values: Sequence[float]) -> list[float]:
        return sum_over(self.ranks, values)

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The layers gather themselves, one at a time; what is around them is gathered here."""
        self.model.unshard()
        try:
            yield self.model
        finally:
            self._free()

    def _free(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def num_bytes(self) -> int:
        return states.weights_bytes(self.model) + gathered.state_bytes(self.shards, self.optimizer)

    def write(self, folder: Path | None) -> None:
        gathered.gather(self.shards, self.model, self.optimizer, folder)

    def read(self, folder: Path) -> None:
        """The optimizer's state; weights were read before they were sharded."""
        gathered.read_states(folder, self.shards, self.optimizer)


def _shard(model: Any, recipe: Recipe, ranks: Ranks) -> torch.device:
    """Replace the model's weights by shards on the device that is returned."""
    kind = recipe.hardware.device
    assert kind != "auto"
    with _disable_current_modes():  # ranks are numbers, where a plan traces all else on fake tensors
        mesh = init_device_mesh(kind, (ranks.size,))
    policy = OffloadPolicy()
    if recipe.parallel.offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=kind == "cuda")
    inner = unwrapped(model)
    for layer in inner.get_decoder().layers:
        free_early = recipe.parallel.zero_stage == 3
        fully_shard(layer, mesh=mesh, reshard_after_forward=free_early, offload_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _sharded(model: nn.Module) -> dict[str, DTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
