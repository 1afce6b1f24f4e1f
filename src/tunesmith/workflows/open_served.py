"""Open a model to answer with: its adapter checked and folded in, its logits checked."""

from __future__ import annotations

from typing import Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.hub.sources import resolve_model
from tunesmith.model.adapters import merge_adapter
from tunesmith.model.fast_linear import use_blocks
from tunesmith.model.generate import check_logits
from tunesmith.model.hardware import pick_device, pick_serving_dtype, set_threads
from tunesmith.workflows.open_model import OpenModel, load_files, with_given_adapter
from tunesmith.workflows.run_facts import recipe_of

CHECK_TOKENS = 16


def open_served(
    path: str,
    *,
    adapter: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | Literal["auto"] = "auto",
) -> OpenModel:
    """The model with its adapter merged in float32, after a check that the adapter does something."""
    where = pick_device(device)
    set_threads(threads)
    dtype = pick_serving_dtype(precision, where)
    files = resolve_model(path)
    if adapter is not None:
        files = with_given_adapter(files, adapter)
    tuned = files.adapter is not None or bool(files.base_adapters)
    recipe = recipe_of(path)
    opened = load_files(
        files,
        dtype=torch.float32 if tuned else dtype,
        device=where,
        trust_remote_code=recipe is not None and recipe.model.trust_remote_code,
    )
    model = opened.model
    if files.adapter is not None:
        check_adapter(opened)
        model = merge_adapter(model)
    # Merged in float32 and only then rounded: an adapter's small changes would drown in bf16 sums.
    model = model.to(dtype)
    use_blocks(model)
    check_logits(model, warm_up_prompt(opened))
    return OpenModel(model, opened.tokenizer, opened.name, files, files.adapter, opened.context_length)


def check_adapter(opened: OpenModel) -> None:
    """Raise UserError when the adapter leaves every logit as it was."""
    ids = torch.tensor([warm_up_prompt(opened)], device=next(opened.model.parameters()).device)
    with torch.inference_mode():
        tuned = opened.model(input_ids=ids, use_cache=False).logits
        with opened.model.disable_adapter():
            base = opened.model(input_ids=ids, use_cache=False).logits
    if torch.equal(tuned, base):
        raise UserError(
            f"{opened.adapter}: the adapter changes nothing: its logits are those of the base model",
            hint="train it for at least one step, or serve the base model itself",
        )


def warm_up_prompt(opened: OpenModel) -> list[int]:
    """A few tokens that every tokenizer has."""
    ids: list[int] = opened.tokenizer("The quick brown fox jumps over the lazy dog.").input_ids
    return ids[:CHECK_TOKENS] or [0]
