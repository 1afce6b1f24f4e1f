"""Sharded weights and states to and from the files of one process.

Rank 0 gathers tensor after tensor into host memory and writes the files of `train.states`; every rank reads
from them the part that is its own. So a checkpoint loads with any engine and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tunesmith.core.errors import RunFailed
from tunesmith.train import faults, states


class LocalShards:
    """The shards of this process as plain parameters, which share their memory with the sharded ones.

    parameters: name: the sharded parameter; local: name: its part here, empty where it has none.
    """

    def __init__(self, parameters: Mapping[str, DTensor]) -> None:
        self.parameters = dict(parameters)
        self.local = {
            name: nn.Parameter(p._local_tensor.detach(), requires_grad=p.requires_grad)
            for name, p in self.parameters.items()
        }
        self.module: Any = _Named(self.local)

    def take_gradients(self) -> list[Tensor]:
        """Hand every gradient's local part to the plain parameter, and return them."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            self.local[name].grad = grad.to_local() if isinstance(grad, DTensor) else None
        return [p.grad for p in self.local.values() if p.grad is not None]

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters.values(), *self.local.values()):
            parameter.grad = None

    def whole(self, name: str, local: Tensor) -> Tensor:
        """The whole of a tensor that is sharded like parameter `name`. All ranks call it."""
        like = self.parameters[name]
        placed = DTensor.from_local(
            local.to(like.device_mesh.device_type),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return placed.full_tensor()

    def own_part(self, name: str) -> tuple[slice, ...]:
        """Where in the whole tensor this process's part lies."""
        like = self.parameters[name]
        shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        return tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))


@dataclass(frozen=True)
class _Named:
    """What an optimizer and a checkpoint need of a module: its parameters by name."""

    members: Mapping[str, nn.Parameter]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.members.items()


@dataclass(frozen=True)
class _Moments:
    """What a checkpoint needs of an optimizer."""

    state: dict[nn.Parameter, dict[str, Tensor]]


class HostCopies:
    """Whole tensors in rank 0's host memory; elsewhere, and where that has no more room, empty ones."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.lacking = folder, ""

    def take(self, whole: Tensor) -> Tensor:
        if self.folder is not None and not self.lacking:
            copy = faults.attempt(partial(whole.detach().to, "cpu", copy=True))
            if not isinstance(copy, faults.NoMemory):
                return copy
            self.lacking = copy.reason
        return whole.new_empty(0)


@contextmanager
def gathering(folder: Path | None) -> Iterator[HostCopies]:
    """While all ranks gather tensors, to the end whatever becomes of the files; only rank 0 has a folder.

    Raises MemoryError at that end where rank 0 could not keep all; RunFailed where a rank has no memory to
    take part, for which the others would wait.
    """
    copies = HostCopies(folder)
    try:
        yield copies
    except (RuntimeError, MemoryError) as error:
        if not faults.is_out_of_memory(error) or dist.get_world_size() == 1:
            raise
        raise RunFailed(
            f"memory ran out while the weights were gathered for a checkpoint: {error}",
            hint="free memory on this machine; the same command goes on from the last checkpoint",
        ) from None
    if copies.lacking:
        raise MemoryError(copies.lacking)


def gather(shards: LocalShards, model: Any, optimizer: torch.optim.Optimizer, folder: Path | None) -> None:
    """Gather and, in rank 0, write. Raises as `gathering`."""
    adapted = hasattr(model, "peft_config")
    wanted = {n: p for n, p in shards.local.items() if p.requires_grad or not adapted}
    with gathering(folder) as copies:
        weights = {name: copies.take(shards.whole(name, p.detach())) for name, p in wanted.items()}
        moments = {
            name: {
                key: _moment(shards, name, value, copies)
                for key, value in optimizer.state[p].items()
                if key != "master"  # what an offloading optimizer calls the weight itself
            }
            for name, p in shards.local.items()
            if p.requires_grad
        }
    if folder is not None:
        write_files(folder, model, shards.parameters, weights, moments)


def _moment(shards: LocalShards, name: str, value: Tensor, copies: HostCopies) -> Tensor:
    if value.shape != shards.local[name].shape or value.dim() == 0:
        return value  # a count of steps, the same in every rank
    return copies.take(shards.whole(name, value))


def state_bytes(shards: LocalShards, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gathered state of all weights."""
    return sum(
        shards.parameters[name].numel() * value.element_size() if value.dim() else states.tensor_bytes(value)
        for name, p in shards.local.items()
        for key, value in optimizer.state.get(p, {}).items()
        if key != "master"
    )


def write_files(
    folder: Path,
    model: Any,
    parameters: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, dict[str, Tensor]],
) -> None:
    """The files of one process. parameters: the model's own; weights: what they hold, whole; moments: of
    the trained ones; all by name."""
    by_name = {name: nn.Parameter(tensor) for name, tensor in weights.items()}
    with swapped(model, {parameters[name]: p for name, p in by_name.items()}):
        states.write_weights(model, folder)
    named: Any = _Named(by_name)
    filled: Any = _Moments({by_name[name]: values for name, values in moments.items()})
    states.write_optimizer(folder, named, filled)


def read_states(folder: Path, shards: LocalShards, optimizer: torch.optim.Optimizer) -> None:
    """This process's part of the optimizer's state, copied into what the optimizer holds."""
    with safe_open(folder / states.OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            held = optimizer.state[shards.local[name]][kind]
            part = file.get_slice(key)
            if held.dim() == 0:
                held.copy_(file.get_tensor(key))
            elif held.numel():
                held.copy_(part[shards.own_part(name)])


@contextmanager
def swapped(model: nn.Module, others: Mapping[Any, nn.Parameter]) -> Iterator[None]:
    """The model with other parameters in the places of its own, for what only reads them."""
    kind = type(model)
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in others
    ]
    plain = next((base for base in kind.__mro__[1:] if base.__name__ == kind.__name__[4:]), None)
    try:
        for module, name, parameter in places:
            module._parameters[name] = others[parameter]
        if kind.__name__.startswith("FSDP") and plain is not None:
            model.__class__ = plain  # its name goes into config.json
        yield
    finally:
        model.__class__ = kind
        for module, name, parameter in places:
            module._parameters[name] = parameter
