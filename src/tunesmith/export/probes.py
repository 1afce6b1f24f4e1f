"""Do two models compute the same? Logits on a few prompts, compared in fp32.

Shapes: L tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))",
    "Write one JSON object with the name, the date and the price: Anna, 2024-03-17, 25.90 EUR.",
    "请用一句话说明什么是机器学习。",
)
MAX_TOKENS = 256
SEED = 20240229


@torch.inference_mode()
def probe_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [L, V] in fp32 on the CPU for every prompt, at most MAX_TOKENS of each."""
    device = next(model.parameters()).device
    found = []
    for prompt in prompts:
        ids_1L = torch.tensor([list(prompt[:MAX_TOKENS])], device=device)
        found.append(model(input_ids=ids_1L, use_cache=False).logits[0].float().cpu())
    return found


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest |a - b| over all prompts, tokens and entries, divided by the largest |a|.

    A value that is not finite on either side gives infinity.
    """
    if not all(bool(torch.isfinite(x).all()) for x in (*a, *b)):
        return float("inf")
    largest = max(float(x.abs().max()) for x in a)
    difference = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return difference / largest if largest > 0 else difference


@contextmanager
def rounding_noise(model: Any, names: set[str], unit_roundoff: float) -> Iterator[None]:
    """Multiply each of the parameters `names` by 1 + u·r, r uniform in [-1, 1], within the context.

    This is what one rounding to a format of unit roundoff u does at most to every weight, in random
    directions (Higham, Accuracy and Stability of Numerical Algorithms, section 2.2); seeded, so that the
    bound made from it can be repeated. torch's global random state is not touched.
    """
    generator = torch.Generator().manual_seed(SEED)
    kept = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                kept[name] = parameter.detach().clone()
                noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).mul_(unit_roundoff)
                parameter.mul_(noise.add_(1).to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
