"""Open a model to answer with: its adapters beside the base or folded into it, its weights stored small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.hub.sources import resolve_model
from tunesmith.model import cpu_kernels
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import merge_adapter
from tunesmith.model.fast_linear import use_blocks
from tunesmith.model.generate import check_logits
from tunesmith.model.hardware import DTYPES, pick_device, pick_serving_dtype, set_threads
from tunesmith.model.lora_files import why_only_merged
from tunesmith.model.quant import quantize
from tunesmith.model.served_weights import pack_weights
from tunesmith.workflows.adapter_checks import (
    check_change,
    check_like_peft,
    check_same,
    check_served,
    log_probs,
    noise,
)
from tunesmith.workflows.given_adapters import adapter_beside, with_given_adapter
from tunesmith.workflows.open_model import OpenModel, load_files
from tunesmith.workflows.run_facts import recipe_of

Weights = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
PLAIN: dict[torch.dtype, Weights] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CHECK_TOKENS = 16


def open_served(
    path: str,
    *,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    name: str | None = None,
    merge: bool = False,
    weights: Weights | Literal["auto"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | Literal["auto"] = "auto",
) -> OpenModel:
    """The model with its own adapter and others on the same base, each shown to do what peft does with it.

    The adapter of `path` (or `adapter` in its place) answers as `name`, by default the model's own name, and
    the base beside it; it is merged into the base where `merge` asks for it, or where it can only be used so.
    adapters: names and folders (or runs) of more of them. weights: how they are stored; "auto" is
    `precision`. Raises UserError for whatever does not load or fit.
    """
    where = pick_device(device)
    set_threads(threads)
    stored = pick_weights(weights, precision, where)
    files = resolve_model(path)
    if adapter is not None:
        files = with_given_adapter(files, adapter)
    merge = merge or _must_merge(files.adapter)
    if merge and adapters and files.adapter is not None:
        raise UserError(
            f"{files.adapter}: other adapters cannot be loaded beside it, because it is merged into the base",
            hint="serve the base model, and give this adapter as one of several",
        )
    tuned = bool(files.base_adapters) or (merge and files.adapter is not None)
    recipe = recipe_of(path)
    opened = load_files(
        files if merge else replace(files, adapter=None),
        # Merged in float32 and only then rounded: an adapter's small changes would drown in bf16 sums.
        dtype=torch.float32 if tuned else DTYPES.get(stored, torch.bfloat16),
        device=where,
        trust_remote_code=recipe is not None and recipe.model.trust_remote_code,
    )
    opened = replace(opened, name=name or files.name, files=files, adapter=files.adapter, weights=stored)
    if merge:
        return _whole(opened, stored)
    own = {} if opened.adapter is None else {opened.name: opened.adapter}
    if taken := sorted(own.keys() & (adapters or {}).keys()):
        raise UserError(f"adapter '{taken[0]}': the model itself has this name", hint="take another name")
    others = {name: adapter_beside(given, files) for name, given in (adapters or {}).items()}
    return _with_bank(opened, stored, own | others)


def pick_weights(
    wanted: Weights | Literal["auto"],
    precision: Literal["auto", "fp32", "bf16", "fp16"],
    device: torch.device,
) -> Weights:
    """How the weights are stored. Raises UserError for what the device cannot do, or two different wishes."""
    plain = PLAIN[pick_serving_dtype(precision, device)]
    if wanted == "auto":
        return plain
    if precision != "auto" and wanted in DTYPES and wanted != precision:
        raise UserError(
            f"weights '{wanted}' and precision '{precision}' say different things", hint="give one of them"
        )
    if wanted == "int8" and device.type != "cpu":
        raise UserError("weights 'int8' are for a CPU", hint="take nf4, bf16 or fp16 on this device")
    return wanted


def _must_merge(adapter: Path | None) -> bool:
    reason = None if adapter is None else why_only_merged(adapter)
    if reason is None:
        return False
    say(f"{adapter} is merged into its base, which does not answer beside it: {reason}")
    return True


def _whole(opened: OpenModel, stored: Weights) -> OpenModel:
    """The model with its adapter, if it has one, folded in."""
    probe = warm_up_prompt(opened)
    model = opened.model if opened.adapter is None else _merged(opened, opened.adapter, probe)
    _store(model, stored)
    check_logits(model, probe)
    return replace(opened, model=model)


def _merged(opened: OpenModel, adapter: Path, probe: list[int]) -> Any:
    """Checks that the adapter does something before it is merged, and the same afterwards."""
    tuned = log_probs(opened.model, probe)
    with opened.model.disable_adapter():
        base, loudest = log_probs(opened.model, probe), noise(opened.model, probe)
    check_change(adapter, tuned, base, loudest)
    merged = merge_adapter(opened.model)
    check_same(adapter, log_probs(merged, probe), tuned, torch.float32)
    return merged


def _with_bank(opened: OpenModel, stored: Weights, folders: Mapping[str, Path]) -> OpenModel:
    """The base with a bank of these adapters, each checked before and after the weights are stored."""
    model, probe = opened.model, warm_up_prompt(opened)
    bank = AdapterBank(model)
    found = {name: bank.read(folder) for name, folder in folders.items()}
    for name, adapter in found.items():
        bank.put(name, adapter)
    check_like_peft(model, bank, folders, probe)
    bank.close()
    _store(model, stored)
    check_logits(model, probe)
    bank = AdapterBank(model)
    for name, adapter in found.items():
        bank.put(name, adapter)
    if folders:
        check_served(model, bank, folders, probe)
    return replace(opened, bank=bank, adapters=folders)


def _store(model: Any, stored: Weights) -> None:
    """Bring the weights into the form that they are served in, in place."""
    if model.device.type != "cpu" or stored == "fp16":
        if stored == "nf4":
            quantize(model, device=model.device, compute_dtype=torch.bfloat16, double_quant=True)
        else:
            model.to(DTYPES[stored])
    elif stored == "fp32" and cpu_kernels.load() is None:
        use_blocks(model.to(torch.float32))
    else:
        pack_weights(model, stored)


def warm_up_prompt(opened: OpenModel) -> list[int]:
    """A few tokens that every tokenizer has."""
    ids: list[int] = opened.tokenizer("The quick brown fox jumps over the lazy dog.").input_ids
    return ids[:CHECK_TOKENS] or [0, 0]
