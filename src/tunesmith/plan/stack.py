"""A foreign training stack, as a published row tells it: its model's shape, its method, its libraries.

Everything is read by meaning from the row's texts. What a row leaves out and its framework does not fix is
`Unknown`: no guesses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.plan.facts_types import Row
from tunesmith.plan.stock_words import linear_names, optimizer_kind

Loss = Literal["stock", "triton", "liger"]
Base = Literal["plain", "nf4", "gptq"]
Version = tuple[int, ...]
OTHERS = re.compile(r"unsloth|axolotl|llama-?factory|nemo|megatron|colossal|mlx|maxtext|llama\.cpp")
OLD, OLD_TRL = (4, 40), (0, 0)  # what rows without versions are taken for
HOPPER = ("h100", "h200", "h800", "gh200")
BEFORE_AMPERE = ("t4", "v100", "p100", "2080", "titan rtx", "quadro rtx")


class Unknown(Exception):
    """A row does not tell all that its peak depends on; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's shape; norm: rms or layer; num_params: as published, for checking."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool
    norm: Literal["rms", "layer"]
    norms_per_layer: int
    qkv_bias: bool
    qk_norm: bool
    num_params: int | None
    hf_id: str


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One GPU's share of a training: all that its peak depends on.

    weights: format of the loaded model; autocast: format of the products, None without; base: how frozen
    weights lie; upcast: what k-bit preparation leaves in fp32; adapters: their format; denominator_copy: the
    optimizer makes a second list for epsilon; keeps_cache: the forward pass keeps keys and values,
    checkpointing or not; repeats_keys: they are repeated to as many as there are query heads;
    counts_hits: after the loss the logits are copied to see which tokens were met (TRL); upcast_logits: the
    loss is of fp32 logits; held_logits: the 16-bit ones live beside them; shifted: they
    are copied once more, without the last; fp32_outputs: all that the model returns is cast once more
    (accelerate); fused_kernels: norms and rotation in Triton; fused_lora: adapters too.
    """

    shape: Shape
    method: Literal["full", "lora"]
    rank: int
    targets: tuple[str, ...]
    trains_embeddings: bool
    adapters: Literal["fp32", "bf16", "fp16"]
    dropout: float
    weights: Literal["fp32", "bf16", "fp16"]
    autocast: Literal["bf16", "fp16"] | None
    base: Base
    double_quant: bool
    upcast: Literal["none", "norms", "all"]
    optimizer: Literal["adamw", "adamw-fused", "bnb", "sgd"]
    state_bits: Literal[8, 32]
    paged: bool
    denominator_copy: bool
    batch: int
    length: int
    accumulation: int
    checkpointing: bool
    loss: Loss
    keeps_cache: bool
    repeats_keys: bool
    counts_hits: bool
    upcast_logits: bool
    held_logits: bool
    shifted: bool
    fp32_outputs: bool
    fused_kernels: bool
    fused_lora: bool
    attention: Literal["flash", "efficient", "eager"]
    workspace_bytes: int
    metric: Literal["allocated", "reserved", "process"]

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def compute(self) -> Literal["fp32", "bf16", "fp16"]:
        """The format that matrix products are made in."""
        return self.autocast or self.weights


def parse_stack(row: Row) -> Stack:
    """The stack of a Hugging Face Trainer, TRL or PEFT row. Raises Unknown."""
    notes, precision = low(row, "notes"), low(row, "precision")
    shape, method = parse_shape(row), _method(row)
    quantised = _base(row, method)
    transformers, torch = version("transformers", notes), version("torch", notes)
    autocast = _autocast(precision)
    loss = _loss(row)
    _refuse(row)
    return Stack(
        shape=shape,
        method="full" if method == "full" else "lora",
        rank=0 if method == "full" else _count(row, "lora_rank"),
        targets=() if method == "full" else _targets(row, shape),
        trains_embeddings="modules_to_save" in notes or "lm_head fully trained" in notes,
        adapters="fp32" if _casts_adapters(notes, torch) else _weights(row, method, precision, autocast),
        dropout=_dropout(row),
        weights=_weights(row, method, precision, autocast),
        autocast=autocast,
        base=quantised,
        double_quant=_double_quant(row),
        upcast=_upcast(f"{notes} {precision}", quantised),
        optimizer=_optimizer(row),
        state_bits=8 if re.search(r"8.?bit", low(row, "optimizer")) else 32,
        paged="paged" in low(row, "optimizer"),
        denominator_copy=torch is not None and torch < (2, 1),
        batch=_count(row, "micro_batch"),
        length=_count(row, "seq_len"),
        accumulation=_count(row, "grad_accum", 1),
        checkpointing=_checkpointing(row),
        loss=loss,
        **_by_version(transformers or OLD, shape, sdpa="sdpa" in low(row, "attention")),
        counts_hits=(version("trl", notes) or OLD_TRL) >= (0, 16),
        fp32_outputs=autocast is not None,
        fused_kernels="foak" in notes or "fused rms" in notes,
        fused_lora="foak" in notes and quantised != "plain",
        attention=_attention(row),
        workspace_bytes=workspace_bytes(low(row, "gpu")),
        metric=_metric(row),
    )


def parse_shape(row: Row) -> Shape:
    """The shape of the row's `config`. Raises Unknown naming what is missing."""
    config = row.get("config")
    if not isinstance(config, dict):
        raise Unknown("the model's shape is not told")
    for name in ("layers", "hidden", "heads", "intermediate", "vocab"):
        if not _is_count(config.get(name)):
            raise Unknown(f"the model's {name} is {config.get(name)!r}")
    if config.get("experts") or config.get("num_experts") or config.get("n_experts"):
        raise Unknown("a mixture of experts is not traced")
    mlp, norm = (str(config.get(name) or "").lower() for name in ("mlp", "norm"))
    if not mlp or not norm:
        raise Unknown("whether the MLP is gated, or the kind of its norms, is not told")
    return Shape(
        layers=config["layers"],
        hidden=config["hidden"],
        heads=config["heads"],
        kv_heads=config.get("kv_heads") or config["heads"],
        head_dim=config.get("head_dim") or config["hidden"] // config["heads"],
        intermediate=config["intermediate"],
        vocab=config["vocab"],
        tied=bool(config.get("tied_embeddings")),
        gated="gate" in mlp or "glu" in mlp or mlp.startswith("3"),
        norm="rms" if "rms" in norm else "layer",
        norms_per_layer=config.get("norms_per_layer") or 2,
        qkv_bias=bool(config.get("qkv_bias")),
        qk_norm=bool(config.get("qk_norm")),
        num_params=config.get("n_params"),
        hf_id=str(config.get("hf_id") or ""),
    )


