"""What transformers itself answers: the reference of every greedy answer."""

from __future__ import annotations

from typing import Any

import torch


def greedy(model: Any, prompt: list[int], new_tokens: int, *, pad_token_id: int = 2) -> list[int]:
    """The new token ids of transformers' generate() for one prompt, without sampling."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_token_id,
        )
    return out[0, len(prompt) :].tolist()
