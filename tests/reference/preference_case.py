"""A small model and pairs, the same in every environment: what ours and TRL's preference losses are run on.

Needs no more than numpy, torch and transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, PAIRS, LR, BETA = 8, 4, 2e-4, 0.3
Pair = tuple[list[int], list[list[int]]]


def small_model() -> Any:
    """Two layers whose weights do not depend on how a version of transformers initialises them."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )
    draw = np.random.RandomState(0)  # whose stream never changes
    for name, parameter in sorted(model.named_parameters()):
        values = np.ones(parameter.shape) if "norm" in name else draw.standard_normal(parameter.shape) * 0.08
        parameter.data = torch.from_numpy(values.astype(np.float32))
    return model


def step_pairs(step: int) -> list[Pair]:
    """The prompts and answers of one step: the same two sets again and again."""
    draw = np.random.RandomState(step % 2 + 1)
    pairs = []
    for _ in range(PAIRS):
        prompt = draw.randint(3, 256, draw.randint(2, 20)).tolist()
        pairs.append((prompt, [draw.randint(3, 256, draw.randint(2, 30)).tolist() for _ in range(2)]))
    return pairs
