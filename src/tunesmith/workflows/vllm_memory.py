"""How much of a card vLLM needs, by the plan's rules, for `serve.vllm_engine.plan_vllm`. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.gpu import Gpu
from tunesmith.model.weights import tensor_shapes, weight_files
from tunesmith.plan.decoder import Shape, shape_of
from tunesmith.plan.generation import (
    VLLM_VERSIONS,
    CardKind,
    VllmRun,
    default_batch,
    vllm_activation,
    vllm_graphs,
    vllm_non_torch,
    vllm_spread,
    weights_of_shape,
)
from tunesmith.plan.serving import Weight, adapter_bytes, sharded
from tunesmith.workflows.engines import VLLM_ARGS

# Bytes of a number by vLLM's names. What is not here has 16 bits: under `auto` files in fp32 too.
DTYPE_BYTES = {"float32": 4, "float": 4}
CACHE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What of `vllm serve`'s options decides on memory.

    each, cache_each: bytes of a number of the hidden states, of keys and values. tokens:
    max_num_batched_tokens; None: not given, 0: not known. eager: without CUDA graphs.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    each: int = 2
    cache_each: int = 2
    tokens: int | None = None
    eager: bool = False


@dataclass(frozen=True, kw_only=True)
class VllmMemory:
    """Bytes on each card: of the weights, of a token's keys and values, and of all else with a margin, None
    where it is not known."""

    weights: int
    token: int
    other: int | None


def vllm_options(dtype: str, args: Sequence[str]) -> VllmOptions:
    """By the arguments that follow `--dtype DTYPE`. Raises UserError for a count of cards that is none."""
    each = DTYPE_BYTES.get(_option(args, "--dtype") or dtype, 2)
    tokens = _option(args, "--max-num-batched-tokens")
    return VllmOptions(
        tensor_parallel=_cards(args, "--tensor-parallel-size", "-tp"),
        pipeline_parallel=_cards(args, "--pipeline-parallel-size", "-pp"),
        each=each,
        cache_each=CACHE_BYTES.get(_option(args, "--kv-cache-dtype") or "auto", each),
        tokens=None if tokens is None else int(tokens) if tokens.isdecimal() else 0,
        eager=any(_name(part) == "--enforce-eager" for part in args),
    )


def _name(part: str) -> str:
    return part.partition("=")[0].replace("_", "-")


def _option(args: Sequence[str], *names: str) -> str | None:
    """The value of the last of these options, as `--name value` or `--name=value`."""
    found = None
    for part, behind in pairwise([*args, ""]):
        if _name(part) in names:
            found = part.partition("=")[2] if "=" in part else behind
    return found


def _cards(args: Sequence[str], *names: str) -> int:
    text = _option(args, *names)
    if text is None:
        return 1
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"${VLLM_ARGS}: {names[0]} '{text}' is no number of cards", hint="give 1, 2, 4 …")
    return int(text)


def vllm_memory(
    folder: Path,
    config: Any,
    options: VllmOptions,
    *,
    gpu: Gpu | None,
    sequences: int,
    lora_rank: int,
    lora_slots: int,
) -> VllmMemory:
    """What vLLM takes to serve the model in `folder` with so many sequences and slots for adapters at a time.

    gpu None: a CPU, or a card that is not known: what there is beside weights and cache is not known.
    Raises UserError for a model whose keys and values config.json does not tell.
    """
    try:
        shape = shape_of(config)
    except (AttributeError, TypeError):
        raise UserError(
            f"{folder / 'config.json'}: does not tell the sizes of keys and values, so how much of a card "
            "vLLM needs is not known",
            hint="start vllm serve yourself",
        ) from None
    layers = math.ceil(shape.layers / options.pipeline_parallel)
    shape, whole = replace(shape, layers=layers), weights_of_shape(shape)
    held = sharded(weights_of_shape(shape), options.tensor_parallel, shape.kv_heads)
    stored = _stored_bytes(folder, config, options.each)
    return VllmMemory(
        weights=math.ceil(stored * _count(held) / _count(whole)),
        token=shape.token_bytes(options.cache_each, options.tensor_parallel),
        other=None
        if gpu is None or options.tokens == 0
        else _other(shape, options, gpu, sequences)
        + lora_slots * adapter_bytes(held, lora_rank, options.each),
    )


def _count(weights: Sequence[Weight]) -> int:
    return sum(weight.count for weight in weights if not weight.tied)


def _stored_bytes(folder: Path, config: Any, each: int) -> int:
    """Of all weights as vLLM holds them: numbers of `each` bytes, quantised ones as in the files."""
    files = weight_files(folder)
    if getattr(config, "quantization_config", None) is not None:
        return sum(path.stat().st_size for path in files)
    return each * sum(math.prod(shape) for path in files for shape in tensor_shapes(path).values())


def _other(shape: Shape, options: VllmOptions, gpu: Gpu, sequences: int) -> int:
    """Dry run, rotary table, CUDA graphs and what is not torch's, of the version that takes most.

    As a margin with `vllm_spread`: how far published figures were from that, 0.67 GiB on one card.
    """
    card = CardKind(
        num_bytes=gpu.memory_bytes, is_hopper=gpu.capability[0] == 9, is_a100="a100" in gpu.name.lower()
    )
    found = []
    for version in VLLM_VERSIONS:
        run = VllmRun(
            version=replace(version, counts_graphs=version.counts_graphs and not options.eager),
            card=card,
            tokens=options.tokens or default_batch(card)[0],
            sequences=sequences,
            each=options.each,
            tensor_parallel=options.tensor_parallel,
            pipeline_parallel=options.pipeline_parallel,
        )
        activation = vllm_activation(shape, run).num_bytes
        found.append(activation + vllm_non_torch(run) + vllm_graphs(run) + vllm_spread(run))
    return max(found) + shape.context * shape.head_dim * options.each
