"""Products for the small batches of decoding on a CPU in float32. Weights keep their values.

Measured on SmolLM2-135M (30 layers, two cores, float32): all products of the layers take 17 ms for one row;
for 8 rows 30 to 36 ms as one product each, 25 ms in blocks.

Shapes: R rows, D input features, N output features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# A block of 32 outputs' weights stays in a core's cache while it is laid out anew for the product's kernel;
# for a whole matrix that goes through memory, which costs more than the few rows' arithmetic.
BLOCKS = (32, 48, 16)
FEWEST_ROWS, MOST_ROWS = 3, 12


class BlockedLinear(nn.Linear):
    """nn.Linear that multiplies 3 to 12 rows block by block of its outputs; all else as nn.Linear."""

    block: int

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if not FEWEST_ROWS <= len(rows) <= MOST_ROWS:
            return super().forward(input)
        blocks = self.weight.view(-1, self.block, self.in_features)
        out = torch.bmm(rows.expand(len(blocks), *rows.shape), blocks.transpose(1, 2)).transpose(0, 1)
        out = out.reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def use_blocks(model: nn.Module) -> None:
    """Turn every plain linear layer on a CPU in float32 into a BlockedLinear, in place.

    Layers whose outputs no block divides stay as they are. For models that are not trained any more.
    """
    for part in cast(Any, model).modules():
        if not _is_plain(part) or not part.weight.is_contiguous():
            continue
        block = next((b for b in BLOCKS if part.out_features % b == 0), None)
        if block is not None:
            part.__class__ = BlockedLinear
            part.block = block


def _is_plain(part: Any) -> bool:
    """A matrix and no more, on a CPU in float32."""
    kind = type(part) in (nn.Linear, BlockedLinear)
    return kind and part.weight.device.type == "cpu" and part.weight.dtype == torch.float32


def fast_head(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function with `head`'s values, [R, D] -> [R, V].

    On a CPU in float32 the weights are reordered once into oneDNN's blocked layout (a copy): for 4 to 16 rows
    of a large vocabulary that takes a third to a half of the time of the plain product. Elsewhere, and for
    a head that is more than a matrix, it is `head` itself.
    """
    if not _is_plain(head) or not torch.backends.mkldnn.is_available():
        return head
    mkldnn = torch.ops.mkldnn
    linear: Any = head
    # oneDNN ends the process where it gets no memory for its copy; torch raises an error.
    torch.empty_like(linear.weight)
    weight = mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
    bias = None if linear.bias is None else linear.bias.detach()

    def multiply(hidden: Tensor) -> Tensor:
        return mkldnn._linear_pointwise(hidden.contiguous(), weight, bias, "none", [], "")

    return multiply
