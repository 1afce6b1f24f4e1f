"""The weights of a transformers model, as `serving` counts them.

Apart from it because this needs torch, and what serves by another program does not load it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.model.shape import meta_model
from tunesmith.plan.serving import Kind, Weight


def model_weights(config: Any) -> list[Weight]:
    """The weights of the causal language model of a transformers configuration."""
    return weights_of(meta_model(config, torch.bfloat16))


def weights_of(model: nn.Module) -> list[Weight]:
    """The weights of a transformers model, which may be on torch's meta device, in its own order."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    found = []
    for module_name, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            tied = module is head and value is embedding.weight
            kind = _kind(module, name, tuple(value.shape), is_head=module is head)
            found.append(Weight(f"{module_name}.{name}", tuple(value.shape), kind, tied))
    return found


def _kind(module: nn.Module, name: str, shape: tuple[int, ...], *, is_head: bool) -> Kind:
    if len(shape) >= 3:
        return "experts"
    if name != "weight" or len(shape) < 2:
        return "other"
    if is_head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear"
