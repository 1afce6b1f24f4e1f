"""Packing and micro-batching are arrangements only: they change no logit and no gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.reference.conftest import MODELS, make_documents, make_model, one_batch
from tunesmith.model import attention
from tunesmith.train.loop import Trainer
from tunesmith.train.objective import Tally


def packed_differences(model: Any, vocabulary: int, count: int) -> list[float]:
    """Largest difference of each document's logits, packed against alone.

    In float32 relative to the document's largest logit: matrix kernels round differently for other numbers
    of rows. In float64 that is out of sight, so there it is the plain difference.
    """
    documents = make_documents(count, seed=3, vocabulary=vocabulary)
    batch = one_batch(documents)
    model.eval()
    with torch.no_grad():
        alone = [model(torch.from_numpy(ids)[None]).logits[0] for ids, _ in documents]
        attention.install(model)
        hidden = attention.hidden_states(
            model,
            torch.from_numpy(batch.input_ids)[None],
            torch.from_numpy(batch.positions)[None],
            attention.PackedLayout(batch.starts),
        )
        packed = attention.lm_head(model)(hidden)[0]
    parts = packed.split([len(ids) for ids, _ in documents])
    exact = packed.dtype == torch.float64
    return [
        float((part - own).abs().max() / (1.0 if exact else own.abs().max().clamp(min=1.0)))
        for part, own in zip(parts, alone, strict=True)
    ]


@pytest.mark.parametrize("kind", list(MODELS))
def test_packed_logits_equal_unpacked(kind: str) -> None:
    assert max(packed_differences(make_model(kind), 512, 9)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_logits_equal_unpacked_on_smollm2(smol: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=dtype)
    assert max(packed_differences(model, 40000, 6)) < 1e-5


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
def test_splits_of_a_global_batch_have_the_same_gradients(
    kind: str, make_trainer: Callable[..., Trainer]
) -> None:
    documents = make_documents(8, seed=5)
    found = {}
    for size in (1, 2, 8):
        model = make_model(kind)
        batches = [one_batch(documents[at : at + size]) for at in range(0, 8, size)]
        trainer = make_trainer(model, lambda step, batches=batches: batches, steps=1)
        model.train()
        supervised = sum(batch.num_supervised for batch in batches)
        trainer.backward(batches, supervised, Tally(trainer.objective))
        found[size] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for size in (2, 8):
        for name, gradient in found[1].items():
            worst = float((found[size][name] - gradient).abs().max())
            assert worst < 1e-6, f"{name}: 8x1 and {8 // size}x{size} differ by {worst}"
    assert max(float(g.abs().max()) for g in found[1].values()) > 1e-3
