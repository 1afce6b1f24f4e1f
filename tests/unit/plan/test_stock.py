"""Peaks of the Hugging Face Trainer's step, beside figures worked out by hand."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.plan.test_stack import SHAPE, make_row
from tunesmith.plan.facts_rows import read_rows
from tunesmith.plan.facts_types import Prediction, Skipped
from tunesmith.plan.memory import Peaks, trace_step
from tunesmith.plan.stack import Stack, parse_stack
from tunesmith.plan.stock import predict_stock
from tunesmith.plan.stock_step import StockStep

PUBLISHED = os.environ.get("TUNESMITH_TEST_FACTS", "")
# Two embeddings of 1000 x 256; a layer's q, k, v, o and MLP, two norms; the last norm.
LAYER = 256 * (256 + 64 + 64 + 256) + 3 * 256 * 512 + 2 * 256
PARAMETERS = 2 * 1000 * 256 + 4 * LAYER + 256
WORKSPACE = 17_039_360
NF4: dict[str, Any] = {
    "method": "qlora",
    "precision": "bf16 weights, nf4 base; no autocast",
    "notes": "transformers 4.48.1, no kbit",
}


def peaks(exact: bool = True, **changed: Any) -> Peaks:
    stack = parse_stack(make_row(**changed))
    return trace_step(lambda layers: StockStep(stack, layers), stack.shape.layers, exact=exact, device="cuda")


def peak(**changed: Any) -> int:
    return peaks(**changed).peak.num_bytes


def test_a_full_training_of_few_tokens_is_bound_by_the_update() -> None:
    found = peaks(method="full", seq_len=16, micro_batch=1)
    # Weights, gradients, two averages, and the roots of one of them, all of 2 bytes.
    assert found.peak.phase == "update"
    assert found.peak.num_bytes == pytest.approx(5 * 2 * PARAMETERS + WORKSPACE, rel=1e-3)


def test_the_fused_optimizer_needs_no_roots_and_old_torch_a_second_list() -> None:
    few: dict[str, Any] = {"method": "full", "seq_len": 16, "micro_batch": 1}
    update = {
        name: peaks(**few, **changed).device[("update", "")].num_bytes
        for name, changed in {
            "foreach": {},
            "fused": {"optimizer": "adamw_torch_fused"},
            "old": {"notes": "torch 2.0.1, transformers 4.48.1"},
        }.items()
    }
    assert update["foreach"] - update["fused"] == pytest.approx(2 * PARAMETERS, rel=1e-3)
    assert update["old"] - update["foreach"] == pytest.approx(2 * PARAMETERS, rel=1e-3)


WIDE: dict[str, Any] = {"config": SHAPE | {"vocab": 20_000}, "seq_len": 256}
LOGITS = 2 * 256 * 20_000


@pytest.mark.parametrize(
    ("changed", "per_logit"),
    [
        # 16-bit logits, their fp32 copy, the copy without the last, and its softmax.
        ({}, 14),
        # The kernel overwrites the last copy.
        ({"loss_impl": "triton fast CE"}, 10),
        # Nothing holds the 16-bit logits.
        ({"loss_impl": "triton fast CE", "notes": "transformers 4.45.2"}, 8),
        # Since 4.51 the labels are moved instead of the logits.
        ({"loss_impl": "triton fast CE", "notes": "transformers 4.52.4"}, 6),
    ],
)
def test_bytes_of_a_logit_at_the_end_of_the_forward_pass(changed: dict[str, Any], per_logit: int) -> None:
    found = peaks(**WIDE, **changed).device[("forward", "")]
    assert found.parts["logits and loss"] / LOGITS == pytest.approx(per_logit, rel=0.02)


def test_what_comes_after_the_loss_counts() -> None:
    notes: dict[str, Any] = {"notes": "transformers 4.52.4, trl 0.17", "precision": "bf16 weights, autocast"}
    found = peaks(**WIDE, **notes).device[("forward", "")]
    # The logits as cast for the caller, and a copy of them, beside the softmax of the loss.
    assert found.parts["logits and loss"] / LOGITS == pytest.approx(4 + 4 + 4, rel=0.02)


def test_the_fused_linear_loss_never_has_all_logits() -> None:
    found = peaks(**WIDE, loss_impl="liger fused linear CE")
    assert all(moment.parts.get("logits and loss", 0) < LOGITS for moment in found.device.values())


def test_a_base_of_four_bits_by_its_parts() -> None:
    linear = 4 * (LAYER - 2 * 256)
    plain = peaks(**NF4).device[("load", "")].parts["quantised weights"]
    double = peaks(**NF4 | {"precision": "bf16 weights, nf4, double quant; no autocast"})
    assert plain == linear // 2 + 4 * linear // 64
    nested = double.device[("load", "")].parts["quantised weights"]
    # One byte a block of 64 and four a block of 256 of those, in whole blocks of 512 bytes.
    assert nested == pytest.approx(linear // 2 + linear // 64 + 4 * linear // 64 // 256, rel=0.02)


def test_preparation_casts_norms_and_embeddings() -> None:
    def weights(notes: str) -> int:
        return peaks(**NF4 | {"notes": notes}).device[("load", "")].parts["weights"]

    none, norms, all_of_them = (
        weights("no kbit"),
        weights("trl 0.13, prepare_model_for_kbit_training"),
        weights("prepare_model_for_kbit_training"),
    )
    assert norms - none == 2 * 9 * 256
    assert all_of_them - norms == 2 * 2 * 1000 * 256


def test_a_layer_of_four_bits_is_whole_for_a_moment() -> None:
    found = peaks(**NF4)
    assert found.timeline is not None
    made = [r for r in found.timeline.records if "[512, 256]" in r.maker and r.num_bytes == 2 * 512 * 256]
    # gate and up of four layers: forward, recomputed, backward.
    assert len(made) == 2 * 4 * 3 and all(r.freed is not None for r in made)


def test_checkpointing_keeps_one_hidden_state_a_layer() -> None:
    assert peak(activation_checkpointing="none", seq_len=512) > 1.5 * peak(seq_len=512)


def test_dropout_of_adapters_keeps_masks() -> None:
    with_dropout = peak(notes="transformers 4.48.1, lora_dropout 0.1", activation_checkpointing="none")
    assert with_dropout > peak(activation_checkpointing="none")


def test_paged_and_eight_bit_states() -> None:
    few: dict[str, Any] = {"method": "full", "seq_len": 16, "micro_batch": 1}

    def state(name: str) -> int:
        moments = peaks(**few, optimizer=name).device
        return moments[("update", "")].parts.get("optimizer state", 0)

    assert state("adamw_bnb_8bit") == pytest.approx(2 * PARAMETERS * (1 + 4 / 256), rel=0.01)
    # Tensors of 100 000 weights and more: embeddings and the MLP.
    assert state("paged_adamw_8bit") < 0.3 * state("adamw_bnb_8bit")


@pytest.mark.parametrize(
    ("shape", "targets", "notes"),
    [
        ({"qkv_bias": True}, ["q_proj"], "transformers 4.48.1"),
        ({"qk_norm": True, "tied_embeddings": True}, ["q_proj"], "transformers 4.52"),
        ({"hf_id": "ibm-granite/granite-3.1-8b-base"}, ["q_proj"], "transformers 4.48.1"),
        ({"norms_per_layer": 4, "tied_embeddings": True}, ["q_proj"], "transformers 4.48.1"),
        (
            {"mlp": "2-matmul", "norm": "ln", "norms_per_layer": 1, "qkv_bias": True},
            ["fc1"],
            "transformers 4.48",
        ),
        ({"mlp": "2-matmul", "norm": "ln", "qkv_bias": True}, ["q_proj"], "transformers 4.48"),
        ({"mlp": "2-matmul", "norm": "ln", "kv_heads": 1}, ["c_attn"], "transformers 4.48, foak"),
    ],
)
def test_shapes_of_many_models(shape: dict[str, Any], targets: Any, notes: str) -> None:
    config = SHAPE | {"hf_id": "", "layers": 6} | shape
    changed: dict[str, Any] = {
        "config": config,
        "lora_targets": targets,
        "notes": notes,
        "precision": "bf16 weights; autocast",
    }
    whole, carried = peaks(**changed), peaks(exact=False, **changed)
    # Carried on from four and five layers to six, every moment is that of the whole trace.
    assert carried.peak.num_bytes == whole.peak.num_bytes
    assert carried.peak.phase == whole.peak.phase


def test_embeddings_that_are_trained_beside_adapters_are_copies() -> None:
    plain, saved = peaks(), peaks(notes="transformers 4.48.1, embeddings by modules_to_save")
    start, end = ("load", ""), ("update", "")
    assert saved.device[start].parts["weights"] - plain.device[start].parts["weights"] == 2 * 2 * 1000 * 256
    more = saved.device[end].parts["gradients"] - plain.device[end].parts["gradients"]
    assert more == 2 * 2 * 1000 * 256


@pytest.mark.parametrize("attention", ["eager", "sdpa", "xformers"])
def test_attention_of_other_kinds(attention: str) -> None:
    changed: dict[str, Any] = {
        "attention": attention,
        "gpu": "Tesla T4",
        "precision": "fp16 weights, AMP",
        "seq_len": 512,
    }
    found = peaks(**changed)
    scores = 2 * 8 * 512 * 512
    assert found.timeline is not None
    squares = [r for r in found.timeline.records if "512, 512]" in r.maker and r.num_bytes >= 2 * scores]
    assert bool(squares) == (attention == "eager")


def test_the_model_must_have_the_published_number_of_parameters() -> None:
    told = SHAPE | {"n_params": PARAMETERS}
    assert isinstance(predict_stock(make_row(config=told)), Prediction)
    answer = predict_stock(make_row(config=told | {"n_params": 2 * PARAMETERS}))
    assert isinstance(answer, Skipped) and f"{PARAMETERS:,} parameters" in answer.reason


def test_rows_that_are_no_training_are_left_to_others() -> None:
    assert predict_stock(make_row(kind="serve_hf")) is None


def test_a_whole_process_needs_more_than_its_tensors() -> None:
    found = {
        metric: predict_stock(make_row(peak_metric=metric))
        for metric in ("max_memory_allocated", "max_memory_reserved", "nvidia-smi, whole process")
    }
    gib = [answer.gib for answer in found.values() if isinstance(answer, Prediction)]
    assert len(gib) == 3 and gib == sorted(gib) and gib[2] > gib[1] + 0.1


def test_adapters_on_no_layer_are_refused() -> None:
    answer = predict_stock(make_row(lora_targets=["query_key_value"]))
    assert isinstance(answer, Skipped) and "query_key_value" in answer.reason


def test_stacks_are_compared_by_value() -> None:
    stack: Stack = parse_stack(make_row())
    assert dataclasses.replace(stack) == stack and hash(dataclasses.replace(stack)) == hash(stack)


@pytest.mark.skipif(not PUBLISHED, reason="TUNESMITH_TEST_FACTS names no file of published rows")
@pytest.mark.parametrize("name", ["fms-038", "fms-058", "fms-074", "fmsl-013", "fmsl-023"])
def test_published_peaks_of_one_gpu_are_met(name: str) -> None:
    row = next(row for row in read_rows(Path(PUBLISHED)) if row["id"] == name)
    answer = predict_stock(row)
    assert isinstance(answer, Prediction) and answer.gib == pytest.approx(row["peak_gib"], rel=0.005)
