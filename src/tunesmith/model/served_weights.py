"""Weights as they are served on a CPU: stored small, widened to float32 in registers or blocks.

    fp32   as is
    bf16   rounded to bfloat16
    int8   whole numbers -127 … 127 times one scale an output (symmetric)
    nf4    16 levels times one scale for every 64 inputs of an output (Dettmers et al. 2023,
           arXiv:2305.14314); the values of bitsandbytes where the inputs are a multiple of 64

All arithmetic is float32, so nothing but the weights is rounded. With kernels (cpu_kernels) a weight is read
from memory once for all rows; without them, blocks of outputs are widened for torch's product.

Shapes: R rows, I input features, N output features, B blocks of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.model import attention, cpu_kernels
from tunesmith.model.cpu_kernels import PACKED_FORMATS, Kernels, Matrix

WeightFormat = Literal["fp32", "bf16", "int8", "nf4"]
BLOCK = 64
# Outputs widened at a time without kernels: their weights stay in a core's cache.
OUTPUTS_AT_ONCE = 256
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantised:
    """rows [N, I] float32, bfloat16, int8, or NF4's codes as uint8; scales: int8 [N], nf4 [N, B]."""

    format: WeightFormat
    rows: Tensor
    scales: Tensor | None = None


def quantise(weight: Tensor, format: WeightFormat) -> Quantised:
    """`weight` [N, I] of any float format in a format of serving."""
    if format == "fp32":
        return Quantised(format, weight.float())
    if format == "bf16":
        return Quantised(format, weight.bfloat16())
    return _int8(weight.float()) if format == "int8" else _nf4(weight.float())


def _int8(weight: Tensor) -> Quantised:
    scales = weight.abs().amax(1) / 127
    levels = (weight / scales.clamp(min=1e-38)[:, None]).round_().clamp_(-127, 127)
    return Quantised("int8", levels.to(torch.int8), scales)


def _nf4(weight: Tensor) -> Quantised:
    outputs, inputs = weight.shape
    blocks = F.pad(weight, (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    scales = blocks.abs().amax(2)
    relative = blocks * (1.0 / scales.clamp(min=1e-38))[..., None]
    codes = torch.bucketize(relative, (NF4[1:] + NF4[:-1]) / 2, out_int32=True)
    return Quantised("nf4", codes.to(torch.uint8).view(outputs, -1)[:, :inputs], scales)


class _Panels:
    """Weights in the kernels' order."""

    def __init__(self, kernels: Kernels, weight: Quantised, bias: Tensor | None) -> None:
        outputs, inputs = weight.rows.shape
        self._kernels = kernels
        self._panels = kernels.pack(weight.format, weight.rows)
        self._scales = None if weight.scales is None else self._by_panel(weight.scales)
        self._bias = None if bias is None else self._by_panel(bias.float())
        self.matrix = Matrix(
            panels=self._panels.data_ptr(),
            scales=None if self._scales is None else self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            outputs=outputs,
            inputs=inputs,
            format=PACKED_FORMATS.index(weight.format),
        )

    def _by_panel(self, values: Tensor) -> Tensor:
        """[N] -> [panels, width], [N, B] -> [panels, B, width]: zeros for outputs that are not there."""
        width = self._kernels.panel_width
        columns = values.view(len(values), -1)
        padded = F.pad(columns, (0, 0, 0, -len(values) % width))
        return padded.view(-1, width, columns.shape[1]).transpose(1, 2).contiguous()

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self._panels, self._scales, self._bias) if part is not None)

    def multiply(self, x_RI: Tensor) -> Tensor:
        return self._kernels.product(self.matrix, x_RI)

    def widened(self) -> Tensor:
        return self._kernels.unpack(self.matrix)


class _Rows:
    """Weights in torch's order."""

    matrix = None

    def __init__(self, weight: Quantised, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, None if bias is None else bias.float()
        self._shape = weight.rows.shape
        if weight.format == "nf4":
            codes = F.pad(weight.rows, (0, self._shape[1] % 2))
            self._weight = Quantised("nf4", codes[:, ::2] | codes[:, 1::2] << 4, weight.scales)

    @property
    def num_bytes(self) -> int:
        parts = (self._weight.rows, self._weight.scales, self._bias)
        return sum(part.nbytes for part in parts if part is not None)

    def multiply(self, x_RI: Tensor) -> Tensor:
        out = x_RI.new_empty(len(x_RI), self._shape[0])
        for at in range(0, self._shape[0], OUTPUTS_AT_ONCE):
            some = slice(at, at + OUTPUTS_AT_ONCE)
            torch.mm(x_RI, self._values(some).T, out=out[:, some])
        return out if self._bias is None else out.add_(self._bias)

    def widened(self) -> Tensor:
        return self._values(slice(None))

    def _values(self, some: slice) -> Tensor:
        """[outputs, I] float32."""
        rows, scales = self._weight.rows[some], self._weight.scales
        if scales is None:
            return rows.float()
        if self._weight.format == "int8":
            return rows.float().mul_(scales[some, None])
        codes = torch.stack([rows & 15, rows >> 4], dim=2).view(len(rows), -1)[:, : self._shape[1]]
        return NF4[codes.long()] * scales[some].repeat_interleave(BLOCK, 1)[:, : self._shape[1]]


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU: x [..., I] of any float format -> [..., N] float32."""

    def __init__(self, linear: nn.Linear, format: WeightFormat) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        kernels = cpu_kernels.load()
        weight = quantise(linear.weight.detach(), format)
        bias = None if linear.bias is None else linear.bias.detach()
        self._held = _Rows(weight, bias) if kernels is None else _Panels(kernels, weight, bias)

    @property
    def matrix(self) -> Matrix | None:
        """For the kernels; None without them."""
        return self._held.matrix

    @property
    def weight(self) -> Tensor:
        """[N, I] float32, worked out anew at each call: what the product multiplies with."""
        return self._held.widened()

    @property
    def num_bytes(self) -> int:
        """Memory of weights, scales and bias."""
        return self._held.num_bytes

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1]).float()
        return self._held.multiply(rows).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class WideEmbedding(nn.Embedding):
    """An embedding stored in a small format, whose vectors are float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


def pack_weights(model: nn.Module, format: WeightFormat) -> int:
    """Turn every linear layer of `model` into a PackedLinear and all else into float32; returns how many.

    model: a transformers model on the CPU, without adapters, that is not trained any more. The embeddings
    are kept in bfloat16 unless `format` is fp32; with nf4 the output head is bfloat16 too. One layer after
    the other is turned, so that memory for a second copy of the model is never needed.
    """
    head = attention.lm_head(model)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for name in linears:
        linear = cast(nn.Linear, model.get_submodule(name))
        own: WeightFormat = "bf16" if linear is head and format == "nf4" else format
        model.set_submodule(name, PackedLinear(linear, own).train(linear.training))
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            _pack_embedding(part, format)
        else:
            _widen_own(part)
    return len(linears)


def _pack_embedding(part: Any, format: WeightFormat) -> None:
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    # A copy: a tensor that still lies in the mapped file would keep all of the file in memory.
    part.weight = nn.Parameter(part.weight.detach().to(dtype, copy=True), requires_grad=False)
    if type(part) is nn.Embedding:
        part.__class__ = WideEmbedding


def _widen_own(part: nn.Module) -> None:
    for name, value in part.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(value.detach().float(), requires_grad=False))
