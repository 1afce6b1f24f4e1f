"""What a row's texts mean."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.plan.facts_shape import parse_shape
from tunesmith.plan.facts_types import Unknown
from tunesmith.plan.stack import parse_stack, version, workspace_bytes
from tunesmith.plan.stock_words import linear_names, optimizer_kind

SHAPE = {
    "hf_id": "meta-llama/Some-Llama",
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 512,
    "vocab": 1000,
    "tied_embeddings": False,
    "mlp": "gated",
    "norm": "rms",
    "norms_per_layer": 2,
}


def make_row(**changed: Any) -> dict[str, Any]:
    """A LoRA training of a small Llama by the Trainer of transformers 4.48."""
    row = {
        "id": "row",
        "kind": "train",
        "source": "somebody's table",
        "config": SHAPE,
        "method": "lora",
        "lora_rank": 8,
        "lora_targets": ["q_proj", "v_proj"],
        "precision": "bf16 weights; no autocast",
        "optimizer": "adamw_torch",
        "seq_len": 128,
        "micro_batch": 2,
        "grad_accum": 1,
        "packing": True,
        "activation_checkpointing": "full",
        "loss_impl": "HF default CE, logits materialised",
        "attention": "flash_attention_2",
        "offload": "none",
        "num_gpus": 1,
        "parallelism": "none",
        "gpu": "A100-80GB",
        "outcome": "ok",
        "peak_gib": 1.0,
        "peak_metric": "torch max_memory_allocated",
        "notes": "torch 2.4.1, transformers 4.48.1, peft 0.13.2",
    }
    return row | changed


def test_a_row_of_the_trainer() -> None:
    stack = parse_stack(make_row())
    assert (stack.method, stack.rank, stack.targets) == ("lora", 8, ("q_proj", "v_proj"))
    assert (stack.weights, stack.autocast, stack.adapters, stack.compute) == ("bf16", None, "fp32", "bf16")
    assert stack.tokens == 256 and stack.checkpointing and stack.loss == "stock"
    assert stack.held_logits and stack.shifted and not stack.repeats_keys


@pytest.mark.parametrize(
    ("notes", "held", "shifted"),
    [
        ("transformers 4.45.2", False, True),
        ("transformers 4.46.0", True, True),
        ("transformers 4.51.3", True, False),
        ("transformers 5.13", True, False),
        ("nothing told", False, True),
    ],
)
def test_the_loss_copies_logits_by_its_version(notes: str, held: bool, shifted: bool) -> None:
    stack = parse_stack(make_row(notes=notes))
    assert (stack.held_logits, stack.shifted) == (held, shifted)


def test_trl_counts_hits_since_0_16() -> None:
    assert parse_stack(make_row(notes="transformers 4.51, trl 0.16.1")).counts_hits
    assert not parse_stack(make_row(notes="transformers 4.48.1, trl 0.13.0")).counts_hits


def test_a_base_of_gptq_is_never_cast() -> None:
    stack = parse_stack(make_row(method="qlora", precision="fp16, GPTQ int4 base", notes="trl 0.13"))
    assert (stack.base, stack.upcast, stack.weights) == ("gptq", "none", "fp16")


def test_autocast_of_adapters_and_of_a_whole_model() -> None:
    with pytest.raises(Unknown, match="loaded weights"):
        parse_stack(make_row(precision="bf16 AMP"))
    assert parse_stack(make_row(precision="bf16 AMP", source="modelscope/ms-swift")).weights == "bf16"
    full = parse_stack(make_row(precision="bf16 AMP", method="full"))
    assert (full.weights, full.autocast, full.fp32_outputs) == ("fp32", "bf16", True)


@pytest.mark.parametrize(
    ("precision", "notes", "upcast", "double"),
    [
        ("bf16, nf4 base", "prepare_model_for_kbit_training, trl 0.13", "norms", False),
        ("bf16, nf4 base, double quant", "prepare_model_for_kbit_training", "all", True),
        ("bf16, nf4 base", "skips prepare_model_for_kbit_training upcasts", "none", False),
        ("fp16, nf4 base, double_quant", "trl 0.13", "all", True),
    ],
)
def test_how_a_base_of_four_bits_is_prepared(precision: str, notes: str, upcast: str, double: bool) -> None:
    stack = parse_stack(make_row(method="qlora", precision=precision, notes=notes))
    assert (stack.base, stack.upcast, stack.double_quant) == ("nf4", upcast, double)


@pytest.mark.parametrize(
    ("name", "kind", "bits", "paged"),
    [
        ("adamw_torch", "adamw", 32, False),
        ("adamw_torch_fused", "adamw-fused", 32, False),
        ("adamw_bnb_8bit", "bnb", 8, False),
        ("paged_adamw_32bit", "bnb", 32, True),
        ("PagedAdamW8bit (bitsandbytes)", "bnb", 8, True),
    ],
)
def test_optimizers(name: str, kind: str, bits: int, paged: bool) -> None:
    stack = parse_stack(make_row(optimizer=name))
    assert (stack.optimizer, stack.state_bits, stack.paged) == (kind, bits, paged)


def test_attention_of_a_card_before_ampere_is_no_flash() -> None:
    assert parse_stack(make_row(attention="sdpa", gpu="Tesla T4")).attention == "efficient"
    assert parse_stack(make_row(attention="sdpa", gpu="L40S-48GB")).attention == "flash"


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"method": "dpo"}, "method"),
        ({"lora_rank": None}, "lora_rank"),
        ({"lora_targets": None}, "adapters"),
        ({"micro_batch": "4"}, "micro_batch"),
        ({"seq_len": 0}, "seq_len"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"optimizer": "AdamW (DeepSpeed)"}, "DeepSpeed"),
        ({"source": "unslothai/unsloth README"}, "unsloth"),
        ({"precision": "bf16, DeepSpeed ZeRO-2 wrapper"}, "DeepSpeed"),
        ({"optimizer": "galore_adamw_8bit"}, "galore"),
        ({"notes": "torch.compile on"}, "compiled"),
        ({"activation_checkpointing": "selective"}, "checkpointing"),
        ({"loss_impl": "chunked CE"}, "loss"),
        ({"attention": "ring"}, "attention"),
        ({"num_gpus": 2}, "2 GPUs"),
        ({"offload": "cpu"}, "offload"),
        ({"notes": "seq_len is an upper bound"}, "longest batch"),
        ({"peak_metric": "not stated"}, "measured"),
        ({"peak_metric": "max_memory_reserved", "packing": False}, "reserved"),
        ({"method": "qlora", "notes": "", "precision": "bf16, nf4"}, "prepared"),
        ({"config": SHAPE | {"mlp": None, "hf_id": "somebody/model"}}, "gated"),
        ({"config": SHAPE | {"layers": None}}, "layers"),
        ({"config": SHAPE | {"num_experts": 8}}, "experts"),
        ({"precision": "bf16 weights", "notes": "rank-32 DoRA"}, "DoRA"),
        ({"precision": "int3"}, "format of the weights"),
        ({"method": "dora"}, "DoRA"),
        ({"method": "qlora", "precision": "fp16, int8 base"}, "int8"),
        ({"method": "full", "precision": "bf16"}, "format or that of the products"),
        ({"source": "Lightning-AI/lit-llama"}, "lit-llama"),
        ({"peak_metric": "psutil RSS"}, "host memory"),
        ({"peak_metric": "nvidia-smi", "packing": None}, "changing lengths"),
        ({"loss_impl": None, "notes": "nothing"}, "loss is not told"),
        ({"attention": None, "notes": "nothing"}, "attention is not told"),
        ({"optimizer": None}, "optimizer is not told"),
        ({"activation_checkpointing": None}, "checkpointed"),
        ({"seq_len": 10**13}, "no GPU holds"),
        ({"config": SHAPE | {"kv_heads": 3}}, "share 3 key heads"),
    ],
)
def test_what_is_not_told_is_named(changed: dict[str, Any], missing: str) -> None:
    with pytest.raises(Unknown, match=missing):
        parse_stack(make_row(**changed))


def test_names_of_other_implementations() -> None:
    row = make_row(lora_targets=["c_attn", "c_proj", "w1", "w2"])
    assert set(parse_stack(row).targets) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert "k_proj" in parse_stack(make_row(lora_targets="all-linear")).targets


def test_ids_decide_nothing() -> None:
    assert parse_stack(make_row(id="llama-rank32-dora-8bit-unsloth")) == parse_stack(make_row())


def test_a_base_of_four_bits_makes_it_qlora() -> None:
    row = make_row(precision="bf16 autocast, nf4 base", notes="prepare_model_for_kbit_training")
    assert parse_stack(row).base == "nf4"


@pytest.mark.parametrize("source", ["hiyouga/LLaMA-Factory wiki", "axolotl-ai-cloud/axolotl README"])
def test_programs_that_leave_norms_as_they_are(source: str) -> None:
    stack = parse_stack(make_row(source=source, method="qlora", precision="bf16 AMP, 4-bit base"))
    assert (stack.upcast, stack.weights, stack.autocast) == ("none", "bf16", "bf16")


def test_the_script_of_qwens_first_generation() -> None:
    told = {"precision": "bf16 AMP", "peak_metric": "not stated", "packing": False, "notes": "torch 2.0"}
    stack = parse_stack(make_row(source='QwenLM/Qwen README.md "Profiling"', **told))
    assert (stack.weights, stack.adapters, stack.dropout, stack.metric) == ("bf16", "bf16", 0.05, "process")
    assert stack.held_logits and stack.shifted and not stack.upcast_logits
    with pytest.raises(Unknown, match="loaded weights"):
        parse_stack(make_row(source="QwenLM/Qwen2.5 docs", **told))


def test_what_the_framework_fixes_is_taken_from_it() -> None:
    row = make_row(attention=None, loss_impl=None, gpu="Tesla T4")
    assert (parse_stack(row).attention, parse_stack(row).loss) == ("efficient", "stock")
    assert parse_stack(make_row(attention=None, notes="transformers 4.30")).attention == "eager"
    told = [parse_stack(make_row(attention="sdpa", notes=f"transformers {v}")) for v in ("4.53", "4.54")]
    assert [stack.repeats_keys for stack in told] == [True, False]


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ("q_proj, v_proj (all layers)", ("q_proj", "v_proj")),
        ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["model.layers.0.mlp.up_proj"], ("up_proj",)),
        ("all linear layers incl. lm_head", (*linear_names("all", gated=True), "lm_head")),
    ],
)
def test_layers_with_adapters(told: Any, names: tuple[str, ...]) -> None:
    assert linear_names(told, gated=True) == names


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("adamw (lr=2e-5, weight_decay 0.01, betas 0.9, 0.95)", "adamw"),
        ("galore_adamw", None),
        ("muon + adamw", None),
        ("adamw 4-bit (torchao)", None),
    ],
)
def test_other_optimizers_are_not_adamw(told: str, kind: str | None) -> None:
    assert optimizer_kind(told) == kind


@pytest.mark.parametrize(
    ("told", "metric"),
    [
        ("torch max_memory_allocated (rank 0)", "allocated"),
        ("torch active_bytes peak", "allocated"),
        ("torch.cuda.max_memory_reserved", "reserved"),
        ("nvidia-smi", "process"),
        ("wandb GPU memory allocated", "process"),
    ],
)
def test_metrics(told: str, metric: str) -> None:
    assert parse_stack(make_row(peak_metric=told)).metric == metric


def test_versions_are_of_the_named_package_alone() -> None:
    text = "flash-attn 2.7.3, torchtune 0.4, torch 2.4.1"
    assert version("torch", text) == (2, 4, 1)
    assert version("peft", text) is None


def test_workspaces_of_cublas() -> None:
    # :4096:2:16:8 is two of 4 MiB and eight of 16 KiB, for the forward and the backward pass each.
    assert workspace_bytes("a100-80gb") == 17_039_360
    assert workspace_bytes("h100 sxm") == 64 * 1024**2


def test_a_shape_fills_in_what_follows_from_the_rest() -> None:
    told = {key: value for key, value in SHAPE.items() if key not in ("kv_heads", "head_dim")}
    shape = parse_shape({"config": told})
    assert (shape.kv_heads, shape.head_dim, shape.gated, shape.norm) == (8, 32, True, "rms")


@pytest.mark.parametrize(
    ("name", "bias", "normed"),
    [
        ("Qwen/Qwen2.5-1.5B", True, False),
        ("Qwen/Qwen1.5-0.5B", True, False),
        ("Qwen/Qwen3-8B", False, True),
        ("mistralai/Mistral-7B-v0.1", False, False),
    ],
)
def test_a_family_fills_in_what_is_left_out(name: str, bias: bool, normed: bool) -> None:
    told = {key: value for key, value in SHAPE.items() if key not in ("mlp", "norm")}
    shape = parse_shape({"config": told | {"hf_id": name}})
    assert (shape.gated, shape.norm, shape.qkv_bias, shape.qk_norm) == (True, "rms", bias, normed)
