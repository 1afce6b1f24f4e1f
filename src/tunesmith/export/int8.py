"""Weights of linear layers as int8 with a scale for each output, in the files of compressed-tensors.

transformers and vLLM read them; activations become int8 too, by a scale for each token while it runs.
Shapes: O outputs, I inputs of a linear layer.
Format: https://github.com/vllm-project/compressed-tensors, "int-quantized".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tunesmith.core.paths import write_json
from tunesmith.export.linears import ignored, linears
from tunesmith.export.merge import check_files
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import read_json_file

LARGEST = 127
FORMAT = "int-quantized"


def round_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scale [O, 1] in `dtype`): weight is codes * scale within half a scale.

    The scale is rounded to `dtype` before the codes are taken, so that its rounding costs nothing.
    """
    scale = (weight.float().abs().amax(-1, keepdim=True) / LARGEST).to(dtype)
    scale = scale.clamp(min=torch.finfo(dtype).tiny)
    codes = (weight.float() / scale.float()).round_().clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8), scale


def write_int8(model: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the fp32 `model` to `folder`: linear layers as int8, all else as `dtype`. `model` is used up.

    Raises RunFailed when the files do not hold what was written or it is not finite.
    """
    kept = ignored(model)
    for layer in linears(model).values():
        codes, scale = round_rows(layer.weight.detach(), dtype)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.register_buffer("weight_scale", scale)
    model.to(dtype)  # leaves integers alone
    model.config.dtype = dtype
    model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
    check_files(model, folder)
    config = read_json_file(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": _section(kept)})


def _section(kept: list[str]) -> dict[str, Any]:
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "format": FORMAT,
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }
