"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914).

Shapes: T tokens of the flat stream, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.model.attention import unwrapped


class EmbeddingNoise:
    """Adds alpha / sqrt(L·D) · u to every entry, u uniform in [-1, 1], L the tokens of the entry's document.

    Only in a forward pass whose gradients are wanted: evaluations, samples and a reference model's answers
    stay as they are. The noise comes from torch's random state, which the loop sets for every micro-batch.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._positions: Tensor | None = None

    def install(self, model: Any) -> None:
        """Hook a model (plain or PeftModel) that is called with `position_ids` which start at 0 in every
        document."""
        inner = unwrapped(model)
        inner.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True)
        inner.get_input_embeddings().register_forward_hook(self._add)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._positions = kwargs.get("position_ids")

    def _add(self, module: Any, args: Any, embedded: Tensor) -> Tensor:
        positions = self._positions
        if positions is None or not module.training or not torch.is_grad_enabled():
            return embedded
        size_T1 = (lengths(positions[0]) * embedded.shape[-1]).to(embedded.dtype)[:, None]
        noise = torch.rand_like(embedded).mul_(2).sub_(1)
        return embedded + noise * (self.alpha / size_T1.sqrt())


def lengths(positions_T: Tensor) -> Tensor:
    """Tokens [T] of the document of every token; documents begin where the position is 0."""
    document_T = (positions_T == 0).cumsum(0)
    return torch.bincount(document_T)[document_T]
