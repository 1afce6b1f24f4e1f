"""Weights of linear layers as 4 bits by AWQ (Lin et al. 2023, arXiv:2306.00978), through llm-compressor.

Channels that meet large activations are scaled up before they are rounded, by what calibration rows show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tunesmith.export.linears import ignored
from tunesmith.export.silent import silent
from tunesmith.model.quiet import quiet

BITS = 4


def write_awq(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    group_size: int,
    dtype: torch.dtype,
) -> None:
    """Write the fp32 `model` to `folder`: linear layers of 4 bits, a scale for each group_size inputs.

    rows: token ids that the model is calibrated on, as they are; all else is `dtype`. `model` is used up.
    """
    model.generation_config = GenerationConfig()
    with silent(), unpinned(), quiet():
        _compress(model, tokenizer, rows, group_size)
        model.to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder, save_compressed=True)
    (folder / "recipe.yaml").unlink(missing_ok=True)  # ours is in the card


def _compress(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], group_size: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(num_bits=BITS, strategy="group", group_size=group_size, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rounding = QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignored(model))
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": list(row)} for row in rows]),
        recipe=[AWQModifier(), rounding],
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows)),
        shuffle_calibration_samples=False,
    )


@contextmanager
def unpinned() -> Iterator[None]:
    """llm-compressor 0.14 pins calibration data for a GPU also where there is none, and fails there."""
    if torch.accelerator.is_available():
        yield
        return
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin
