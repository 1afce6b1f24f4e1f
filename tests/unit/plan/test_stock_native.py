"""torchtune's, LitGPT's and torchtitan's steps, against bytes counted by hand and published peaks."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.plan.facts_types import Prediction, Skipped, Unknown
from tunesmith.plan.stock_native import native_framework, native_peaks, parse_native, predict_native
from tunesmith.plan.stock_native_model import Decoder, Nf4Linear
from tunesmith.plan.stock_native_step import NativeStack, NativeStep
from tunesmith.plan.trace import Trace

PUBLISHED = os.environ.get("TUNESMITH_TEST_FACTS", "")
GIB = 1024**3
HIDDEN, WIDTH, VOCAB, LAYERS, HEADS = 256, 512, 1024, 3, 2
TOKENS = 2 * 64
PER_LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * WIDTH + 2 * HIDDEN
COUNT = LAYERS * PER_LAYER + 2 * VOCAB * HIDDEN + HIDDEN


def row(**changes: Any) -> dict[str, Any]:
    config = {
        "layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "kv_heads": HEADS, "head_dim": 128,
        "intermediate": WIDTH, "vocab": VOCAB, "tied_embeddings": False, "mlp": "gated", "norm": "rms",
        "norms_per_layer": 2, "qkv_bias": False, "qk_norm": False,
    }  # fmt: skip
    made = {
        "id": "mine", "kind": "train", "source": "pytorch/torchtune README", "config": config,
        "method": "full", "precision": "bf16 all", "optimizer": "AdamW", "seq_len": 64, "micro_batch": 2,
        "grad_accum": 1, "activation_checkpointing": "none", "offload": "none",
        "loss_impl": "chunked CE", "attention": "sdpa", "num_gpus": 1, "parallelism": "none",
        "gpu": "A100-80GB", "peak_metric": "torch active_bytes peak", "notes": "fused AdamW",
    }  # fmt: skip
    return made | changes


def stack(**changes: Any) -> NativeStack:
    given = row(**changes)
    framework = native_framework(given)
    assert framework is not None
    return parse_native(given, framework)


def saved_per_layer(given: NativeStack) -> float:
    """Bytes that one layer keeps between the passes."""

    def kept(layers: int) -> int:
        with FakeTensorMode(), Trace() as trace:
            NativeStep(given, layers).run(trace)
        return trace.timeline.peaks()["forward", ""].parts["activations"]

    return kept(4) - kept(3)


# Of attention one fp32 sum a token and head; of a norm one fp32 factor a token.
SMALL = TOKENS * 4 * HEADS


def test_what_an_eager_layer_keeps() -> None:
    """Two norms: x in fp32, normed, scaled (4 + 2 + 2); q, k, v, out; gate, up, silu, product; 2 factors."""
    by_hand = TOKENS * (2 * 8 * HIDDEN + 4 * 2 * HIDDEN + 4 * 2 * WIDTH + 2 * 4) + SMALL
    assert saved_per_layer(stack(notes="fused AdamW; no compile")) == by_hand


def test_what_a_compiled_layer_keeps() -> None:
    """Inputs of norms and products once, in 16 bits: no fp32 copies, no result of silu."""
    by_hand = TOKENS * (2 * 4 * HIDDEN + 4 * 2 * HIDDEN + 3 * 2 * WIDTH + 2 * 4) + SMALL
    assert saved_per_layer(stack(notes="fused AdamW; torch.compile")) == by_hand


def test_a_checkpointed_layer_keeps_its_input_and_an_offloaded_one_nothing() -> None:
    assert saved_per_layer(stack(activation_checkpointing="full")) == TOKENS * 2 * HIDDEN
    offloaded = stack(activation_checkpointing="full + activation offload to CPU")
    assert saved_per_layer(offloaded) == 0
    assert native_peaks(offloaded).bytes_in("pinned") >= LAYERS * TOKENS * 2 * HIDDEN


def test_every_second_product_is_kept_and_of_a_compiled_layer_not_the_last() -> None:
    """Input; first, third, fifth, seventh product (query, value, gate, down); attention's result and sums."""
    titan = row(source="pytorch/torchtitan 202412", loss_impl="CE", activation_checkpointing="selective")
    by_hand = TOKENS * 2 * (4 * HIDDEN + WIDTH + HIDDEN) + SMALL

    def kept(notes: str) -> int:
        def living(layers: int) -> int:
            given = parse_native(titan | {"notes": notes}, "torchtitan")
            with FakeTensorMode(), Trace() as trace:
                NativeStep(given, layers).run(trace)
            return trace.timeline.peaks()["forward", "layer -1"].num_bytes

        return living(5) - living(4) - 6 * PER_LAYER  # weights and two states of the layer

    assert kept("") == by_hand
    assert kept("compile") == by_hand - TOKENS * 2 * HIDDEN


@pytest.mark.parametrize(("optimizer", "per_weight"), [("fused", 4.0), ("8bit", 2.03125), ("4bit", 1.0625)])
def test_states_of_an_optimizer(optimizer: str, per_weight: float) -> None:
    """8 bits and fp32 a block of 256; 4 bits and fp32 a block of 128; twice. Norms' states stay 16 bits."""
    states = native_peaks(replace(stack(), optimizer=optimizer)).peak.parts["optimizer state"]  # type: ignore[arg-type]
    norms = (2 * LAYERS + 1) * HIDDEN
    assert states == pytest.approx(per_weight * (COUNT - norms) + 4 * norms, rel=0.001)


