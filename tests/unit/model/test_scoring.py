"""Losses of packed documents against one transformers forward pass for each document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tunesmith.model import attention, scoring
from tunesmith.model.batch import IGNORE, Batch, join
from tunesmith.model.load import load_model
from tunesmith.model.scoring import document_losses, token_losses

LENGTHS = (17, 2, 40, 9)


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        ids = generator.integers(10, 49000, length)
        labels = np.where(generator.random(length) < 0.5, ids, IGNORE)
        labels[-1] = ids[-1]
        found.append((ids, labels))
    found[1][1][:] = IGNORE  # a document without a supervised token
    return found


def by_transformers(folder: Path) -> list[tuple[float, int]]:
    """transformers' own loss of each document, times its number of shifted labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids, labels in documents():
        number = int((labels[1:] != IGNORE).sum())
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None])
        found.append((out.loss.item() * number if number else 0.0, number))
    return found


@pytest.mark.parametrize("chunk", [3, 256])
def test_document_losses_equal_transformers(tiny: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    attention.install(model)
    ours = document_losses(model, join(documents()))
    for (loss, number), (expected, count) in zip(ours, by_transformers(tiny), strict=True):
        assert number == count
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_token_losses_and_their_places(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    attention.install(model)
    ids = np.arange(100, 120)
    losses, places = token_losses(model, join([(ids, ids)]))
    assert places.tolist() == list(range(1, 20))
    logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_no_supervised_token(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    attention.install(model)
    batch = Batch(np.arange(5), np.full(5, IGNORE), np.array([0, 5]))
    assert document_losses(model, batch) == [(0.0, 0)]
