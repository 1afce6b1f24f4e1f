"""Losses and gradients of compiled layers beside plain ones; run as a program, in a process of its own.

In a process that has imported pip before, setuptools (which torch's compiler imports) refuses to load under
Python 3.11: https://github.com/pypa/pip/issues/8761. A training never imports pip; another test may have.
"""

from __future__ import annotations

import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.model import attention
from tunesmith.recipe.schema import Train
from tunesmith.train.objective import Supervised
from tunesmith.train.speed import speed_up


def compare() -> None:
    """Raises AssertionError where a loss or a gradient is not that of the plain layers."""
    plain, compiled = make_model("llama-tied"), make_model("llama-tied")
    attention.install(plain)
    attention.install(compiled)
    settings = Train.model_validate({"kernels": "torch", "compile": True})
    assert speed_up(compiled, settings).compiled_layers == 2
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
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    compare()
    print("the same")
