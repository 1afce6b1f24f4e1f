"""Published peaks of serving: rows of every kind made by hand, and the whole file where it is given."""

from __future__ import annotations

import copy
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from tunesmith.plan.facts_serving import predict_serving
from tunesmith.plan.facts_types import Prediction, Skipped

QWEN = {
    "layers": 24, "hidden": 896, "heads": 14, "kv_heads": 2, "head_dim": 64, "intermediate": 4864,
    "vocab": 151936, "tied_embeddings": True, "mlp": "gated", "qkv_bias": True, "qk_norm": False, "norm": "rms",
    "norms_per_layer": 2, "n_params": 494032768,
}  # fmt: skip
GENERATE: dict[str, Any] = {
    "kind": "serve_hf", "model": "Qwen2-0.5B", "config": QWEN, "precision": "bf16", "micro_batch": 1,
    "attention": "flash_attention_2", "num_gpus": 1, "gpu": "A100-80GB",
    "peak_metric": "torch max_memory_allocated",
    "peak_extra": {"input_tokens": 30720, "generated_tokens": 2048},
    "notes": "torch 2.3.1, transformers 4.46",
}  # fmt: skip
VLLM: dict[str, Any] = {
    "kind": "serve_vllm", "model": "Qwen2-0.5B", "config": QWEN, "precision": "bfloat16; kv auto",
    "seq_len": 8192, "num_gpus": 1, "parallelism": "TP 1, PP 1", "gpu": "H100-80GB (79.19 GiB)",
    "peak_metric": "vLLM non-KV total per GPU", "peak_extra": {"gpu_memory_utilization": 0.9},
    "notes": "vLLM v0.19.0",
}  # fmt: skip


def gib(row: dict[str, Any], **changes: Any) -> float:
    found = predict_serving(row | changes)
    assert isinstance(found, Prediction), found
    return found.gib


def test_the_last_token_s_logits_only_since_transformers_4_45() -> None:
    """The same prompt of 30,720 tokens took 27.61 GiB before and 2.34 after (transformers #33902)."""
    assert gib(GENERATE) == pytest.approx(2.34, rel=0.02)
    assert gib(GENERATE, notes="transformers 4.40.1") == pytest.approx(27.61, rel=0.02)
    told = "transformers 4.40.1 (last-token logits only)"
    assert gib(GENERATE, notes=told) == pytest.approx(2.34 + 0.19, rel=0.02)  # each layer's rotary table


def test_weights_that_stay_and_those_that_shrink() -> None:
    short = {"peak_extra": {"input_tokens": 1, "generated_tokens": 1}}
    plain = gib(GENERATE, **short)
    smaller = [gib(GENERATE, precision=p, **short) for p in ("gptq-int8", "gptq-int4", "awq-int4", "nf4-dq")]
    assert plain > max(smaller) > min(smaller) > 151936 * 896 * 2 / 2**30
    assert gib(GENERATE, precision="fp32", **short) == pytest.approx(2 * plain, rel=0.02)


def test_a_row_of_litgpt_widens_the_head_twice() -> None:
    """Its short prompt is said in words; its head is quantised too, and widened to fp16, then to bf16."""
    config = QWEN | {"tied_embeddings": False, "n_params": QWEN["n_params"] + 151936 * 896}
    told = {"peak_extra": None, "notes": "short prompt, default 50 new tokens", "precision": "nf4"}
    row = GENERATE | told | {"config": config}
    head, widest = 151936 * 896 * 2 / 2**30, 4864 * 896 * 2 / 2**30
    saved = head * (1 - 0.5625 / 2)
    more = gib(row, source="Lightning-AI/litgpt") - gib(row)
    assert more == pytest.approx(2 * head - widest - saved, abs=0.003)


def test_several_cards_together_or_one_of_them() -> None:
    both = gib(GENERATE, num_gpus=2)
    one = gib(GENERATE, num_gpus=2, peak_metric="max_memory_allocated per GPU")
    assert both == pytest.approx(2 * one)


