"""What a known program or script fixes of a training by itself, whatever its rows leave out.

Each entry is read from that project's public code (docs/concepts/plan-facts.md names the files).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tunesmith.plan.facts_types import Row, low

# Runtimes with kernels, models or checkpointing of their own: nothing of transformers' step holds for them.
OTHERS = re.compile(
    r"unsloth|nemo\b|megatron|colossal|mlx|maxtext|llama\.cpp|xtuner|llm-foundry|lit-llama|gpt-neox|deepspeed-chat"
    r"|keras|jax|lightning-thunder|nanotron|picotron|nanogpt|llm\.c"
)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A script around the Hugging Face Trainer.

    words: what names it. dropout: of adapters. double_quant: its base of four bits. prepares: casts the norms
    and embeddings of a base of four bits to fp32. weights: the format that adapters' base is loaded in.
    own_loss: the model's own file makes the loss of 16-bit logits and keeps them. padded: every batch is as
    long as told. metric: what its unnamed memory figure is taken for.
    """

    words: str
    dropout: float = 0.0
    double_quant: bool = False
    prepares: bool | None = None
    weights: Literal["bf16"] | None = None
    own_loss: bool = False
    padded: bool = False
    metric: Literal["process"] | None = None


STOCK = Trainer(words="")
TRAINERS = (
    Trainer(words=r"fms-acceleration", dropout=0.1, double_quant=True),
    Trainer(words=r"ms-swift", dropout=0.05, weights="bf16"),
    Trainer(
        words=r"qwenlm/qwen(?![\w.])",
        dropout=0.05,
        weights="bf16",
        own_loss=True,
        padded=True,
        metric="process",
    ),
    # Its preparation casts norms only when asked to.
    Trainer(words=r"llama-?factory", prepares=False, weights="bf16"),
    # It casts norms and embeddings back to the model's format wherever there are adapters.
    Trainer(words=r"axolotl", prepares=False, weights="bf16"),
)


def trainer_of(row: Row) -> Trainer:
    """The script that the row's source or notes name; STOCK when none of those known."""
    told = low(row, "source", "notes", "parallelism")
    return next((trainer for trainer in TRAINERS if re.search(trainer.words, told)), STOCK)