def version(package: str, text: str) -> Version | None:
    """The version that a text tells of a package, as numbers."""
    found = re.search(rf"(?<![\w-]){re.escape(package)}[ =]+v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else None


def workspace_bytes(gpu: str) -> int:
    """cuBLAS' workspaces as torch sets them up, one each for the threads of the forward and backward pass."""
    if any(name in gpu for name in HOPPER):
        return 2 * 32 * 1024**2
    return 2 * (2 * 4096 + 8 * 16) * 1024


def low(row: Row, name: str) -> str:
    """A text of the row in lower case; empty where there is none."""
    return str(row.get(name) or "").lower()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(row: Row, name: str, default: int | None = None) -> int:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None or not _is_count(value):
        raise Unknown(f"{name} is {value!r}")
    return int(value)


def _refuse(row: Row) -> None:
    """What would change the peak and is not traced."""
    if _count(row, "num_gpus", 1) != 1:
        raise Unknown(f"{row['num_gpus']} GPUs are not one GPU's stack")
    if low(row, "offload") not in ("", "none"):
        raise Unknown(f"offload {row['offload']!r} is not traced for foreign stacks")
    if "dora" in f"{low(row, 'id')} {low(row, 'notes')}":
        raise Unknown("DoRA is not traced for foreign stacks")
    if re.search(r"(?<!no )(?<!without )\b(torch.?)?compiled?\b", low(row, "notes")):
        raise Unknown("a compiled step is not traced for foreign stacks")
    trainer = OTHERS.search(f"{low(row, 'source')} {low(row, 'parallelism')}")
    if trainer:
        raise Unknown(f"{trainer[0]}'s own runtime is not traced")
    if re.search(
        r"deepspeed|zero-?[123]", " ".join(low(row, n) for n in ("precision", "parallelism", "optimizer"))
    ):
        raise Unknown("DeepSpeed's optimizer and its buffers are not traced")
    if "length-bucketed" in low(row, "notes") or "upper bound" in low(row, "notes"):
        raise Unknown("the length of the longest batch is not told")


def _method(row: Row) -> str:
    method = low(row, "method")
    if method not in ("full", "lora", "qlora"):
        raise Unknown(f"the method {row.get('method')!r} is not traced")
    return method


def _base(row: Row, method: str) -> Base:
    text = f"{low(row, 'precision')} {low(row, 'notes')}"
    if method != "qlora":
        return "plain"
    if "gptq" in text:
        return "gptq"
    if "nf4" in text or "fp4" in text or "4bit" in text or "4-bit" in text or "bnb" in text:
        return "nf4"
    raise Unknown("how the base is quantised is not told")


def _double_quant(row: Row) -> bool:
    """fms-acceleration's benchmarks set it, whatever the row leaves out."""
    text = f"{low(row, 'precision')} {low(row, 'notes')}"
    if "fms-acceleration" in low(row, "source"):
        return True
    if re.search(r"(no|without) double.?quant(?! stated)", text):
        return False
    return bool(re.search(r"double.?quant|\bdq\b", text)) and "no double quant stated" not in text


def _upcast(text: str, base: Base) -> Literal["none", "norms", "all"]:
    """What k-bit preparation leaves in fp32: nothing of GPTQ's. TRL casts all but the norms back in bf16."""
    if base != "nf4" or re.search(r"(skips?|without|no) (prepare_model_for_)?k-?bit", text):
        return "none"
    if not re.search(
        r"k-?bit|prepare_model|fp32 (embed|norm)|(embed|norm)\w*(/[\w/]+)? (in )?fp32|\btrl\b", text
    ):
        raise Unknown("whether the base was prepared (norms and embeddings cast to fp32) is not told")
    return "norms" if re.search(r"\btrl\b", text) and "bf16" in text else "all"


def _autocast(precision: str) -> Literal["bf16", "fp16"] | None:
    if "no autocast" in precision or "no amp" in precision or "pure" in precision:
        return None
    if "autocast" not in precision and "amp" not in precision and "mixed" not in precision:
        return None
    return "fp16" if "fp16" in precision and "bf16" not in precision else "bf16"


def _weights(row: Row, method: str, precision: str, autocast: str | None) -> Literal["fp32", "bf16", "fp16"]:
    """The format of the loaded weights: told, or what the row's script loads by itself."""
    told = re.search(
        r"\b(bf16|bfloat16|fp16|float16|fp32|float32)[ -](?:master )?(?:weights|base|params)", precision
    )
    if told:
        return _format(told[1])
    if autocast is None:
        return _format(precision)
    if "swift" in low(row, "source"):
        return "bf16"
    if method == "full":
        return "fp32"  # mixed precision is that of fp32 weights
    if method == "qlora":
        return "fp16" if autocast == "fp16" else "bf16"
    raise Unknown(f"the format of the loaded weights is not told in {precision!r}")


def _format(text: str) -> Literal["fp32", "bf16", "fp16"]:
    if "bf16" in text or "bfloat16" in text:
        return "bf16"
    if "fp16" in text or "float16" in text:
        return "fp16"
    if "fp32" in text or "float32" in text:
        return "fp32"
    raise Unknown(f"the format of the weights is not told in {text!r}")


def _casts_adapters(notes: str, torch: Version | None) -> bool:
    """peft makes adapters fp32 since 0.12 (2024); before, they had the format of the weights."""
    peft = version("peft", notes)
    if peft is not None:
        return peft >= (0, 12)
    return torch is None or torch >= (2, 2)


# Dropout of adapters that these scripts set, whatever their rows leave out; peft's own default is none.
DROPOUT = {"fms-acceleration": 0.1, "ms-swift": 0.05, "qwenlm/qwen": 0.05}


def _dropout(row: Row) -> float:
    found = re.search(r"dropout[ =:]+(\d*\.?\d+)", f"{low(row, 'notes')} {low(row, 'precision')}")
    if found:
        return float(found[1])
    return next((share for script, share in DROPOUT.items() if script in low(row, "source")), 0.0)


def _targets(row: Row, shape: Shape) -> tuple[str, ...]:
    found = linear_names(row.get("lora_targets"), gated=shape.gated)
    if not found:
        raise Unknown(f"which layers have adapters is not told: {row.get('lora_targets')!r}")
    return found


def _optimizer(row: Row) -> Literal["adamw", "adamw-fused", "bnb", "sgd"]:
    found = optimizer_kind(low(row, "optimizer"))
    if found is None:
        raise Unknown(f"the optimizer {row.get('optimizer')!r} is not traced")
    return found


def _checkpointing(row: Row) -> bool:
    told = low(row, "activation_checkpointing")
    if told in ("none", "off", "false", "no"):
        return False
    if told.startswith(("full", "true", "on", "yes")):
        return True
    raise Unknown(f"activation checkpointing {row.get('activation_checkpointing')!r} is not traced")


def _loss(row: Row) -> Loss:
    told = low(row, "loss_impl")
    if "liger" in told or "fused linear" in told:
        return "liger"
    if "triton" in told or "fast ce" in told:
        return "triton"
    if not told or "chunk" in told:
        raise Unknown(f"the loss {row.get('loss_impl')!r} is not traced")
    return "stock"


def _by_version(transformers: Version, shape: Shape, *, sdpa: bool) -> dict[str, bool]:
    """What transformers' own code copies and keeps, by its version."""
    big_code = not shape.gated and shape.kv_heads == 1 and transformers < (4, 50)  # a loss in its own file
    llama = "llama" in shape.hf_id.lower()
    return {
        "upcast_logits": not big_code,
        "held_logits": big_code or transformers >= (4, 46),
        "shifted": big_code or transformers < (4, 51),
        "keeps_cache": big_code,
        "repeats_keys": sdpa or (transformers < (4, 48) and not big_code and not llama),
    }


def _attention(row: Row) -> Literal["flash", "efficient", "eager"]:
    told, gpu = low(row, "attention"), low(row, "gpu")
    if "eager" in told or told.strip() == "math":
        return "eager"
    if "efficient" in told or "xformers" in told:
        return "efficient"
    if "flash" in told:
        return "flash"
    if "sdpa" in told:
        return "efficient" if re.search("|".join(BEFORE_AMPERE), gpu) else "flash"
    raise Unknown(f"the attention {row.get('attention')!r} is not traced")


def _metric(row: Row) -> Literal["allocated", "reserved", "process"]:
    told = low(row, "peak_metric")
    if "not stated" in told or not told:
        raise Unknown("what was measured is not told")
    if "reserved" in told:
        if not row.get("packing"):
            raise Unknown("what batches of changing lengths leave reserved depends on their order")
        return "reserved"
    if "alloc" in told:
        return "allocated"
    if "process" in told or "nvidia-smi" in told or "nvml" in told or "device" in told:
        return "process"
    raise Unknown(f"the metric {row['peak_metric']!r} is not known")
