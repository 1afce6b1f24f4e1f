"""Bytes of weights, by format and card: by hand, and beside what stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model

from tests.tiny_models import make
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.served_weights import pack_weights
from tunesmith.plan.model_weights import weights_of
from tunesmith.plan.serving import (
    FORMATS,
    GGML_FALLBACK,
    GGML_TYPES,
    Weight,
    adapter_bytes,
    fused,
    gguf_bytes,
    held_bytes,
    local_weight_bytes,
    sharded,
    tensor_bytes,
    weight_bytes,
)

MIB = 1 << 20
MATRIX = Weight("model.layers.0.mlp.up_proj.weight", (128, 256), "linear")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", (131072,)),
        ("bf16", (65536,)),
        ("int8", (32768, 512)),  # a scale for each of 128 outputs
        ("fp8", (32768, 4)),
        ("nf4", (16384, 2048)),  # 512 blocks of 64, fp32
        ("nf4-dq", (16384, 512, 8)),  # in one byte, and 2 blocks of 256 of these
        ("gptq-int4", (16384, 512, 128, 1024)),  # 2 groups of 128; g_idx for 256 inputs
        ("gptq-int8", (32768, 512, 256, 1024)),
        ("awq-int4", (16384, 512, 128)),
    ],
)
def test_a_matrix_by_hand(name: str, expected: tuple[int, ...]) -> None:
    assert tensor_bytes(MATRIX, FORMATS[name]) == expected
    norm = Weight("model.norm.weight", (256,), "other")
    assert tensor_bytes(norm, FORMATS[name]) == (1024 if name == "fp32" else 512,)
    head = Weight("lm_head.weight", (512, 256), "head")
    assert tensor_bytes(head, FORMATS[name]) == (512 * 256 * FORMATS[name].plain,)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_what_bitsandbytes_stores(double: bool) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(128, 256), quant_type="nf4", compress_statistics=double)
    found = [packed.nbytes, state.absmax.nbytes]
    if double:
        found.append(state.state2.absmax.nbytes)
    assert tensor_bytes(MATRIX, FORMATS["nf4-dq" if double else "nf4"]) == tuple(found)


def test_what_the_allocator_counts_for_weights() -> None:
    assert held_bytes(1000) == 1024
    assert held_bytes(9 * MIB + 1) == 9 * MIB + 512
    assert held_bytes(135 * MIB) == 136 * MIB  # the rest of 1 MiB goes with it
    assert held_bytes(134 * MIB) == 134 * MIB
    assert held_bytes(49 * MIB // 2) == 49 * MIB // 2  # a rest of 1.5 MiB is split off


@pytest.mark.parametrize("stored", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen2"])
def test_our_engine_s_weights_on_a_cpu(family: str, stored: Any) -> None:
    """Of any panel width that the kernels of this machine have."""
    from tunesmith.model import cpu_kernels
    from tunesmith.model.kv_cache import weight_bytes as measured

    model = make(family)
    weights = weights_of(model)
    pack_weights(model, stored)
    kernels = cpu_kernels.load()
    panel = kernels.panel_width if kernels else 1
    assert local_weight_bytes(weights, stored, device="cpu", panel=panel) == measured(model)


def test_our_engine_s_weights_on_a_gpu() -> None:
    weights = weights_of(make("llama"))
    assert local_weight_bytes(weights, "bf16", device="cuda", panel=32) == weight_bytes(
        weights, FORMATS["bf16"]
    )
    nf4 = local_weight_bytes(weights, "nf4", device="cuda", panel=32)
    assert nf4 == weight_bytes(weights, FORMATS["nf4-dq"])


def test_shards_of_four_cards() -> None:
    """Four query heads of 16 and two key heads: keys are on two cards each; 512 tokens are 128 a card."""
    whole = weights_of(make("qwen2"))
    shard = {w.name.removeprefix("model."): w.shape for w in sharded(whole, 4, kv_heads=2)}
    assert shard["embed_tokens.weight"] == shard["lm_head.weight"] == (128, 64)
    assert shard["layers.0.self_attn.q_proj.weight"] == (16, 64)
    assert shard["layers.0.self_attn.k_proj.weight"] == (16, 64)
    assert shard["layers.0.self_attn.q_proj.bias"] == (16,)
    assert shard["layers.0.self_attn.o_proj.weight"] == (64, 16)
    assert shard["layers.0.mlp.down_proj.weight"] == (64, 24)
    assert shard["layers.0.input_layernorm.weight"] == shard["norm.weight"] == (64,)


def test_the_vocabulary_is_padded() -> None:
    """32001 tokens become 32064, half of them on each of two cards."""
    embedding = Weight("model.embed_tokens.weight", (32001, 8), "embedding")
    assert sharded([embedding], 2, kv_heads=1)[0].shape == (16032, 8)


def test_experts_are_cut_inside() -> None:
    experts = Weight("model.layers.0.mlp.experts.gate_up_proj", (8, 96, 64), "experts")
    assert sharded([experts], 4, kv_heads=1)[0].shape == (8, 24, 64)
    assert tensor_bytes(experts, FORMATS["awq-int4"])[0] == 8 * 96 * 64 // 2


def test_fused_matrices_have_the_same_numbers() -> None:
    whole = weights_of(make("qwen2"))
    merged = fused(whole, ["qkv", "gate_up"])
    assert sum(w.count for w in merged) == sum(w.count for w in whole)
    shapes = [w.shape for w in merged if w.layer == 1 and w.kind == "linear"]
    assert shapes == [(64 + 32 + 32, 64), (64, 64), (192, 64), (64, 96)]
    assert [w.shape for w in merged if w.layer == 1 and w.name.endswith("bias")] == [(128,)]


def test_adapters_are_what_the_bank_holds(tmp_path: Path) -> None:
    model = make("llama")
    weights = weights_of(model)
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    bank = AdapterBank(make("llama"))
    bank.load("one", tmp_path)
    assert adapter_bytes(weights, 4, 4, targets) == bank.num_bytes
    assert adapter_bytes(weights, 4, 4, ["q_proj"]) == 2 * 4 * (64 + 64) * 4


# -- llama.cpp ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGML_TYPES)
def test_ggml_types(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == GGML_TYPES[name]
    fallback = GGML_FALLBACK.get(name)
    assert fallback is None or GGML_TYPES[fallback][0] < GGML_TYPES[name][0]


def test_q4_k_m_by_hand() -> None:
    """Of 8 layers, 1 before and 1 from 7 on are q6_k, and of those between every third."""
    layers = [Weight(f"model.layers.{at}.mlp.down_proj.weight", (2, 256), "linear") for at in range(8)]
    head = Weight("lm_head.weight", (4, 256), "head")
    more = [at for at in range(8) if gguf_bytes([layers[at], layers[7]], "q4_k_m") == 2 * 2 * 210]
    assert more == [0, 3, 6, 7]
    assert gguf_bytes([*layers, head], "q4_k_m") == 4 * 2 * 210 + 4 * 2 * 144 + 4 * 210


def test_rows_that_no_block_divides() -> None:
    """64 inputs: q4_k becomes q5_0, q6_k becomes q8_0; norms stay in fp32."""
    up = Weight("model.layers.0.mlp.up_proj.weight", (3, 64), "linear")
    norm = Weight("model.norm.weight", (64,), "other")
    assert gguf_bytes([up], "q4_k_m") == 3 * 2 * 22
    assert gguf_bytes([up, norm], "q8_0") == 3 * 2 * 34 + 256
    tied = [
        Weight("model.embed_tokens.weight", (5, 64), "embedding"),
        Weight("h", (5, 64), "head", tied=True),
    ]
    assert gguf_bytes(tied, "q4_k_m") == 5 * 2 * 34
    assert gguf_bytes(tied, "f16") == 5 * 64 * 2
