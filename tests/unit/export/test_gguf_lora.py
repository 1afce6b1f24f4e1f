"""Adapters as GGUF: what llama.cpp computes from the file is what peft merges into the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.make_run import stir
from tunesmith.core.errors import UserError
from tunesmith.export.gguf import heads_to_reorder, neighbours
from tunesmith.export.gguf_lora import write_gguf_lora
from tunesmith.model.load import load_model


def adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """The model with an adapter in every layer, saved in `folder`."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    config = LoraConfig(task_type="CAUSAL_LM", **given)
    model = get_peft_model(load_model(base, dtype=torch.float32, device="cpu"), config)
    stir(model, std=0.05, seed=3, only="lora_B")
    model.save_pretrained(folder)
    return model


def computed(path: Path) -> dict[str, Any]:
    """What llama.cpp adds to each weight, by its rule."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")}
    assert len(found) == 2 * len(names)
    return {
        name: alpha / found[f"{name}.lora_b"].shape[1] * found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        for name in names
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 5}},
        {"target_modules": ["k_proj", "up_proj"]},
    ],
)
def test_what_is_added_to_each_weight_is_what_peft_adds(
    settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    model = adapter(tiny, tmp_path / "a", **settings)
    write_gguf_lora(tmp_path / "a", tiny, tmp_path / "a.gguf")
    found, config = computed(tmp_path / "a.gguf"), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    layers = {
        re.sub(r"^base_model\.model\.", "", name): part.get_delta_weight("default").detach().numpy()
        for name, part in model.named_modules()
        if hasattr(part, "get_delta_weight")
    }
    assert len(found) == len(layers) > 0
    for layer, delta in layers.items():
        heads = heads_to_reorder(config, f"{layer}.weight")
        assert (heads is None) == (".q_proj" not in layer and ".k_proj" not in layer)
        wanted = delta if heads is None else neighbours(delta, heads)
        assert np.abs(delta).max() > 0
        np.testing.assert_allclose(found[f"{names.get_name(layer)}.weight"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes embeddings or head"),
        ({"bias": "lora_only"}, "biases"),
    ],
)
def test_what_llamacpp_cannot_compute_is_refused(
    settings: dict[str, Any], why: str, tiny: Path, tmp_path: Path
) -> None:
    adapter(tiny, tmp_path / "a", **settings)
    with pytest.raises(UserError, match=why):
        write_gguf_lora(tmp_path / "a", tiny, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
