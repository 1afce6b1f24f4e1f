"""Tokens that a recipe adds to a vocabulary: in the embeddings and in adapters.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def start_rows(model: Any, ids: Sequence[int]) -> None:
    """Give the tokens `ids` rows in both embedding matrices: the mean of the rows before them.

    Rows that the model already has beyond its tokenizer's vocabulary are taken; it grows by what is missing.
    """
    if not ids:
        return
    grow(model, max(ids) + 1)
    others = min(ids)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in (part.weight, getattr(part, "bias", None)):
                if rows is not None:
                    rows[list(ids)] = rows[:others].float().mean(0).to(rows.dtype)


def grow(model: Any, rows: int) -> None:
    """Make the vocabulary of `model` at least `rows` long. The values of new rows mean nothing yet."""
    if rows <= model.get_input_embeddings().weight.shape[0]:
        return
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model.resize_token_embeddings(rows, mean_resizing=False)


def rows_of_adapter(config: Any, shapes: Mapping[str, tuple[int, ...]], model: Any) -> int:
    """The vocabulary that an adapter (peft's config, shapes of its tensors) needs of its base; 0: any."""
    indices = config.trainable_token_indices or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    wanted = [max(ids) + 1 for ids in lists if ids]
    ends = tuple(
        f"{name}.{end}"
        for name in embedding_names(model)
        for end in ("weight", "modules_to_save.weight", "lora_B.weight")
    )
    return max([*wanted, *(shape[0] for name, shape in shapes.items() if name.endswith(ends))], default=0)


def embedding_names(model: Any) -> tuple[str, str]:
    """Last parts of the dotted names of the input embeddings and the output head."""
    embeddings = full_name(model, model.get_input_embeddings())
    head = full_name(model, model.get_output_embeddings())
    return embeddings.rsplit(".", 1)[-1], head.rsplit(".", 1)[-1]


def full_name(model: nn.Module, part: nn.Module) -> str:
    """The dotted name of a module of `model`."""
    return next(name for name, module in model.named_modules() if module is part)


def is_tied(model: Any) -> bool:
    """True when one matrix is both embeddings and head."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
