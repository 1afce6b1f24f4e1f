"""How a quantised model compares with the one it was made of: loss, logits and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from tunesmith.core.errors import RunFailed
from tunesmith.export.probes import probe_logits, relative_difference
from tunesmith.export.silent import silent
from tunesmith.model.quiet import quiet

ANSWER_TOKENS = 32
# A rise of the loss, in nats a token, that is a broken model and not rounding.
MAX_RISE = 0.5

# (token ids, labels with -100 where nothing is learnt) of one row
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Behaviour:
    """loss: mean over the supervised tokens of the rows, in nats; None without rows."""

    loss: float | None
    logits: list[Tensor]
    answers: list[list[int]]


def behaviour(
    model: Any, rows: Sequence[Row], prompts: Sequence[list[int]], stop_ids: Sequence[int]
) -> Behaviour:
    loss = mean_loss(model, rows) if rows else None
    answers = [_greedy(model, prompt, stop_ids) for prompt in prompts]
    return Behaviour(loss, probe_logits(model, prompts), answers)


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[Row]) -> float:
    """Mean negative log likelihood of the supervised tokens of `rows`, in nats."""
    total, count = 0.0, 0
    for ids, labels in rows:
        logits_LV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        targets_L = torch.tensor(labels[1:])
        total += float(F.cross_entropy(logits_LV, targets_L, reduction="sum"))
        count += int((targets_L != -100).sum())
    return total / count


@torch.inference_mode()
def _greedy(model: Any, prompt: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    ids_1L = torch.tensor([list(prompt)])
    how = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )
    found = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=how)
    return [int(token) for token in found[0, len(prompt) :]]


def load_quantised(folder: Path) -> Any:
    """The model in `folder`, as transformers and compressed-tensors load it, in evaluation mode, in fp32."""
    with silent(), quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()
        model(input_ids=torch.tensor([[0]]), use_cache=False)  # unpacks the weights, with a bar for each
    return model


def compared(before: Behaviour, after: Behaviour, rows: int) -> dict[str, float | int | str]:
    """The figures of a card. Raises RunFailed for a model that lost what it had learnt."""
    difference = relative_difference(before.logits, after.logits)
    rise = None if before.loss is None or after.loss is None else after.loss - before.loss
    if difference == float("inf") or (rise is not None and not rise <= MAX_RISE):
        told = "its logits are not finite" if rise is None or rise != rise else f"the loss rose by {rise:.3g}"
        raise RunFailed(
            f"the export was refused: {told} nats a token on held-out rows; rounding explains {MAX_RISE:g}",
            hint="take --to merged, or --to gguf --quant q8_0",
        )
    same = sum(a == b for a, b in zip(before.answers, after.answers, strict=True))
    figures: dict[str, float | int | str] = {}
    if before.loss is not None and after.loss is not None:
        figures = {"rows": rows, "loss_before": before.loss, "loss_after": after.loss}
    return figures | {
        "logits_differ_by": difference,
        "greedy_answers_equal": f"{same} of {len(before.answers)}",
        "first_greedy_token_equal": f"{_first(before, after)} of {len(before.answers)}",
    }


def _first(before: Behaviour, after: Behaviour) -> int:
    return sum(a[:1] == b[:1] for a, b in zip(before.answers, after.answers, strict=True))