def test_vllm_by_version_and_cards() -> None:
    now, before = gib(VLLM), gib(VLLM, notes="vLLM (version 0.16)")
    assert before - now == pytest.approx(151936 * (24 * 1024 - 4 * 132) / 2**30 - 0.12, rel=0.01)
    assert gib(VLLM, notes="vLLM v0.21.0") - now == pytest.approx(0.9, abs=0.01)
    assert gib(VLLM, notes="vLLM v0.21.0, --enforce-eager") == now
    listed = "weights + activation + non-torch"
    assert gib(VLLM, notes="vLLM v0.21.0", peak_metric=listed) == now
    two = gib(VLLM, parallelism="TP 2", num_gpus=2)
    assert two - now == pytest.approx(2.1 - 0.25 - 0.46, abs=0.05)
    assert gib(VLLM, notes="vLLM v0.19.0, max_num_seqs=64") < now - 1
    assert gib(VLLM, notes="vLLM 0.19, --max-num-seqs 64") == gib(VLLM, notes="vLLM v0.19.0, max_num_seqs=64")
    assert gib(VLLM, parallelism="tensor-parallel-size=2", num_gpus=2) == two
    assert gib(VLLM, parallelism="TP 1, DP 2", num_gpus=2) == now
    assert gib(VLLM, notes="vllm 0.8.5, VLLM_USE_V1=0") == gib(VLLM, notes="Dec 2024")


def test_vllm_s_cache_is_told_where_the_share_is() -> None:
    found = predict_serving(VLLM)
    assert isinstance(found, Prediction)
    room = 0.9 * 79.19 - found.gib
    assert found.detail["kv_cache_tokens"] == pytest.approx(room * 2**30 / 12288, rel=1e-3)
    half = predict_serving(VLLM | {"precision": "bfloat16; kv fp8"})
    assert isinstance(half, Prediction)
    assert half.detail["kv_cache_tokens"] == pytest.approx(2 * found.detail["kv_cache_tokens"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"hidden": 896}}, "config: layers, heads"),
        ({"precision": "ternary"}, "precision: 'ternary' is not known"),
        ({"peak_metric": None}, "no peak is given"),
        ({"peak_extra": {}, "notes": ""}, "lengths of prompt and answer"),
        ({"config": QWEN | {"n_params": 1000}}, "more than n_params"),
    ],
)
def test_a_row_not_known_in_full_is_skipped(changes: dict[str, Any], reason: str) -> None:
    found = predict_serving(GENERATE | changes)
    assert isinstance(found, Skipped)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "serve_tgi"}, "kind: 'serve_tgi'"),
        ({"notes": "SGLang v0.4.1"}, "SGLang: its rules"),
        ({"source": "ggml-org/llama.cpp"}, "llama.cpp: its rules"),
        ({"notes": "TensorRT-LLM 0.12"}, "TensorRT: its rules"),
        ({"peak_metric": "nvidia-smi"}, "peak_metric: 'nvidia-smi' counts more"),
        ({"offload": "cpu"}, "offload: what 'cpu'"),
        ({"num_gpus": 8, "parallelism": None}, "does not say how 8 cards"),
        ({"notes": "torch v2.6"}, "release of vLLM"),
        ({"notes": "vLLM 0.19 --enable-lora"}, "how much room adapters"),
        ({"precision": "bfloat16; weights bitsandbytes; kv auto"}, "precision: 'bfloat16; weights bitsand"),
        ({"precision": "bfloat16; weights compressed-tensors"}, "precision: 'bfloat16; weights compressed"),
        ({"precision": "mxfp4"}, "precision: 'mxfp4'"),
        ({"precision": "hqq 4-bit"}, "precision: 'hqq 4-bit'"),
        ({"precision": "bf16, kv int4"}, "a cache in 'kv int4'"),
    ],
)
def test_what_follows_other_rules_is_skipped(changes: dict[str, Any], reason: str) -> None:
    found = predict_serving(VLLM | changes)
    assert isinstance(found, Skipped), found
    assert reason in found.reason


