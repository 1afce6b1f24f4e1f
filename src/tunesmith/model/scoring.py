"""How likely a model finds given tokens: the negative log likelihood of every supervised token.

Shapes: T tokens of a flat batch, S supervised tokens of it, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.model.attention import hidden_states, lm_head
from tunesmith.model.batch import IGNORE, Batch
from tunesmith.model.branches import layout_of

CHUNK = 256  # supervised tokens whose logits are held at one time


@torch.inference_mode()
def token_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(losses [S] fp32, places [S]): -ln p(token | its document so far), and the token's index in the batch.

    The model must have `model.attention.install`ed. Logits are computed where a label is, CHUNK at a time.
    """
    device = next(model.parameters()).device
    places = torch.from_numpy(np.flatnonzero(batch.labels != IGNORE))
    input_ids = torch.from_numpy(batch.input_ids).to(device)[None]
    positions = torch.from_numpy(batch.positions).to(device)[None]
    hidden_TD = hidden_states(model, input_ids, positions, layout_of(batch))[0]
    # A document's first token is never supervised, so every place has a token before it.
    hidden_SD = hidden_TD[torch.from_numpy(batch.predictors).to(device)[places.to(device)]]
    targets_S = input_ids[0, places.to(device)]
    head = lm_head(model)
    losses = [
        F.cross_entropy(head(h).float(), t, reduction="none")
        for h, t in zip(hidden_SD.split(CHUNK), targets_S.split(CHUNK), strict=True)
    ]
    return torch.cat(losses).cpu() if len(places) else torch.zeros(0), places


def document_losses(model: Any, batch: Batch) -> list[tuple[float, int]]:
    """(sum of the losses, number of supervised tokens) of every document of a batch, summed in float64."""
    losses, places = token_losses(model, batch)
    owner = np.searchsorted(batch.starts, places.numpy(), side="right") - 1
    count = len(batch.starts) - 1
    sums = np.bincount(owner, weights=losses.double().numpy(), minlength=count)
    tokens = np.bincount(owner, minlength=count)
    return [(float(total), int(number)) for total, number in zip(sums, tokens, strict=True)]
