"""The linear layers that a quantised export rounds, and what the whole will come to.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.core.errors import UserError

GROUP_SIZES = (128, 64, 32)


def linears(model: Any) -> dict[str, nn.Linear]:
    """All linear layers but the head, by name: the head is a small part and the most sensitive one."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of `config` without memory for its weights, on the device "meta"."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_linears(model: Any, to: str, group_size: int | None) -> None:
    """Raise UserError for a model whose weights are not in linear layers, or whose rows no groups fill.

    group_size: weights of a row that share a scale; None for whole rows.
    """
    kind = model.config.model_type
    stacked = [name for name, p in model.named_parameters() if p.dim() > 2]
    found = linears(model)
    if stacked or not found:
        what = f"'{stacked[0]}' is no matrix" if stacked else "it has no linear layers"
        raise UserError(
            f"--to {to}: a '{kind}' model cannot be quantised so: {what}", hint="export it with --to merged"
        )
    if group_size is None:
        return
    odd = [(name, layer.in_features) for name, layer in found.items() if layer.in_features % group_size]
    if odd:
        name, width = odd[0]
        fits = [g for g in GROUP_SIZES if not any(m.in_features % g for m in found.values())]
        raise UserError(
            f"--group-size {group_size}: {len(odd)} layers have rows that it does not divide, such as "
            f"'{name}' with {width} inputs",
            hint=f"take --group-size {fits[0]}" if fits else "take --to int8, whose scales are of whole rows",
        )


def quantised_bytes(model: Any, bits: int, group_size: int | None, dtype: torch.dtype) -> int:
    """Bytes of the weights once the linear layers have `bits` a value, and everything else is `dtype`."""
    rounded = linears(model)
    values = sum(layer.weight.numel() for layer in rounded.values())
    scales = sum(
        layer.out_features * (layer.in_features // group_size if group_size else 1)
        for layer in rounded.values()
    )
    others = sum(p.numel() for p in model.parameters()) - values
    return values * bits // 8 + (others + scales) * dtype.itemsize


def ignored(model: Any) -> list[str]:
    """Names of the linear layers that stay as they are, for the config of the format."""
    kept = linears(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in kept]
