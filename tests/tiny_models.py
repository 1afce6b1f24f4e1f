"""Small random models of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def make(family: str = "llama", *, wide: bool = True, seed: int = 0, **more: Any) -> PreTrainedModel:
    """The same weights for the same arguments; `more` is laid over SIZES.

    wide: of the usual initialisation a model is so flat that any two logits nearly tie, and greedy answers
    would hang on rounding; wide weights prevent it.
    """
    config, model, extra = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config(**(SIZES | extra | more)))
        for parameter in made.parameters():
            if wide and parameter.ndim == 2:
                parameter.data.normal_(0, 0.15)
    return made.eval()


def keep_tokens(folder: Path, count: int) -> None:
    """Leave a byte-level tokenizer the first tokens of its vocabulary: special ones, bytes, and first merges."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    model = content["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < count}
    merges = [pair for pair in model["merges"] if "".join(pair) in kept and kept.keys() >= set(pair)]
    content["model"] = model | {"vocab": kept, "merges": merges}
    file.write_text(json.dumps(content))


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these many random tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
