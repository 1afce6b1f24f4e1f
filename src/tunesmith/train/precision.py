"""Number formats of a training: of the weights, of the products, and the loss scale that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from tunesmith.model.hardware import DTYPES
from tunesmith.recipe.schema import Precision

MAX_SCALE = 2.0**24
GROWTH_STEPS = 1000


def base_dtype(precision: Precision, *, full: bool) -> torch.dtype:
    """Format in which the model is loaded: trained weights in fp32, frozen ones as they are multiplied."""
    return torch.float32 if full and precision != "bf16-pure" else DTYPES[precision]


def cast_trained(model: nn.Module, precision: Precision) -> None:
    """Give trained weights their format: bf16 when everything is, else fp32 masters."""
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes: products in 16 bits where trained weights are fp32."""
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, dtype=DTYPES[precision])
    return nullcontext()


@dataclass
class LossScale:
    """Keeps fp16 gradients above the smallest fp16 number (Micikevicius et al. 2018, arXiv:1710.03740).

    An overflow halves the scale and the step is skipped; after GROWTH_STEPS good ones in a row it doubles.
    In the other formats (`is_on` False) the scale is 1 and stays so, and an overflow is an error.
    """

    is_on: bool = False
    scale: float = 1.0
    good_steps: int = 0
    skipped_steps: int = 0

    @property
    def can_fall(self) -> bool:
        return self.is_on and self.scale > 1.0

    def overflowed(self) -> None:
        self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
        self.skipped_steps += 1

    def went_well(self) -> None:
        self.good_steps += 1
        if self.is_on and self.good_steps % GROWTH_STEPS == 0:
            self.scale = min(self.scale * 2, MAX_SCALE)


def first_scale(precision: Precision) -> LossScale:
    return LossScale(is_on=True, scale=2.0**16) if precision == "fp16" else LossScale()
