"""A foreign training stack, as a published row tells it: its model's shape, its method, its libraries.

Everything is read by meaning from the row's texts. What a row leaves out and its framework does not fix is
`Unknown`: no guesses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tunesmith.plan.decoder import Shape
from tunesmith.plan.facts_shape import parse_shape
from tunesmith.plan.facts_types import Row, Unknown, count, low
from tunesmith.plan.stock_trainers import OTHERS, Trainer, trainer_of
from tunesmith.plan.stock_words import (
    Attention,
    Base,
    Format,
    Loss,
    Metric,
    attention_of,
    autocast_of,
    base_of,
    checkpointing,
    double_quant,
    format_of,
    linear_names,
    loss_of,
    method_of,
    metric_of,
    optimizer_kind,
    told_weights,
)

Version = tuple[int, ...]
OLD, OLD_TRL = (4, 40), (0, 0)  # what rows without versions are taken for
SDPA_DEFAULT, SDPA_SHARES = (4, 36), (4, 54)  # transformers: attention by SDPA; its keys no longer repeated
MOST_TOKENS = 1 << 28  # of a micro-batch; beyond it torch's counts overflow
HOPPER = ("h100", "h200", "h800", "gh200", "h20")


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
    adapters: Format
    dropout: float
    weights: Format
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
    attention: Attention
    workspace_bytes: int
    metric: Metric

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def compute(self) -> Format:
        """The format that matrix products are made in."""
        return self.autocast or self.weights


def parse_stack(row: Row) -> Stack:
    """The stack of a Hugging Face Trainer, TRL or PEFT row. Raises Unknown."""
    _refuse(row)
    if count(row, "micro_batch") * count(row, "seq_len") > MOST_TOKENS:
        raise Unknown(f"no GPU holds {row['micro_batch']} x {row['seq_len']} tokens")
    notes, precision, trainer = low(row, "notes"), low(row, "precision"), trainer_of(row)
    shape, method = parse_shape(row), method_of(row)
    base, autocast = base_of(row, method), autocast_of(precision)
    transformers, torch = version("transformers", notes), version("torch", notes)
    weights = _weights(method, precision, autocast, trainer)
    sdpa = "sdpa" in (low(row, "attention") or _default_attention(transformers))
    return Stack(
        shape=shape,
        method="full" if method == "full" else "lora",
        rank=0 if method == "full" else count(row, "lora_rank"),
        targets=() if method == "full" else _targets(row, shape),
        trains_embeddings="modules_to_save" in notes or "lm_head fully trained" in notes,
        adapters="fp32" if _casts_adapters(notes, torch) else weights,
        dropout=_dropout(row, trainer),
        weights=weights,
        autocast=autocast,
        base=base,
        double_quant=trainer.double_quant or double_quant(row),
        upcast=_upcast(f"{notes} {precision}", base, trainer),
        optimizer=_optimizer(row),
        state_bits=8 if re.search(r"8.?bit", low(row, "optimizer")) else 32,
        paged="paged" in low(row, "optimizer"),
        denominator_copy=torch is not None and torch < (2, 1),
        batch=count(row, "micro_batch"),
        length=count(row, "seq_len"),
        accumulation=count(row, "grad_accum", 1),
        checkpointing=checkpointing(row),
        loss=loss_of(row, known=transformers is not None),
        **_by_version(transformers or OLD, shape, sdpa=sdpa, own_loss=trainer.own_loss),
        counts_hits=(version("trl", notes) or OLD_TRL) >= (0, 16),
        fp32_outputs=autocast is not None,
        fused_kernels="foak" in notes or "fused rms" in notes,
        fused_lora="foak" in notes and base != "plain",
        attention=attention_of(row, default=_default_attention(transformers)),
        workspace_bytes=workspace_bytes(low(row, "gpu")),
        metric=_metric(row, trainer),
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


def _refuse(row: Row) -> None:
    """What would change the peak and is not traced."""
    if count(row, "num_gpus", 1) != 1:
        raise Unknown(f"{row['num_gpus']} GPUs are not one GPU's stack")
    if low(row, "offload") not in ("", "none", "no", "false", "off"):
        raise Unknown(f"offload {row['offload']!r} is not traced for foreign stacks")
    other = OTHERS.search(low(row, "source", "parallelism", "notes"))
    if other:
        raise Unknown(f"{other[0]} computes the step in its own way, which is not traced")
    if re.search(r"(?<!no )(?<!without )\b(torch.?)?compiled?\b(?! off)", low(row, "notes")):
        raise Unknown("a compiled step is not traced for foreign stacks")
    if re.search(r"deepspeed|zero-?[123]", low(row, "precision", "parallelism", "optimizer")):
        raise Unknown("DeepSpeed's optimizer and its buffers are not traced")
    if re.search(r"length-bucketed|upper bound|longest batch is not", low(row, "notes")):
        raise Unknown(
            "the length of the longest batch is not told: seq_len is a cap that no batch need reach"
        )


def _upcast(text: str, base: Base, trainer: Trainer) -> Literal["none", "norms", "all"]:
    """What k-bit preparation leaves in fp32: nothing of GPTQ's. TRL casts all but the norms back in bf16."""
    if base != "nf4" or re.search(r"(skips?|without|no) (prepare_model_for_)?k-?bit", text):
        return "none"
    told = r"k-?bit|prepare_model|fp32 (embed|norm)|(embed|norm)\w*(/[\w/]+)? (in )?fp32|\btrl\b"
    if not re.search(told, text):
        if trainer.prepares is False:
            return "none"
        raise Unknown("whether the base was prepared (norms and embeddings cast to fp32) is not told")
    return "norms" if re.search(r"\btrl\b", text) and "bf16" in text else "all"


