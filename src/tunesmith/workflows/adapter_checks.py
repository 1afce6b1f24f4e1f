"""Proof that an adapter is there: it changes the logits, and to what peft computes with it.

Shapes: T tokens of a probe, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.errors import UserError
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import read_config, weights_file
from tunesmith.model.generator import Generator, computed_in
from tunesmith.model.quiet import quiet
from tunesmith.model.requests import SamplingParams


def log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V] fp32: the model's own forward pass."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def noise(model: Any, ids: Sequence[int]) -> float:
    """How much log-probabilities change by rounding alone: when the same prompt is computed twice at once."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)] * 2, device=device), use_cache=False).logits
    return gap(logits[0].float().log_softmax(-1), log_probs(model, ids))


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference; not finite where either is not."""
    return float((one - other).abs().max())


def check_change(folder: Path, tuned: Tensor, base: Tensor, noise: float) -> None:
    """Raise UserError unless an adapter's log-probabilities are not the base's, by more than `noise`."""
    change = gap(tuned, base)
    if change > noise:
        return
    much = "nothing" if change == 0.0 else f"no more ({change:.3g}) than rounding does ({noise:.3g})"
    raise UserError(
        f"{folder}: the adapter changes {much}: its logits are those of the base model",
        hint="train it for more steps, or serve the base model itself",
    )


def check_same(
    folder: Path, ours: Tensor, theirs: Tensor, dtype: torch.dtype, *, than: str = "peft's"
) -> None:
    """Raise UserError when log-probabilities are not those that peft computes, or whoever `than` says.

    The bound is on the largest difference in float32; in coarser formats on the mean: there a single token's
    may be anything.
    """
    coarse = dtype != torch.float32
    found, bound = (float((ours - theirs).abs().mean()), 0.1) if coarse else (gap(ours, theirs), 0.001)
    if not found <= bound:
        raise UserError(
            f"{folder}: with the adapter the logits differ from {than} by {found:.3g} (bound {bound:g})",
            hint="this adapter does something that is not supported here: please report it",
        )


def peft_log_probs(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    """What peft's own layers compute with the adapter around `model`, which is plain again afterwards."""
    config = read_config(folder)
    config.inference_mode = True
    with torch.random.fork_rng(devices=[]), quiet():
        wrapped = PeftModel(model, config).eval()
    try:
        tensors = load_file(weights_file(folder), device=str(next(model.parameters()).device))
        # Not the copies of the base's own weights, which would be written over the base.
        set_peft_model_state_dict(wrapped, {n: t for n, t in tensors.items() if ".lora_" in n})
        return log_probs(wrapped, ids)
    finally:
        wrapped.unload()


def check_like_peft(model: Any, bank: AdapterBank, folders: Mapping[str, Path], ids: Sequence[int]) -> None:
    """Raise UserError unless every adapter computes as peft does; `model` is not quantised yet."""
    for name, folder in folders.items():
        check_same(
            folder, _with_adapter(model, bank, name, ids), peft_log_probs(model, folder, ids), model.dtype
        )


def check_served(model: Any, bank: AdapterBank, folders: Mapping[str, Path], ids: Sequence[int]) -> None:
    """Raise UserError unless every adapter changes the base, and does the same in a batch with all others."""
    base, loudest = log_probs(model, ids), noise(model, ids)
    found = _generated(model, bank, list(folders), ids)
    targets, (dtype, _) = torch.tensor(ids[1:], device=base.device)[:, None], computed_in(model)
    for name, folder in folders.items():
        tuned = _with_adapter(model, bank, name, ids)
        check_change(folder, tuned, base, loudest)
        own = tuned[:-1].gather(1, targets)[:, 0].cpu()
        check_same(folder, found[name], own, dtype, than="the model's own")


def _with_adapter(model: Any, bank: AdapterBank, name: str, ids: Sequence[int]) -> Tensor:
    with bank.selected([(name, len(ids))]):
        return log_probs(model, ids)


def _generated(model: Any, bank: AdapterBank, names: list[str], ids: Sequence[int]) -> dict[str, Tensor]:
    """Of every adapter the log-probabilities [T - 1] of the probe's tokens but the first."""
    generator = Generator(model, max_length=len(ids) + 1, max_concurrent=len(names) + 1, bank=bank)
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    generator.add(ids, params)
    numbers = {generator.add(ids, params, adapter=name): name for name in names}
    found = {}
    while generator.has_work:
        for event in generator.step():
            if event.request_id in numbers and event.prompt_logprobs is not None:
                values = [entry.logprob for entry in event.prompt_logprobs]
                found[numbers[event.request_id]] = torch.tensor(values)
    return found
