"""Trainings on several GPUs, against hand-computed shares and against published peaks."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.plan.facts_types import Prediction, Skipped
from tunesmith.plan.stock import predict_stock
from tunesmith.plan.stock_sharded import parse_sharded, predict_sharded, sharded_peaks
from tunesmith.plan.stock_sharded_fsdp import ShardedModel, Sharding, reserved_bytes
from tunesmith.plan.timeline import Record, Timeline
from tunesmith.plan.trace import Trace

PUBLISHED = os.environ.get("TUNESMITH_TEST_FACTS", "")
GIB = 1024**3
HIDDEN, WIDTH, VOCAB, LAYERS = 512, 1024, 1024, 6
PER_LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * WIDTH + 2 * HIDDEN
ROOT = 2 * VOCAB * HIDDEN + HIDDEN
COUNT = LAYERS * PER_LAYER + ROOT
# cuBLAS keeps two workspaces of 8.125 MiB on an A100.
WORKSPACE = 2 * 8_519_680


def row(**changes: Any) -> dict[str, Any]:
    config = {
        "layers": LAYERS, "hidden": HIDDEN, "heads": 4, "kv_heads": 4, "head_dim": 128,
        "intermediate": WIDTH, "vocab": VOCAB, "tied_embeddings": False, "mlp": "gated", "norm": "rms",
        "norms_per_layer": 2, "qkv_bias": False, "qk_norm": False, "n_params": COUNT,
    }  # fmt: skip
    made = {
        "id": "mine", "kind": "train", "source": "a benchmark", "config": config, "method": "full",
        "precision": "bf16 weights; no autocast (pure bf16)", "optimizer": "adamw_torch", "seq_len": 16,
        "micro_batch": 1, "grad_accum": 1, "activation_checkpointing": "full", "offload": "none",
        "loss_impl": "HF default CE", "attention": "flash_attention_2", "num_gpus": 2,
        "parallelism": "FSDP1 FULL_SHARD", "gpu": "A100-80GB", "peak_metric": "max_memory_allocated",
        "notes": "torch 2.4.1, transformers 4.48.1",
    }  # fmt: skip
    return made | changes


def predicted(given: dict[str, Any]) -> float:
    answer = predict_sharded(given)
    assert isinstance(answer, Prediction), answer
    return answer.gib * GIB


def test_the_update_of_half_a_model_holds_five_times_its_half() -> None:
    """Weights, gradients, two averages, and the roots of one of them: 2 bytes each of COUNT / 2."""
    assert predicted(row()) - WORKSPACE == pytest.approx(5 * 2 * COUNT / 2, rel=0.02)


def test_parts_in_fp32_take_twice_that() -> None:
    precision = "bf16 weights; bf16 autocast on; FSDP upcasts flat params to fp32"
    assert predicted(row(precision=precision)) - WORKSPACE == pytest.approx(5 * 4 * COUNT / 2, rel=0.02)


def test_each_of_four_processes_holds_a_quarter() -> None:
    stack, sharding = parse_sharded(row(num_gpus=4))
    update = sharded_peaks(stack, sharding, exact=True).device["update", ""]
    assert update.parts["optimizer state"] == pytest.approx(2 * 2 * COUNT / 4, rel=0.001)
    assert update.parts["gradients"] == pytest.approx(2 * COUNT / 4, rel=0.001)


def test_ddp_holds_buckets_as_large_as_the_gradients() -> None:
    alone = predict_stock(row(num_gpus=1, parallelism="none"))
    assert isinstance(alone, Prediction)
    assert predicted(row(parallelism="DDP")) - alone.gib * GIB == pytest.approx(2 * COUNT, rel=0.001)


def test_earlier_micro_batches_leave_whole_gradients() -> None:
    """FSDP sums gradients over the processes with the last micro-batch only: 2 bytes each until then."""
    stack, sharding = parse_sharded(row(grad_accum=4))
    assert sharding is not None and sharding.accumulates
    forward = sharded_peaks(stack, sharding, exact=True).device["forward", ""]
    assert forward.parts["gradients"] == pytest.approx(2 * COUNT, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallelism": "ZeRO-3"}, "ZeRO-3"),
        ({"parallelism": "FSDP2 4, TP 2"}, "TP 2"),
        ({"parallelism": None}, "is not told"),
        ({"parallelism": "FSDP1 SHARD_GRAD_OP"}, "GRAD_OP"),
        ({"offload": "optimizer to CPU"}, "offload"),
        ({"peak_metric": "sum of nvidia-smi over all GPUs"}, "metric"),
        ({"source": "InternLM/xtuner docs"}, "XTuner"),
        ({"micro_batch": None}, "micro_batch"),
        ({"config": row()["config"] | {"n_params": 2 * COUNT}}, "parameters"),
    ],
)
def test_what_is_not_traced_is_skipped_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    answer = predict_sharded(row(**changes))
    assert isinstance(answer, Skipped)
    assert reason in answer.reason


def test_rows_of_one_gpu_and_of_no_training_are_left_to_others() -> None:
    assert predict_sharded(row(num_gpus=1)) is None
    assert predict_sharded(row(kind="serve_hf")) is None


class Toy(nn.Module):
    """Three layers of 64 x 64 behind an embedding of 32 x 64, all of 2 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