def _weights(method: str, precision: str, autocast: str | None, trainer: Trainer) -> Format:
    """The format of the loaded weights: told, or what the row's script loads by itself."""
    told = told_weights(precision)
    if told:
        return told
    if autocast is None:
        found = format_of(precision)
        if method == "full" and re.fullmatch(r"(bf16|bfloat16|fp16|float16)", precision.strip()):
            raise Unknown(f"whether {precision!r} is the weights' format or that of the products is not told")
        return found
    if method == "full" and not trainer.own_loss:
        return "fp32"  # mixed precision is that of fp32 weights
    if trainer.weights:
        return trainer.weights
    if method == "qlora":
        return "fp16" if autocast == "fp16" else "bf16"
    raise Unknown(f"the format of the loaded weights is not told in {precision!r}")


def _casts_adapters(notes: str, torch: Version | None) -> bool:
    """peft makes adapters fp32 since 0.12 (2024); before, they had the format of the weights."""
    peft = version("peft", notes)
    if peft is not None:
        return peft >= (0, 12)
    return torch is None or torch >= (2, 2)


def _dropout(row: Row, trainer: Trainer) -> float:
    found = re.search(r"dropout[ =:]+(\d*\.?\d+)", low(row, "notes", "precision"))
    return float(found[1]) if found else trainer.dropout


def _targets(row: Row, shape: Shape) -> tuple[str, ...]:
    found = linear_names(row.get("lora_targets"), gated=shape.gated)
    if not found:
        raise Unknown(f"which layers have adapters is not told: {row.get('lora_targets')!r}")
    return found


def _optimizer(row: Row) -> Literal["adamw", "adamw-fused", "bnb", "sgd"]:
    told = low(row, "optimizer")
    found = optimizer_kind(told)
    if found is None:
        raise Unknown(
            f"the optimizer {row['optimizer']!r} is not traced" if told else "the optimizer is not told"
        )
    return found


def _default_attention(transformers: Version | None) -> str:
    if transformers is None:
        return ""
    return "sdpa" if transformers >= SDPA_DEFAULT else "eager"


def _by_version(transformers: Version, shape: Shape, *, sdpa: bool, own_loss: bool) -> dict[str, bool]:
    """What transformers' own code copies and keeps, by its version; own_loss: a model's own file does."""
    big_code = not shape.gated and shape.kv_heads == 1 and transformers < (4, 50)  # a loss in its own file
    llama, own_loss = "llama" in shape.hf_id.lower(), own_loss or big_code
    return {
        "upcast_logits": not own_loss,
        "held_logits": own_loss or transformers >= (4, 46),
        "shifted": own_loss or transformers < (4, 51),
        "keeps_cache": big_code,
        "repeats_keys": (sdpa and transformers < SDPA_SHARES)
        or (transformers < (4, 48) and not big_code and not llama),
    }


def _metric(row: Row, trainer: Trainer) -> Metric:
    metric = metric_of(row, trainer.metric)
    if metric != "allocated" and not trainer.padded and lengths_vary(row):
        raise Unknown("what batches of changing lengths leave reserved depends on their order")
    return metric


def lengths_vary(row: Row) -> bool:
    """Whether batches differ in length: what a row says, or how it is where a data set is not packed."""
    if row.get("packing"):
        return False
    return not re.search(
        r"pad\w* to (max|seq|the|full|\d)|max_length padding|padding=.?max_length|pad_to_max|synthetic"
        r"|random (token|input|data)|dummy|fixed.(length|seq)|(constant|same|equal) length",
        low(row, "notes", "peak_metric", "source"),
    )