def test_paged_states_are_not_torchs_and_foreach_takes_roots() -> None:
    """Below 100,000 weights states are not paged: here those of attention and norms."""
    paged = native_peaks(stack(optimizer="PagedAdamW8bit (bitsandbytes)")).peak
    small = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN) + HIDDEN
    assert paged.parts["optimizer state"] == 4 * small
    fused, foreach = (native_peaks(replace(stack(), optimizer=name)) for name in ("fused", "foreach"))
    roots = foreach.device["update", ""].num_bytes - fused.device["update", ""].num_bytes
    assert roots == pytest.approx(2 * COUNT, rel=0.001)


def test_an_optimizer_in_the_backward_pass_never_sees_all_gradients() -> None:
    at_once = native_peaks(stack(optimizer="AdamW, optimizer fused in backward")).device["update", ""]
    assert "gradients" not in at_once.parts
    assert native_peaks(stack()).device["update", ""].parts["gradients"] == 2 * COUNT


def test_four_bits_a_weight_and_its_scales() -> None:
    """2^16 weights: 2^15 bytes; scales of 1024 blocks, in fp32, or in 8 bits with 4 in fp32."""
    style = stack(method="qlora", lora_rank=8, lora_targets=["q_proj"]).style
    for double, expected in ((True, 32768 + 1024 + 4 * 4), (False, 32768 + 4 * 1024)):
        layer = Nf4Linear(256, 256, bias=False, style=replace(style, double_quant=double))
        assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == expected


def test_adapters_alone_are_trained() -> None:
    """LitGPT's fused input with rank 4 on query and value: 2 x 4 x D down, 2 x D x 4 up, a layer."""
    lora = row(source="litgpt", method="lora", lora_rank=4, lora_targets=["query", "value"])
    given = parse_native(lora, "litgpt")
    assert given.style.dropout == 0.05
    with torch.device("meta"):
        model = Decoder(given.shape, given.style, 2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 16 * HIDDEN


def test_processes_that_share_a_sequence_have_a_part_of_it_each() -> None:
    titan = row(source="torchtitan", loss_impl="CE", num_gpus=4, parallelism="FSDP2 2, CP 2")
    given = parse_native(titan, "torchtitan")
    assert given.length == 32
    assert given.sharding is not None and given.sharding.ranks == 4 and given.metric == "reserved"


def test_a_launcher_of_2025_compiles_the_loss_and_lets_segments_grow() -> None:
    told = {"loss_impl": "CE (compiled)", "num_gpus": 8, "parallelism": "FSDP2 8", "precision": "bf16"}
    old = parse_native(row(source="torchtitan benchmarks/h100_202412", **told), "torchtitan")
    new = parse_native(row(source="torchtitan benchmarks/h100_202506", **told), "torchtitan")
    assert (old.compiled_loss, old.expandable) == (False, False)
    assert (new.compiled_loss, new.expandable) == (True, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"confidence": "X"}, "impossible"),
        ({"seq_len": None}, "seq_len"),
        ({"notes": "seq_len is only an upper bound"}, "longest batch"),
        ({"activation_checkpointing": None}, "checkpointing"),
        ({"optimizer": None}, "optimizer"),
        ({"loss_impl": None}, "loss"),
        ({"method": "dora"}, "DoRA"),
        ({"optimizer": "galore_adamw"}, "galore"),
        ({"optimizer": None}, "optimizer is not told"),
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "bf16-mixed"}, "mixed"),
        ({"peak_metric": "psutil RSS"}, "RSS"),
        ({"method": "lora", "lora_rank": 8}, "adapters"),
        ({"offload": "weights to CPU"}, "offload"),
        ({"peak_metric": "nvidia-smi"}, "nvidia-smi"),
        ({"num_gpus": 8, "parallelism": "FSDP2 4, TP 2"}, "TP 2"),
    ],
)
def test_what_is_not_told_or_not_traced_is_skipped(changes: dict[str, Any], reason: str) -> None:
    answer = predict_native(row(**changes))
    assert isinstance(answer, Skipped)
    assert reason in answer.reason
    with pytest.raises(Unknown, match=reason):
        parse_native(row(**changes), "torchtune")


def test_rows_of_other_trainers_are_left_to_others() -> None:
    assert predict_native(row(source="a Trainer's benchmark")) is None
    assert predict_native(row(kind="serve_hf")) is None


@pytest.mark.skipif(not PUBLISHED, reason="TUNESMITH_TEST_FACTS names no file of published rows")
@pytest.mark.parametrize(
    "name",
    ["torchtune-3.2-3B-packed", "torchtune-3.2-3B-chunkedCE", "litgpt2023-Llama-2-7B-lora-mb2-g1"],
)
def test_published_peaks(name: str) -> None:
    rows = map(json.loads, Path(PUBLISHED).read_text("utf-8").splitlines())
    given = next(each for each in rows if each["id"] == name)
    answer = predict_native(given)
    assert isinstance(answer, Prediction)
    assert answer.gib == pytest.approx(given["peak_gib"], rel=0.02)
