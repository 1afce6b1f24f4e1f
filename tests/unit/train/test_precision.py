"""The loss scale of fp16, and which weights have which format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference.conftest import make_model
from tunesmith.model import attention
from tunesmith.model.batch import join
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import GROWTH_STEPS, autocast, base_dtype, cast_trained, first_scale


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
def test_only_fp16_is_scaled(precision: str) -> None:
    scale = first_scale(precision)  # type: ignore[arg-type]
    for _ in range(2 * GROWTH_STEPS):
        scale.went_well()
    assert scale.scale == 1.0 and not scale.can_fall


def test_overflow_halves_and_good_steps_double() -> None:
    scale = first_scale("fp16")
    scale.overflowed()
    assert scale.scale == 2.0**15 and scale.skipped_steps == 1
    for _ in range(GROWTH_STEPS - 1):
        scale.went_well()
    assert scale.scale == 2.0**15
    scale.went_well()
    assert scale.scale == 2.0**16


def test_the_scale_falls_to_one_and_no_further() -> None:
    scale = first_scale("fp16")
    for _ in range(16):
        assert scale.can_fall
        scale.overflowed()
    assert scale.scale == 1.0 and not scale.can_fall


@pytest.mark.parametrize(
    ("precision", "full", "dtype"),
    [
        ("bf16", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("bf16-pure", True, torch.bfloat16),
        ("fp16", False, torch.float16),
        ("fp16", True, torch.float32),
    ],
)
def test_trained_weights_are_fp32_unless_all_is_bf16(precision: str, full: bool, dtype: torch.dtype) -> None:
    assert base_dtype(precision, full=full) == dtype  # type: ignore[arg-type]


def test_frozen_weights_keep_their_format() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    model.weight.requires_grad_(False)
    cast_trained(model, "bf16")
    assert model.weight.dtype == torch.bfloat16 and model.bias.dtype == torch.float32


def test_long_documents_under_autocast_on_layers_as_they_are() -> None:
    """transformers' rotation gives fp32 queries beside bf16 values there."""
    model = make_model("llama-tied").train()
    attention.install(model)
    ids = np.random.default_rng(0).integers(3, 500, 300)
    batch = join([(ids, ids.copy())], (0,))
    exact = Supervised().total(model, batch)
    with autocast("bf16", torch.device("cpu")):
        loss = Supervised().total(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
