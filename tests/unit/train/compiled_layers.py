"""Losses and gradients of compiled layers beside plain ones; run as a program, in a process of its own.

In a process that has imported pip before, setuptools (which torch's compiler imports) refuses to load under
Python 3.11: https://github.com/pypa/pip/issues/8761. A training never imports pip; another test may have.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.hardware import settle_vector_math
from tunesmith.recipe.schema import Train
from tunesmith.train.objective import Supervised
from tunesmith.train.speed import speed_up


def compare(kind: str, *, lora: bool) -> None:
    """Raises AssertionError where a loss or a gradient is not that of the plain layers."""
    plain, compiled = model_of(kind, lora=lora), model_of(kind, lora=lora)
    settings = Train.model_validate({"kernels": "torch", "compile": True})
    speed = speed_up(compiled, settings)
    assert speed.compiled and speed.fused_layers == 2
    for seed in range(3):
        batch = one_batch(make_documents(3 + seed, seed=seed))
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = Supervised().total(model, batch)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            if theirs.requires_grad:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def model_of(kind: str, *, lora: bool) -> Any:
    model = make_model(kind)
    attention.install(model)
    if not lora:
        return model
    return attach_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", rslora=False, seed=0)


if __name__ == "__main__":
    settle_vector_math()
    compare("qwen3", lora=False)
    compare("llama-tied", lora=True)
    print("the same")