def test_words_on_the_cache_are_not_those_on_the_weights() -> None:
    for told in ("bf16, fp8 KV cache", "bf16; kv int8", "bfloat16; kv-cache fp8_e5m2"):
        found = predict_serving(VLLM | {"precision": told})
        assert isinstance(found, Prediction)
        assert found.gib == gib(VLLM)
        assert found.detail == predict_serving(VLLM | {"precision": "bfloat16; kv fp8"}).detail  # type: ignore[union-attr]


def test_a_checkpoint_s_name_tells_the_format_of_compressed_tensors() -> None:
    told = {"precision": "bfloat16; weights compressed-tensors; kv auto"}
    by_name = {name: gib(VLLM, **told, source=name) for name in ("x-FP8-dynamic", "x-w4a16", "x-w8a8")}
    assert by_name["x-FP8-dynamic"] == by_name["x-w8a8"] == gib(VLLM, precision="int8")
    assert by_name["x-w4a16"] == gib(VLLM, precision="float16; weights gptq_marlin")


def test_beams_and_a_static_cache() -> None:
    found = predict_serving(GENERATE | {"notes": "transformers 4.46, num_beams=4"})
    assert found == Skipped("notes: beams and a quantised cache are not known")
    quantised = predict_serving(GENERATE | {"precision": "bf16; kv int8"})
    assert quantised == Skipped("precision: a quantised cache is not known")
    from_the_start = gib(GENERATE, notes="transformers 4.46, static cache")
    assert from_the_start == pytest.approx(gib(GENERATE) + 2048 * 12288 / 2**30, rel=0.01)


def test_a_card_without_a_size_is_skipped() -> None:
    found = predict_serving(VLLM | {"gpu": "a GPU"})
    assert found == Skipped("gpu: 'a GPU' does not say how much memory it has")


def test_parameters_beyond_the_decoder_count_as_weights() -> None:
    """Experts: a row gives their number in n_params alone."""
    more = QWEN | {"n_params": 2 * QWEN["n_params"]}
    assert gib(VLLM, config=more) - gib(VLLM) == pytest.approx(QWEN["n_params"] * 2 / 2**30, rel=0.03)


def test_a_token_goes_through_several_experts() -> None:
    """Two of them beside one take an inner state of 3 x 4864 more for each of 8192 tokens, on one card of two:
    there are no logits, and all other parameters stay the same."""
    config = QWEN | {"n_params": 3 * QWEN["n_params"]}
    pipeline = {"parallelism": "TP 1, PP 2", "num_gpus": 2}
    one, two = (gib(VLLM, config=config | {"experts_per_token": k}, **pipeline) for k in (1, 2))
    assert two - one == pytest.approx(8192 * 3 * 4864 * 2 / 2**30, abs=0.02)


def test_the_published_rows() -> None:
    """Median error at most 8%, nine of ten within 15%; nothing that was measured is looked at."""
    facts = os.environ.get("TUNESMITH_TEST_FACTS")
    if not facts:
        pytest.skip("needs $TUNESMITH_TEST_FACTS, a file of published facts")
    lines = Path(facts).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if str(row["kind"]).startswith("serve")]
    errors = []
    for row in rows:
        found = predict_serving(_blind(row))
        if isinstance(found, Prediction):
            assert found == predict_serving(row)
            errors.append(abs(found.gib / row["peak_gib"] - 1))
    errors.sort()
    assert len(errors) >= 0.9 * len(rows)
    assert statistics.median(errors) <= 0.02
    assert errors[int(0.9 * len(errors))] <= 0.05


def _blind(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its name and all that was measured."""
    blind = copy.deepcopy(row)
    for name in ("id", "peak_gib", "peak_as_published", "tokens_per_s"):
        blind.pop(name, None)
    settings = ("input_tokens", "generated_tokens", "gpu_memory_utilization")
    blind["peak_extra"] = {
        name: value for name, value in (row["peak_extra"] or {}).items() if name in settings
    }
    return blind
