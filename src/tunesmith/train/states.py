"""The tensors of a checkpoint: trained weights and the optimizer's state, as files that are no pickles.

adapter/ (peft's files) or model/ (a transformers folder)   trained weights as they are, fp32 or bf16
optimizer.safetensors   AdamW's averages: "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"; with 8 bits also
                        the blocks' scales, "exp_avg_scale/NAME"; with offload the fp32 weights, "master/NAME"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.core.errors import RunFailed
from tunesmith.model.adapters import adapter_tensors, save_adapter, set_adapter
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import ADAPTER_WEIGHTS

OPTIMIZER = "optimizer.safetensors"
# More than safetensors takes for itself while it writes.
WRITER_BYTES = 8 * 1024**2


def write_weights(model: Any, folder: Path) -> None:
    """The trained weights: an adapter, or the whole model of a full fine-tune. Raises MemoryError."""
    _check_memory()
    if isinstance(model, PeftModel):
        save_adapter(model, folder / "adapter")
        return
    with quiet():
        model.save_pretrained(folder / "model")


def weights_bytes(model: Any) -> int:
    """Bytes of the tensors that `write_weights` writes, of sharded weights in all processes together."""
    if isinstance(model, PeftModel):
        return sum(map(tensor_bytes, adapter_tensors(model).values()))
    return sum(map(tensor_bytes, model.parameters()))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that `write_optimizer` writes once every weight has been updated."""
    return sum(tensor_bytes(value) for values in optimizer.state.values() for value in values.values())


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_memory() -> None:
    """safetensors would not raise MemoryError but end the process."""
    bytearray(WRITER_BYTES)


def read_adapter(folder: Path, model: Any) -> None:
    """Put a checkpoint's adapter into `model`; nothing for a full fine-tune, which is loaded from `model/`.

    Raises RunFailed when it is of another model.
    """
    if not isinstance(model, PeftModel):
        return
    fault = set_adapter(model, load_file(folder / "adapter" / ADAPTER_WEIGHTS))
    if fault:
        raise RunFailed(f"{folder}: its adapter is of another model: {fault}")


def write_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The state of every weight that was updated at least once: that of the others is all zeros.

    Raises MemoryError.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{kind}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        if values["step"] > 0
        for kind, value in values.items()
    }
    _check_memory()
    save_file(tensors, folder / OPTIMIZER)


def read_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's state into the tensors that a fresh optimizer has allocated.

    Raises RunFailed when it is of another model or optimizer.
    """
    owners: dict[str, Tensor] = dict(model.named_parameters())
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            place = optimizer.state[owners[name]].get(kind) if name in owners else None
            value = file.get_tensor(key)
            if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
                raise RunFailed(f"{folder / OPTIMIZER}: '{key}' is of another model or optimizer")
            place.copy_(value)
