"""Peaks of torchtune's, LitGPT's and torchtitan's trainings, as published rows tell them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

import torch

from tunesmith.core.units import GIB
from tunesmith.plan.facts_shape import parse_shape
from tunesmith.plan.facts_types import Prediction, Row, Skipped, Unknown, count, low
from tunesmith.plan.memory import Peaks, trace_step
from tunesmith.plan.stack import workspace_bytes
from tunesmith.plan.stock_native_model import Framework, Style
from tunesmith.plan.stock_native_step import NativeStack, NativeStep, Optimizer
from tunesmith.plan.stock_sharded import detail
from tunesmith.plan.stock_sharded_fsdp import Sharding, reserved_bytes
from tunesmith.plan.stock_words import HOST, MLP, NVIDIA

NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "projection": "o_proj",
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "head": "lm_head",
    "output": "lm_head",
}
OTHER_OPTIMIZERS = r"lion|galore|adafactor|apollo|muon|shampoo|sophia|lomo|badam|mini|schedule"


def predict_native(row: Row) -> Prediction | Skipped | None:
    """The peak of a training by torchtune, LitGPT or torchtitan; None for rows of other trainers.

    Answers `Skipped` with what is missing or not understood.
    """
    framework = native_framework(row)
    if row.get("kind") != "train" or framework is None:
        return None
    try:
        stack = parse_native(row, framework)
    except Unknown as unknown:
        return Skipped(str(unknown))
    peaks = native_peaks(stack)
    num_bytes = peaks.peak.num_bytes
    if stack.metric == "reserved" and peaks.timeline is not None:
        num_bytes = reserved_bytes(peaks.timeline, expandable=stack.expandable)
    return Prediction(num_bytes / GIB, detail(peaks))


def native_framework(row: Row) -> Framework | None:
    """Which native trainer the row tells of."""
    told = f"{row.get('source')} {row.get('notes')}".lower()
    for name, words in {
        "torchtitan": ("torchtitan",),
        "litgpt": ("litgpt", "lit-gpt"),
        "torchtune": ("torchtune",),
    }.items():
        if any(word in told for word in words):
            return name  # type: ignore[return-value]
    return None


@lru_cache(maxsize=64)
def native_peaks(stack: NativeStack) -> Peaks:
    """The fullest moments of one process; every layer is traced."""
    return trace_step(lambda layers: NativeStep(stack, layers), stack.shape.layers, exact=True, device="cuda")


def parse_native(row: Row, framework: Framework) -> NativeStack:
    """The stack of the row. Raises Unknown naming what is missing or not traced."""
    if str(row.get("confidence")) == "X":
        raise Unknown("the row is marked as physically impossible")
    shape, style = parse_shape(row), _style(row, framework)
    optimizer = _optimizer(row)
    sharding = _sharding(row, framework)
    return NativeStack(
        shape=shape,
        style=style,
        batch=count(row, "micro_batch"),
        length=_length(row) // _context_ranks(row),
        accumulation=count(row, "grad_accum", 1),
        loss=_loss(row, framework),
        compiled_loss=style.compiled and _compiles_loss(row, framework),
        optimizer=optimizer,
        in_backward="in backward" in low(row, "optimizer"),
        sharding=sharding,
        workspace_bytes=workspace_bytes(low(row, "gpu")),
        expandable=_expandable(row, framework),
        metric=_metric(row, framework),
    )


def _length(row: Row) -> int:
    if "upper bound" in low(row, "notes") or "longest batch is not" in low(row, "notes"):
        raise Unknown("the length of the longest batch is not told")
    return count(row, "seq_len")


def _style(row: Row, framework: Framework) -> Style:
    precision, told = low(row, "precision"), low(row, "loss_impl", "notes")
    if count(row, "num_gpus", 1) == 1 and not re.search(r"bf16|bfloat16", precision):
        raise Unknown(f"weights of the format {row.get('precision')!r} are not traced in {framework}")
    if re.search(r"mixed|\bamp\b|autocast", precision):
        raise Unknown(f"{framework}'s mixed precision {row['precision']!r} is not traced")
    rank, targets = _adapters(row)
    quantised = "nf4" in precision or "nf4" in told
    if row.get("method") == "qlora" and not quantised and framework != "torchtune":
        raise Unknown("how the base is quantised is not told")
    return Style(
        framework=framework,
        compiled=_compiled(row),
        recompute=_recompute(row),
        offload=_offloads(row),
        base="nf4" if row.get("method") == "qlora" else "plain",
        double_quant=framework == "torchtune" or bool(re.search(r"double|dq", precision)),
        rank=rank,
        targets=targets,
        dropout=0.05 if framework == "litgpt" and rank else 0.0,
    )


def _compiled(row: Row) -> bool:
    told = low(row, "loss_impl", "notes")
    off = re.search(r"\b(no|not|without|un) ?(torch.)?compile|compiled?[ =:]*(off|false)", told)
    return "compile on" in low(row, "source") or ("compile" in told and off is None)


def _offloads(row: Row) -> bool:
    """Whether what is kept of the layers lies in host memory. Raises Unknown for any other offload."""
    told = low(row, "offload")
    if told in ("", "none"):
        return "offload" in low(row, "activation_checkpointing")
    if "activation" in told:
        return True
    raise Unknown(f"offload {row['offload']!r} is not traced")


def _adapters(row: Row) -> tuple[int, frozenset[str]]:
    if "dora" in low(row, "method", "notes"):
        raise Unknown("DoRA is not traced for foreign stacks")
    if row.get("method") == "full":
        return 0, frozenset()
    if row.get("method") not in ("lora", "qlora"):
        raise Unknown(f"the method {row.get('method')!r} is not traced")
    told = row.get("lora_targets")
    if not told:
        raise Unknown("which layers have adapters is not told")
    named = re.findall(r"\w+", told) if isinstance(told, str) else told
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise Unknown(f"lora_targets is {told!r}")
    if isinstance(told, str) and "all" in named:
        named = ["query", "key", "value", "projection", "mlp", *(["output"] if "output" in named else [])]
    names: set[str] = set()
    for name in named:
        names.update(MLP if name == "mlp" else (NAMES.get(name, name),))
    return count(row, "lora_rank"), frozenset(names)


def _recompute(row: Row) -> Literal["none", "full", "products"]:
    told = low(row, "activation_checkpointing")
    if told.startswith(("none", "off", "false")):
        return "none"
    if "selective" in told:
        return "products"
    if told.startswith("full") or "block" in told:
        return "full"
    raise Unknown(
        f"activation checkpointing {row.get('activation_checkpointing')!r} is not told or not traced"
    )


def _loss(row: Row, framework: Framework) -> Literal["whole", "chunked"]:
    """Of all logits at once, or in chunks: LitGPT's own, torchtune's where told. Raises Unknown."""
    told = low(row, "loss_impl")
    if not told:
        raise Unknown("the loss is not told")
    chunked = "chunk" in told and not re.search(r"\boff\b|(un|not |no )chunk|chunk_size[ =:]*0\b", told)
    if framework == "litgpt":
        if "chunk" in told and not chunked:
            raise Unknown("LitGPT's loss of all logits at once is not traced")
        return "chunked"  # its scripts compute it in chunks of 128 tokens
    if framework == "torchtitan" and chunked:
        raise Unknown("torchtitan's loss in chunks is not traced")
    return "chunked" if chunked else "whole"


def _optimizer(row: Row) -> Optimizer:
    told = low(row, "optimizer")
    if not told:
        raise Unknown("the optimizer is not told")
    if re.search(OTHER_OPTIMIZERS, told):
        raise Unknown(f"the optimizer {row['optimizer']!r} is not traced")
    if "paged" in told:
        return "paged"
    if "4-bit" in told or "4bit" in told:
        return "4bit"
    if "8-bit" in told or "8bit" in told:
        return "8bit"
    if "adam" in told:
        return (
            "fused"
            if "fused" in told.replace("optimizer fused", "") or "fused adamw" in low(row, "notes")
            else "foreach"
        )
    raise Unknown(f"the optimizer {row.get('optimizer')!r} is not traced")


def _metric(row: Row, framework: Framework) -> Literal["allocated", "reserved"]:
    """torchtitan logs what is reserved, torchtune what is active."""
    told = low(row, "peak_metric")
    if NVIDIA.search(told) or HOST.search(told):
        raise Unknown(f"the metric {row['peak_metric']!r} is not of torch's tensors")
    return "reserved" if framework == "torchtitan" or "reserved" in told else "allocated"


def _expandable(row: Row, framework: Framework) -> bool:
    """torchtitan's launcher for one node asks for expandable segments since 2025."""
    return framework == "torchtitan" and count(row, "num_gpus", 1) <= 8 and _year(row) >= 2025


