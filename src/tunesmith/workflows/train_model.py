"""The model that a recipe trains: base or checkpoint, adapters, number formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.hub.model_files import ModelFiles
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.freeze import freeze
from tunesmith.model.load import load_model
from tunesmith.model.new_tokens import start_rows, token_ids
from tunesmith.model.noise import EmbeddingNoise
from tunesmith.model.quant import quantize
from tunesmith.recipe.schema import Recipe
from tunesmith.train.activations import checkpoint_layers
from tunesmith.train.precision import base_dtype, cast_trained
from tunesmith.workflows.open_model import load_weights

ALIGNMENT = 64


def make_model(recipe: Recipe, files: ModelFiles, tokenizer: Any, found: Path | None) -> Any:
    """The model to train: of a full fine-tune's checkpoint if there is one, else the base; adapters fresh.

    tokenizer: with the recipe's new tokens in it. Raises UserError for layers or tokens of the recipe that
    the model cannot have; MissingExtra.
    """
    assert recipe.data.max_length != "auto" and recipe.train.precision != "auto"
    if recipe.method.type == "full":
        model = _whole(recipe, files, tokenizer, found)
    else:
        model = _adapted(recipe, files, tokenizer)
    finish(model, recipe)
    _align(model)
    return model


def finish(model: Any, recipe: Recipe) -> None:
    """Freeze, cast and checkpoint a model, adapters attached, as the resolved recipe says."""
    method, checkpointing = recipe.method, recipe.train.gradient_checkpointing
    if method.type == "full":
        freeze(model, method.freeze)
    if method.neftune_alpha:
        EmbeddingNoise(method.neftune_alpha).install(model)
    assert recipe.train.precision != "auto"
    cast_trained(model, recipe.train.precision)
    assert checkpointing != "auto" and not isinstance(checkpointing, bool)
    checkpoint_layers(model, checkpointing)


def _whole(recipe: Recipe, files: ModelFiles, tokenizer: Any, found: Path | None) -> Any:
    if found is None:
        return _base(recipe, files, tokenizer, device=recipe.hardware.device)[0]
    assert recipe.train.precision != "auto"
    model = load_model(
        found / "model",
        dtype=base_dtype(recipe.train.precision, full=True),
        device=recipe.hardware.device,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    _install_attention(model, recipe)
    return model


def _adapted(recipe: Recipe, files: ModelFiles, tokenizer: Any) -> Any:
    """The base, in four bits for qlora, with fresh adapters."""
    method = recipe.method
    assert recipe.train.precision != "auto"
    quantised = method.type == "qlora"
    model, ids = _base(recipe, files, tokenizer, device="cpu" if quantised else recipe.hardware.device)
    if quantised:
        quantize(
            model,
            device=recipe.hardware.device,
            compute_dtype=base_dtype(recipe.train.precision, full=False),
            double_quant=method.double_quant,
            keep=method.modules_to_save,
        )
    return adapted(model, recipe, ids)


def adapted(model: Any, recipe: Recipe, new_token_ids: list[int]) -> Any:
    """`model` with the recipe's fresh adapters."""
    method = recipe.method
    assert method.alpha != "auto"
    return attach_lora(
        model,
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        targets=method.targets,
        rslora=method.rslora,
        dora=method.dora,
        modules_to_save=method.modules_to_save,
        new_token_ids=new_token_ids,
        seed=recipe.train.seed,
    )


def _base(recipe: Recipe, files: ModelFiles, tokenizer: Any, *, device: str) -> tuple[Any, list[int]]:
    """The base model on `device`, with rows for the recipe's new tokens, and their numbers."""
    assert recipe.train.precision != "auto"
    model = load_weights(
        files,
        dtype=base_dtype(recipe.train.precision, full=recipe.method.type == "full"),
        device=device,
        merge=True,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    ids = token_ids(tokenizer, recipe.model.new_tokens)
    start_rows(model, ids)
    _install_attention(model, recipe)
    return model, ids


def _install_attention(model: Any, recipe: Recipe) -> None:
    assert recipe.data.max_length != "auto"
    attention.install(model, max_length=recipe.data.max_length)


def _align(model: torch.nn.Module) -> None:
    """Weights that lie mapped in a file may be aligned otherwise than those of the resumed run, and a matrix
    product can then differ in its last bit."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
