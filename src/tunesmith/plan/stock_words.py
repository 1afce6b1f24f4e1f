"""What the words of published rows mean: layers with adapters, formats, optimizers, losses, metrics."""

from __future__ import annotations

import re
from typing import Any, Literal

from tunesmith.plan.facts_types import Row, Unknown, low

Format = Literal["fp32", "bf16", "fp16"]
Loss = Literal["stock", "triton", "liger"]
Base = Literal["plain", "nf4", "gptq"]
Attention = Literal["flash", "efficient", "eager"]
Metric = Literal["allocated", "reserved", "process"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GATED = (*ATTENTION, *MLP)
ALL = "all-linear"
# What other implementations call Llama's layers; Qwen's first generation: fused attention, and `c_proj` the
# last of both halves.
ALIASES = {
    "w1": ("gate_proj",),
    "w2": ("up_proj",),
    "w3": ("down_proj",),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "attention": ATTENTION,
    "attn": ATTENTION,
    "qkvo": ATTENTION,
    "qv": ("q_proj", "v_proj"),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "mlp": MLP,
    **{short: (f"{short}_proj",) for short in ("q", "k", "v", "o", "gate", "up", "down")},
}
# Words of a text on layers that name none.
AROUND = re.compile(
    r"\b(and|the|of|on|in|only|layers?|modules?|proj\w*s|linears?|lora|incl\w*|blocks?|every|each)\b"
)

# Words that name no other optimizer.
PLAIN = re.compile(
    r"adamw?|torch|pytorch|hf|foreach|fused|paged|bnb|bitsandbytes|(8|32).?bit|sgd|default|for.?loop|eager"
    r"|momentum|states?|fp32|bf16|optimi[sz]er|with|in|and|[\W_]"
)
SETTINGS = re.compile(r"\b(lr|wd|weight.?decay|betas?|beta\d|eps|epsilon|learning.?rate)\b\W*[\d.e+,\- ]*\d")

NVIDIA = re.compile(
    r"nvidia-?smi|nvml|nvtop|gpustat|nvitop|wandb|weights ?& ?biases|\bprocess\b|\bdevice\b|driver"
)
HOST = re.compile(r"\brss\b|psutil|\bhost\b|\bcpu (ram|memory)\b|system (ram|memory)|unified memory")
BEFORE_AMPERE = re.compile(r"\bt4\b|v100|p100|p40|rtx ?20\d\d|\b2080|\b1080|titan rtx|quadro rtx|gtx")


def linear_names(told: Any, *, gated: bool) -> tuple[str, ...]:
    """told: a list of names, or a text; gated: the layers are Llama's. Returns () when nothing is told."""
    if isinstance(told, str):
        text = told.lower()
        if re.search(r"\ball\b", text) and not re.search(r"_proj|attn|attention|mlp|\bw[123]\b", text):
            named = [ALL, *(["lm_head"] if re.search(r"head|output", text) else [])]
        else:
            named = re.findall(r"[a-z]\w*", AROUND.sub(" ", re.sub(r"\([^)]*\)", " ", text)))
    elif isinstance(told, list) and all(isinstance(name, str) for name in told):
        named = [name.rsplit(".", 1)[-1] for name in told]
    else:
        return ()
    if not gated:
        return tuple(named)
    found = (each for name in named for each in _gated(name))
    return tuple(dict.fromkeys(found))


def _gated(name: str) -> tuple[str, ...]:
    return GATED if name.lower() in ("all", "all-linear", "all_linear") else ALIASES.get(name, (name,))


def optimizer_kind(told: str) -> Literal["adamw", "adamw-fused", "bnb", "sgd"] | None:
    """Whose AdamW (torch's, its fused one, bitsandbytes') or SGD a lower-case name means; None for others."""
    if PLAIN.sub("", SETTINGS.sub("", told)):
        return None
    if re.search(r"paged|bnb|bitsandbytes|8.?bit", told):
        return "bnb"
    if "adam" in told:
        return "adamw-fused" if "fused" in told else "adamw"
    return "sgd" if "sgd" in told else None


def method_of(row: Row) -> Literal["full", "lora", "qlora"]:
    """The method; adapters that differ in their first values alone (PiSSA, OLoRA, rsLoRA) are LoRA's."""
    told, base = low(row, "method"), low(row, "precision")
    text = f"{told} {low(row, 'notes')}"
    if "dora" in text:
        raise Unknown("DoRA is not traced for foreign stacks")
    if re.fullmatch(r"full([ -]?(fine-?tun\w*|parameters?|sft|ft))*", told):
        return "full"
    if re.fullmatch(r"q-?lora( .*)?", told):
        return "qlora"
    if re.fullmatch(r"pissa|(rs|o)?-?lora(\+| *\((rslora|pissa|olora)\))?", told):
        return "qlora" if quantised(base) else "lora"
    raise Unknown(f"the method {row.get('method')!r} is not traced" if told else "the method is not told")


def quantised(precision: str) -> bool:
    return re.search(r"nf4|fp4|\bint[48]\b|[48]-?bit|gptq|awq|hqq", precision) is not None


def base_of(row: Row, method: str) -> Base:
    if method != "qlora":
        return "plain"
    precision, text = low(row, "precision"), low(row, "precision", "notes")
    other = re.search(
        r"awq|hqq|aqlm|eetq|\bint8\b|llm\.int8|(?<!optim)load_in_8bit|8-?bit (base|weights|model)", precision
    )
    if other:
        raise Unknown(f"a base in {other[0]!r} is not traced")
    if "gptq" in text:
        return "gptq"
    if re.search(r"nf4|fp4|4-?bit|bnb|int4", text):
        return "nf4"
    raise Unknown("how the base is quantised is not told")


def double_quant(row: Row) -> bool:
    text = low(row, "precision", "notes")
    if re.search(r"(no|without) double.?quant|double.?quant\w*[ =:]*(false|off|no\b)", text):
        return False
    return bool(re.search(r"double.?quant|\bdq\b", text))


def autocast_of(precision: str) -> Literal["bf16", "fp16"] | None:
    if re.search(r"(no|without) (autocast|amp|mixed)|pure|true\b", precision):
        return None
    if not re.search(r"autocast|\bamp\b|mixed", precision):
        return None
    return (
        "fp16"
        if re.search(r"fp16|float16", re.sub("bfloat16", "", precision))
        and not re.search(r"(bf16|bfloat16) (autocast|amp|mixed)", precision)
        else "bf16"
    )


FORMATS = r"(bf16|bfloat16|fp16|float16|half|fp32|float32)"


def told_weights(precision: str) -> Format | None:
    """The format of the loaded weights, where it is said of them."""
    found = re.search(
        rf"\b{FORMATS}[ -](?:master )?(?:weights|base|params|model|parameters)"
        r"|(?:weights|base|params|parameters|model|loaded|dtype)(?: are| loaded)?(?: in|[ =:])* ?(?:torch\.)?"
        + FORMATS,
        precision,
    )
    return format_of(found[1] or found[2]) if found else None


def format_of(text: str) -> Format:
    if re.search(r"bf16|bfloat16", text):
        return "bf16"
    if re.search(r"fp16|float16|half", text):
        return "fp16"
    if re.search(r"fp32|float32", text):
        return "fp32"
    raise Unknown(f"the format of the weights is not told in {text!r}")


def checkpointing(row: Row) -> bool:
    told = low(row, "activation_checkpointing")
    if re.match(r"(none|off|false|no|disabled|0)\b", told):
        return False
    if re.match(
        r"(full|true|on|yes|enabled|hf|gradient.checkpointing|per.layer|every layer|(non-?)?reentrant)\b",
        told,
    ):
        return True
    if not told:
        raise Unknown("whether activations are checkpointed is not told")
    raise Unknown(f"activation checkpointing {row['activation_checkpointing']!r} is not traced")


def loss_of(row: Row, *, known: bool) -> Loss:
    """known: the framework's own loss is meant where none is told."""
    told = low(row, "loss_impl")
    if re.search(r"cut.?cross|\bcce\b|chunk", told) or (not told and not known):
        raise Unknown(f"the loss {row['loss_impl']!r} is not traced" if told else "the loss is not told")
    if re.search(r"(?<!no )(?<!without )liger|fused linear", told):
        return "liger"
    if re.search(r"(?<!no )(?<!without )triton|fast ce", told):
        return "triton"
    return "stock"


def attention_of(row: Row, *, default: str) -> Attention:
    """default: the framework's own, where none is told."""
    told = low(row, "attention") or default
    old, padded = BEFORE_AMPERE.search(low(row, "gpu")), "pad" in low(row, "notes", "packing")
    if "eager" in told or told.strip() == "math":
        return "eager"
    if "efficient" in told or "xformers" in told:
        return "efficient"
    if "sdpa" in told and (old or (padded and "flash" not in told)):
        return "efficient"  # a mask, or the card, keeps flash attention out
    if "flash" in told or "sdpa" in told:
        return "flash"
    raise Unknown(
        f"the attention {row['attention']!r} is not traced" if told else "the attention is not told"
    )


def metric_of(row: Row, default: Metric | None) -> Metric:
    """What was measured; default: of a known script whose row does not tell."""
    told = low(row, "peak_metric")
    if HOST.search(told):
        raise Unknown(f"the metric {row['peak_metric']!r} is of host memory")
    if "max_memory" not in told and NVIDIA.search(told):
        return "process"
    if "reserved" in told or "cached" in told:
        return "reserved"
    if re.search(r"alloc|active|torch.*peak|peak.*torch|tensor", told):
        return "allocated"
    if default is None:
        named = told and "not stated" not in told
        raise Unknown(
            f"the metric {row['peak_metric']!r} is not known" if named else "what was measured is not told"
        )
    return default
