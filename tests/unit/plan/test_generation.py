"""The fullest moments of serving: each by hand at small sizes, and those published to the figure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from transformers import Gemma2Config, MixtralConfig, PhiConfig, Qwen3MoeConfig, Starcoder2Config

from tests.tiny_models import FAMILIES, make
from tunesmith.core.units import GIB
from tunesmith.plan.cards import card_named
from tunesmith.plan.decoder import Shape, shape_of
from tunesmith.plan.generation import (
    CUBLAS_BYTES_HOPPER,
    V0,
    V1_GRAPHS,
    V1_KERNEL,
    V1_SORTING,
    CardKind,
    Generation,
    VllmRun,
    card_kind,
    default_batch,
    generation_peak,
    layer_bytes,
    vllm_activation,
    vllm_graphs,
    vllm_non_torch,
    vllm_spread,
    vllm_version,
    weights_of_shape,
)
from tunesmith.plan.model_weights import weights_of

SMALL = Shape(
    layers=3, hidden=8, heads=4, kv_heads=2, head_dim=4, intermediate=32, vocab=100, tied=False, context=64
)
LLAMA = Shape(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256, tied=False,
    context=131072,
)  # fmt: skip
H100 = CardKind(num_bytes=int(79.19 * GIB), is_hopper=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_a_shape_are_the_model_s(family: str) -> None:
    model = make(family)
    shape = replace(shape_of(model.config), qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    ours, theirs = weights_of_shape(shape), weights_of(model)
    assert Counter((w.kind, w.shape, w.tied) for w in ours) == Counter(
        (w.kind, w.shape, w.tied) for w in theirs
    )


@pytest.mark.parametrize(
    ("config", "inner", "gated"),
    [
        (MixtralConfig(intermediate_size=96, num_experts_per_tok=2), 192, True),
        (Qwen3MoeConfig(intermediate_size=96, moe_intermediate_size=24, num_experts_per_tok=8), 192, True),
        (Qwen3MoeConfig(intermediate_size=960, moe_intermediate_size=24, num_experts_per_tok=8), 960, True),
        (Gemma2Config(intermediate_size=96), 96, True),
        (Starcoder2Config(intermediate_size=96), 96, False),
        (PhiConfig(intermediate_size=96), 96, False),
    ],
)
def test_what_a_token_goes_through_in_an_mlp(config: Any, inner: int, gated: bool) -> None:
    """All of its experts, or the dense MLP of some layers where that is wider."""
    shape = shape_of(config)
    assert (shape.intermediate, shape.gated) == (inner, gated)


def test_layer_norms_have_biases() -> None:
    weights = weights_of_shape(replace(SMALL, norm="layer", norms_per_layer=1, gated=False))
    norms = [w for w in weights if w.kind == "other"]
    assert len(norms) == 2 * (3 + 1)
    assert not any("gate" in w.name for w in weights)


def test_a_token_s_keys_and_values() -> None:
    assert SMALL.token_bytes(2) == 2 * 3 * 2 * 4 * 2
    assert SMALL.token_bytes(2, cards=2) == SMALL.token_bytes(2, cards=8) == SMALL.token_bytes(2) // 2
    assert LLAMA.token_bytes(2) == 131072


def test_a_layer_by_hand() -> None:
    """MLP: 4 x 8 + 3 x 32; attention: 3 x 8 + 4 x 16 + 2 x 8, and the scores of 4 heads, 8 bytes each."""
    assert layer_bytes(SMALL, 10, 2) == 10 * 128 * 2
    assert layer_bytes(replace(SMALL, gated=False), 10, 2) == 10 * 104 * 2
    assert layer_bytes(SMALL, 100, 2, attention="eager") == 100 * 104 * 2 + 4 * 100 * 100 * 8


def test_the_moments_of_generate() -> None:
    token = SMALL.token_bytes(2)
    prefill = generation_peak(SMALL, 1000, Generation(prompt=50, generated=5))
    assert prefill.at == "prefill"
    assert prefill.num_bytes == 1000 + 50 * token + 50 * 128 * 2 + 50 * 4 * 2 * 2
    decode = generation_peak(SMALL, 1000, Generation(prompt=1, generated=200))
    assert decode.at == "last token"
    assert decode.num_bytes == 1000 + 201 * token + 201 * 8 * 2  # and a layer's keys once more
    logits = generation_peak(SMALL, 1000, Generation(prompt=50, generated=5, full_logits=True))
    assert logits.at == "first logits"
    assert logits.parts["logits"] == 50 * 100 * (2 + 4)
    static = generation_peak(SMALL, 0, Generation(prompt=50, generated=5, static_cache=True))
    assert static.parts["cache"] == 55 * token


def test_a_widened_matrix_hides_behind_the_gate_and_up_states() -> None:
    """While the widest matrix is there, the product of gate and up is not yet."""
    call = Generation(prompt=10, generated=1, dequantised=1000)
    assert generation_peak(SMALL, 0, call).parts["widened weights"] == 1000 - 10 * 32 * 2
    assert generation_peak(SMALL, 0, replace(call, prompt=100)).parts["widened weights"] == 0


@pytest.mark.parametrize(
    ("vocab", "hidden", "gib"),
    [(128256, 4096, 1.89), (152064, 3584, 2.21), (256000, 3584, 3.65), (51200, 2560, 0.79)],
)
def test_the_sampler_s_dry_run_of_vllm_0_19(vocab: int, hidden: int, gib: float) -> None:
    """As vLLM logged it for Llama-3.1-8B, Qwen2.5-7B, Gemma-2-9B and Phi-2."""
    shape = replace(LLAMA, vocab=vocab, hidden=hidden, intermediate=4 * hidden, gated=vocab > 51200)
    peak = vllm_activation(shape, VllmRun(version=V1_KERNEL, card=H100, tokens=8192, sequences=1024))
    assert peak.at == "sampler"
    assert peak.num_bytes / GIB == pytest.approx(gib, abs=0.01)


def test_the_dry_runs_of_other_versions() -> None:
    """Qwen3-14B logged 5.64 GiB before 0.17 and 2.23 after; Llama-3-8B on two cards with V0 1.26."""
    qwen = replace(LLAMA, vocab=151936, hidden=5120, intermediate=17408)
    run = VllmRun(version=V1_SORTING, card=H100, tokens=8192, sequences=1024)
    assert vllm_activation(qwen, run).num_bytes / GIB == pytest.approx(5.64, abs=0.01)
    assert vllm_activation(qwen, replace(run, version=V1_KERNEL)).num_bytes / GIB == pytest.approx(
        2.23, abs=0.01
    )
    old = VllmRun(version=V0, card=H100, tokens=8192, sequences=256, tensor_parallel=2)
    assert vllm_activation(LLAMA, old).num_bytes / GIB == pytest.approx(1.26, abs=0.01)


def test_a_forward_pass_binds_without_the_sampler() -> None:
    """The first card of a pipeline: gate and up and their product, 4 + 2 x 1.5 hidden states."""
    run = VllmRun(version=V1_KERNEL, card=H100, tokens=8192, sequences=1024, pipeline_parallel=2)
    peak = vllm_activation(LLAMA, run, last=False)
    assert peak.num_bytes == 8192 * (3 * 14336 + 7 * 4096) * 2 + CUBLAS_BYTES_HOPPER
    shared = vllm_activation(LLAMA, replace(run, tensor_parallel=2), last=False)
    assert shared.parts["layer"] == 8192 * ((3 * 14336 + 3 * 4096) // 2 + 4 * 4096) * 2


def test_defaults_by_card() -> None:
    """engine/arg_utils.py: an A100 of 80 GB counts as a small card."""
    assert default_batch(H100) == (8192, 1024)
    assert default_batch(card_kind(card_named("a100-80"))) == (2048, 256)
    assert default_batch(card_kind(card_named("rtx3090"))) == (2048, 256)
    assert default_batch(card_kind(card_named("b200"))) == (16384, 1024)
    assert card_kind(card_named("h100")).is_hopper


def test_versions() -> None:
    assert [vllm_version(*v) for v in ((0, 6), (0, 8), (0, 16), (0, 17), (0, 20), (0, 21), (1, 0))] == [
        V0, V1_SORTING, V1_SORTING, V1_KERNEL, V1_KERNEL, V1_GRAPHS, V1_GRAPHS,
    ]  # fmt: skip
    run = VllmRun(version=V1_GRAPHS, card=H100, tokens=8192, sequences=1024)
    assert vllm_graphs(run) > 0 == vllm_graphs(replace(run, version=V1_KERNEL))
    two, small = replace(run, tensor_parallel=2), CardKind(num_bytes=16 * GIB)
    assert vllm_non_torch(run) < vllm_non_torch(replace(two, card=small)) < vllm_non_torch(two)
    assert vllm_spread(run) < vllm_spread(two)