TOY_LAYER, TOY_ROOT = 64 * 64 * 2, 32 * 64 * 2


def traced(sharding: Sharding) -> tuple[Timeline, ShardedModel]:
    with FakeTensorMode(), Trace() as trace:
        model = Toy()
        shared = ShardedModel(trace, model, list(model.layers), sharding)
        trace.watch(model, 0, list(model.layers))
        trace.at("forward")
        shared.begin()
        loss = model(torch.zeros(1, 1, dtype=torch.int64)).sum()
        trace.at("backward", "loss")
        shared.turn()
        loss.backward()
        shared.finish()
        trace.at("update")
    return trace.timeline, shared


def fsdp(kind: str, **more: Any) -> Sharding:
    return Sharding(kind=kind, ranks=4, stored=None, reduced=None, **more)  # type: ignore[arg-type]


def test_a_quarter_of_the_weights_and_gradients_stays() -> None:
    timeline, shared = traced(fsdp("fsdp1"))
    parts = timeline.peaks()["update", ""].parts
    assert parts["weights"] == parts["gradients"] == (3 * TOY_LAYER + TOY_ROOT) // 4
    assert [part.numel() for part in shared.parts] == [1024, 1024, 1024, 512]


def test_one_layer_is_gathered_forward_and_the_one_before_it_backward() -> None:
    peaks = traced(fsdp("fsdp1"))[0].peaks()
    assert peaks["forward", "layer 1"].parts["communication"] == TOY_ROOT + TOY_LAYER
    # The last layer is there while the loss goes back; with its gradient the layer before it comes too.
    assert peaks["backward", "loss"].parts["communication"] == TOY_ROOT + 2 * TOY_LAYER


def test_fsdp2_gathers_flat_and_copies_out() -> None:
    peaks = traced(fsdp("fsdp2"))[0].peaks()
    assert peaks["forward", "layer 1"].parts["communication"] == TOY_ROOT + 2 * TOY_LAYER
    assert fsdp("fsdp2", keeps_last=True).keeps_last
    kept = traced(fsdp("fsdp2", keeps_last=True))[0].peaks()
    assert (
        kept["forward", ""].parts["communication"] > peaks["forward", ""].parts["communication"] - TOY_LAYER
    )


def test_gradients_are_summed_in_the_format_that_is_asked_for() -> None:
    sharding = Sharding(kind="fsdp2", ranks=4, stored=torch.float32, reduced=torch.float32)
    _, shared = traced(sharding)
    assert {part.dtype for part in shared.parts} == {torch.float32}
    assert all(part.grad is not None and part.grad.shape == part.shape for part in shared.parts)


def test_blocks_of_collectives_are_not_shared() -> None:
    """Two tensors of 32 MiB one after the other: one block of one stream, or two of two."""
    num_bytes = 32 * 1024**2

    def records(maker: str) -> Timeline:
        first = Record(num_bytes, 1, 2, "temporaries", "forward", "", "mm")
        second = Record(num_bytes, 3, 4, "communication", "forward", "", maker)
        return Timeline([first, second], [])

    assert reserved_bytes(records("mm")) == num_bytes
    assert reserved_bytes(records("a collective")) == 2 * num_bytes


@pytest.mark.skipif(not PUBLISHED, reason="TUNESMITH_TEST_FACTS names no file of published rows")
@pytest.mark.parametrize("name", ["fms-077", "fmsl-065"])
def test_published_peaks_of_fsdp(name: str) -> None:
    """IBM's measurements on A100s: QLoRA on 2 with transformers' loss, full on 4 with Triton's."""
    rows = map(json.loads, Path(PUBLISHED).read_text("utf-8").splitlines())
    given = next(each for each in rows if each["id"] == name)
    assert predicted(given) / GIB == pytest.approx(given["peak_gib"], rel=0.02)
