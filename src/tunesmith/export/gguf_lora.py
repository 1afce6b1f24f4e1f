"""Write a LoRA adapter of peft's as a GGUF file, for llama.cpp to compute beside its base.

Shapes: r rank, D input features, N output features of a layer.
Format: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp. llama.cpp computes
y += alpha / r * B (A x), with A [r, D] in NAME.lora_a and B [N, r], rows in the base's order, in NAME.lora_b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.core.errors import RunFailed, UserError
from tunesmith.export.gguf import FAMILIES, Array, check_family, heads_to_reorder, neighbours
from tunesmith.export.linears import empty_model
from tunesmith.model.adapter_bank import features
from tunesmith.model.adapters import read_config, weights_file
from tunesmith.model.config import load_config
from tunesmith.model.lora_files import MAX_RANK, LowRank, read_lora
from tunesmith.model.weights import tensor_shapes

OUTER = ("embed_tokens", "lm_head")


def write_gguf_lora(folder: Path, base: Path, path: Path) -> None:
    """Write the adapter in `folder`, trained on the model in `base`, to `path`, in fp32, and read it back.

    Raises UserError with the reason for an adapter that is no plain low-rank update of the layers between
    embeddings and head (DoRA, modules_to_save, biases), or fits another base; RunFailed when the file does
    not hold it.
    """
    config = load_config(base)
    check_family(config)
    _refuse_outer(folder)
    parts = empty_model(config).named_modules()
    layers = {name: sizes for name, part in parts if (sizes := features(part)) is not None}
    updates = read_lora(folder, _Base(str(base)), layers, max_rank=MAX_RANK)
    alpha = _alpha(folder)
    tensors = dict(_tensors(updates, config, alpha))
    _write(path, FAMILIES[config.model_type], folder.name, alpha, tensors)
    _check(path, tensors)


@dataclass(frozen=True)
class _Base:
    """As much of a model as `read_lora` asks for where none is loaded."""

    name_or_path: str

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.empty(0)

    def get_submodule(self, name: str) -> nn.Module:
        raise AttributeError(name)


def _refuse_outer(folder: Path) -> None:
    outer = [name for name in tensor_shapes(weights_file(folder)) if any(part in name for part in OUTER)]
    if outer:
        raise UserError(
            f"{folder}: llama.cpp cannot compute this adapter beside its base: it changes embeddings or head "
            f"('{outer[0]}')",
            hint="fold it in: serve it with --merge, or use --engine local",
        )


def _alpha(folder: Path) -> float:
    """The file's one alpha: r times the scale of the layers that have no setting of their own."""
    config = read_config(folder)
    return float(config.lora_alpha * (config.r**0.5 if config.use_rslora else 1.0)) or 1.0


def _tensors(updates: Mapping[str, LowRank], config: Any, alpha: float) -> Iterator[tuple[str, Array]]:
    """Names and values as in the file: B is divided by what llama.cpp multiplies it with."""
    import gguf

    arch = gguf.MODEL_ARCH[FAMILIES[config.model_type].upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for layer, update in updates.items():
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"the adapter's layer '{layer}' has no place in a GGUF file")
        rank = update.a.shape[0]
        rows: Array = (update.b.T / (alpha / rank)).contiguous().numpy()
        heads = heads_to_reorder(config, f"{layer}.weight")
        yield f"{name}.lora_a", update.a.numpy()
        yield f"{name}.lora_b", rows if heads is None else neighbours(rows, heads)


def _write(path: Path, arch: str, name: str, alpha: float, tensors: Mapping[str, Array]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, values in tensors.items():
            writer.add_tensor(key, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(path: Path, tensors: Mapping[str, Array]) -> None:
    import gguf

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    odd = stored.keys() ^ tensors.keys()
    wrong = [key for key in tensors if key not in odd and not np.array_equal(stored[key], tensors[key])]
    if odd or wrong:
        bad = [*sorted(odd), *wrong][0]
        raise RunFailed(
            f"the adapter's file was refused: {path.name}: '{bad}' is not what was written",
            hint="check the disk",
        )
