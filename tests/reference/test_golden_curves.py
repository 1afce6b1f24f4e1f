"""The loop's loss curves, kept: a refactoring shows the same, only a change of the mathematics may alter them.

`python -m tests.reference.test_golden_curves` writes them anew; say in the change why they moved.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reference.conftest import make_documents, make_model, one_batch, trainer_in
from tunesmith.model.adapters import attach_lora
from tunesmith.train.loop import Trainer
from tunesmith.train.metrics import loss_curve

GOLDEN = Path(__file__).parent.parent / "golden"
METHODS = ("full", "lora")
STEPS = 20


def curve(method: str, make_trainer: Callable[..., Trainer]) -> list[float]:
    """Two documents a micro-batch, two micro-batches a step, dropout in the adapters, decay, clipping."""
    model: Any = make_model("llama-tied")
    if method == "lora":
        settings = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False}
        model = attach_lora(model, dropout=0.1, seed=0, **settings)

    def batches(step: int) -> list[Any]:
        documents = make_documents(4, seed=step % 3)
        return [one_batch(documents[:2]), one_batch(documents[2:])]

    train = {"lr": 5e-3, "warmup_steps": 2, "weight_decay": 0.1, "seed": 11}
    trainer = make_trainer(model, batches, steps=STEPS, train=train)
    trainer.run()
    return list(loss_curve(trainer.task.run.events).values())


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_is_the_kept_one(method: str, make_trainer: Callable[..., Trainer]) -> None:
    kept = json.loads((GOLDEN / f"losses_{method}.json").read_text())
    assert kept[0] - kept[-1] > 0.1
    assert curve(method, make_trainer) == pytest.approx(kept, abs=1e-5)


def write() -> None:
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            found = curve(method, lambda *args, **more: trainer_in(Path(folder), *args, **more))
        (GOLDEN / f"losses_{method}.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    write()
