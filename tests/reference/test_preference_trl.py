"""Our preference losses against TRL's own, trained for a few steps on the same model and pairs.

The numbers are what TRL 1.16.0 printed: see trl_preference.py beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.preference_case import BETA, LR, STEPS, small_model, step_pairs
from tests.reference.test_preference import batch_of, trainer_in
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Objective
from tunesmith.train.metrics import loss_curve
from tunesmith.train.preference import Answers, orpo_losses

TRL = {
    "sigmoid": [0.6931472, 0.6863420, 0.2639329, 0.3675639, 0.1338071, 0.1995481, 0.0766023, 0.1155307],
    "hinge": [1.0000000, 0.9862425, 0.0671714, 0.2273875, 0.0000000, 0.0886131, 0.0000000, 0.0000000],
    "ipo": [2.7777777, 2.7720296, 1.5795138, 2.1586666, 0.9904553, 1.5864611, 0.6575317, 1.1087196],
}
TRL_ODDS_RATIO = [0.2034046, 0.3298963, 0.0953471]


class Setup:
    """One micro-batch a step."""

    def __call__(self, step: int) -> list[Batch]:
        return [batch_of(step_pairs(step))]

    def documents(self) -> Iterator[Batch]:
        return (batch_of(step_pairs(step)) for step in (0, 1))


@pytest.mark.parametrize("loss", TRL)
def test_dpo_curve_equals_trl(tmp_path: Path, loss: str) -> None:
    objective = {"type": "dpo", "loss": loss, "beta": BETA}
    trainer = trainer_in(tmp_path, small_model(), Setup(), objective, STEPS, lr=LR)
    trainer.run()
    found = list(loss_curve(trainer.task.run.events).values())
    np.testing.assert_allclose(found, TRL[loss], rtol=0, atol=1e-5)


def test_odds_ratio_equals_trl() -> None:
    """Ours adds the chosen answer's cross-entropy, of the answer alone; TRL's is of the prompt too."""
    chosen = torch.tensor([-2.2, -2.5, -2.5], dtype=torch.float64)
    rejected = torch.tensor([-2.0, -1.625, -29 / 9], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    losses = orpo_losses(
        Answers(chosen, ones, ones), Answers(rejected, ones, ones), Objective(type="orpo", beta=0.25)
    )
    np.testing.assert_allclose((losses + chosen).numpy(), TRL_ODDS_RATIO, rtol=0, atol=1e-6)