def _year(row: Row) -> int:
    """Of the source, where its name is dated; else of today's versions."""
    dated = re.search(r"(?<!\d)(20\d\d)(?:0[1-9]|1[0-2])(?!\d)", low(row, "source"))
    return int(dated[1]) if dated else 2025


def _compiles_loss(row: Row, framework: Framework) -> bool:
    """torchtitan compiles its loss function too since 2025."""
    return framework != "torchtitan" or _year(row) >= 2025


def _context_ranks(row: Row) -> int:
    """Processes that share a sequence."""
    found = re.search(r"\bcp ?=? ?(\d+)", low(row, "parallelism"))
    return int(found[1]) if found else 1


def _sharding(row: Row, framework: Framework) -> Sharding | None:
    ranks = count(row, "num_gpus", 1)
    if ranks == 1:
        return None
    told = low(row, "parallelism")
    if re.search(r"tensor|pipeline|\btp\b|\bpp\b|async", told):
        raise Unknown(f"the parallelism {row['parallelism']!r} is not traced")
    if "offload" in f"{low(row, 'offload')} {low(row, 'optimizer')}":
        raise Unknown("offload of sharded weights is not traced")
    wide = torch.float32 if "fp32" in f"{low(row, 'precision')} {low(row, 'optimizer')}" else None
    return Sharding(
        kind="fsdp1" if "fsdp1" in told else "fsdp2",
        ranks=ranks,
        stored=wide,
        reduced=wide,
        keeps_last=framework == "torchtitan",
        accumulates=count(row, "grad_accum", 1) > 1,
        # torchtitan's groups since 2025: embedding, layers, last norm and output.
        apart=framework == "torchtitan" and _year(row) >= 2025,
    )
