"""The held-out loss: a mean over all units, whichever process computes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.reference.conftest import make_documents, make_model, one_batch, trainer_in
from tunesmith.model import attention
from tunesmith.model.batch import IGNORE, Batch
from tunesmith.model.scoring import document_losses
from tunesmith.train.engine import Share
from tunesmith.train.evaluate import evaluate
from tunesmith.train.loop import Trainer

BATCHES = [one_batch(make_documents(3, seed=seed)) for seed in range(4)]


class OneOfTwo:
    """The first of two processes, told what the other one sums; one micro-batch of its own does not count."""

    def __init__(self, trainer: Trainer, others: list[float]) -> None:
        self.engine, self.others = trainer.engine, others
        self.rank, self.model, self.forward = 0, trainer.engine.model, trainer.engine.forward

    def shares(self, batches: Any) -> list[Share]:
        return [Share(0, batches[0]), Share(2, batches[2]), Share(1, batches[1], counts=False)]

    def sum(self, values: Any) -> list[float]:
        return [mine + other for mine, other in zip(values, self.others, strict=True)]


def expected() -> tuple[list[float], int]:
    """The summed loss of each batch, and all supervised tokens, by the scoring of `tunesmith eval`."""
    model = make_model("qwen2")
    attention.install(model)
    model.eval()
    sums = [sum(loss for loss, _ in document_losses(model, batch)) for batch in BATCHES]
    return sums, sum(batch.num_supervised for batch in BATCHES)


def test_mean_over_all_tokens(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, make_model("qwen2"), lambda step: BATCHES, steps=1)
    trainer.engine.model.train()
    found = evaluate(trainer.objective, trainer.engine, BATCHES)
    sums, tokens = expected()
    assert found.supervised_tokens == tokens and found.measures == {}
    assert found.loss == pytest.approx(sum(sums) / tokens, abs=1e-5)
    assert trainer.engine.model.training


def test_processes_share_the_batches(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, make_model("qwen2"), lambda step: BATCHES, steps=1)
    sums, tokens = expected()
    found = evaluate(trainer.objective, OneOfTwo(trainer, [sums[1] + sums[3]]), BATCHES)
    assert found.loss == pytest.approx(sum(sums) / tokens, abs=1e-5)


def test_nothing_supervised(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, make_model("qwen2"), lambda step: BATCHES, steps=1)
    blank = Batch(BATCHES[0].input_ids, BATCHES[0].labels * 0 + IGNORE, BATCHES[0].starts)
    assert math.isnan(evaluate(trainer.objective, trainer.engine, [blank]).loss)
