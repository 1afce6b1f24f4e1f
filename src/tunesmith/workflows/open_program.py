"""Engines that are programs of others, on the model that a user names: vLLM, llama.cpp's server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.gpu import first_gpu, gpu_memory, gpus
from tunesmith.core.paths import cache_dir
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.config import context_length, load_config
from tunesmith.model.limits import Limits
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import read_json_file
from tunesmith.serve.driver import Driver
from tunesmith.serve.http_engine import HttpEngine
from tunesmith.serve.llamacpp_engine import LlamaCppDriver
from tunesmith.serve.text import Detokenizer
from tunesmith.serve.vllm_engine import MAX_LORAS, VllmDriver, VllmPlan, lora_rank, plan_vllm
from tunesmith.workflows.engine_facts import engine_facts
from tunesmith.workflows.engine_wants import EngineWants, served_length
from tunesmith.workflows.engines import EngineName, llama_server, vllm_args, vllm_program
from tunesmith.workflows.given_adapters import adapter_beside, with_given_adapter
from tunesmith.workflows.served_gguf import served_gguf
from tunesmith.workflows.vllm_memory import vllm_memory, vllm_options

PROBE = "The quick brown fox jumps over the lazy dog."
SLOTS = 8
ALL_LAYERS = 999
DEFAULT_RANK = 16  # of adapters that may come later
VLLM_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class _Model:
    """A model's files, and what its config says."""

    files: ModelFiles
    tokenizer: Any
    config: Any
    length: int
    adapters: Mapping[str, Path]

    @property
    def probe(self) -> list[int]:
        return list(self.tokenizer(PROBE).input_ids)[: self.length - 1] or [0]


def open_program(engine: EngineName, wants: EngineWants) -> tuple[HttpEngine, dict[str, Any]]:
    """The engine, not started yet, and its facts as `open_engine` gives them.

    Raises UserError for what this program cannot do, and for a model that it cannot have.
    """
    if wants.weights is not None or wants.cache_tokens is not None:
        option = "--weights" if wants.weights is not None else "--cache-tokens"
        raise UserError(f"{option}: {engine} does not take it from here", hint="use --engine local")
    make = _vllm if engine == "vllm" else _llamacpp
    model, driver, merged = make(wants)
    served = HttpEngine(
        driver,
        probe=model.probe,
        limits=Limits(model.length, int(model.config.get_text_config().vocab_size)),
        log=cache_dir() / "logs" / f"{engine}-{os.getpid()}.log",
        max_concurrent=wants.max_concurrent,
        max_waiting=wants.max_waiting,
    )
    return served, _facts(model, wants, merged=merged, weights="as stored" if engine == "vllm" else "gguf")


def _vllm(wants: EngineWants) -> tuple[_Model, Driver, bool]:
    if wants.threads != "auto" or (wants.device == "cpu" and gpus()):
        option = f"--threads {wants.threads}" if wants.threads != "auto" else "--device cpu"
        raise UserError(
            f"{option}: vLLM computes where and as it was built for",
            hint="leave it out; $VLLM_CPU_OMP_THREADS_BIND is vLLM's own word for the threads of a CPU",
        )
    files = resolve_model(wants.path)
    if wants.adapter is not None:
        files = with_given_adapter(files, wants.adapter)
    if files.base_adapters or (wants.merge and files.adapter is not None):
        raise UserError(
            f"{wants.path}: vLLM takes whole weights, and here adapters would have to be merged into them",
            hint=f"tunesmith export {wants.path} --to merged, then serve that folder",
        )
    own = {wants.model_name or files.name: files.adapter} if files.adapter else {}
    named = {name: adapter_beside(path, files) for name, path in wants.adapters.items()}
    model = _opened(files, wants, own | named, quantized=True)
    args = vllm_args()
    plan = _vllm_plan(model, wants, args)
    driver = VllmDriver(vllm_program(), files.folder, plan, extra=args, adapters_at_start=model.adapters)
    return model, driver, False


def _vllm_plan(model: _Model, wants: EngineWants, args: Sequence[str]) -> VllmPlan:
    """By the model's sizes, the first card, and the user's own arguments."""
    dtype = VLLM_DTYPES[wants.precision]
    ranks = [
        int(read_json_file(folder / "adapter_config.json").get("r", 0)) for folder in model.adapters.values()
    ]
    rank = lora_rank(max(ranks, default=DEFAULT_RANK))
    needs = vllm_memory(
        model.files.folder,
        model.config,
        vllm_options(dtype, args),
        gpu=first_gpu(),
        sequences=wants.max_concurrent,
        lora_rank=rank,
        lora_slots=MAX_LORAS,
    )
    free, total = gpu_memory() or (None, None)
    return plan_vllm(
        weight_bytes=needs.weights,
        kv_bytes_per_token=needs.token,
        max_length=model.length,
        max_concurrent=wants.max_concurrent,
        gpu_bytes=total,
        free_gpu_bytes=free,
        other_bytes=needs.other,
        max_lora_rank=rank,
        dtype=dtype,
    )


def _llamacpp(wants: EngineWants) -> tuple[_Model, Driver, bool]:
    program, gguf = llama_server(), served_gguf(wants)
    model = _opened(gguf.files, wants, gguf.folders)
    driver = LlamaCppDriver(
        program,
        gguf.weights,
        Detokenizer(model.tokenizer),
        model.length,
        slots=min(wants.max_concurrent, SLOTS),
        threads=None if wants.threads == "auto" else wants.threads,
        gpu_layers={"cpu": 0, "cuda": ALL_LAYERS}.get(wants.device),
        loras=gguf.adapters,
    )
    return model, driver, gguf.merged


def _opened(
    files: ModelFiles, wants: EngineWants, adapters: Mapping[str, Path], *, quantized: bool = False
) -> _Model:
    config = load_config(files.folder, quantized=quantized)
    length = served_length(wants.max_length, context_length(config))
    return _Model(files, load_tokenizer(files.tokenizer), config, length, adapters)


def _facts(model: _Model, wants: EngineWants, *, merged: bool, weights: str) -> dict[str, Any]:
    files = model.files
    return engine_facts(
        files,
        name=wants.model_name or files.name,
        adapter=files.adapter,
        adapters=model.adapters,
        merged=merged,
        context_length=context_length(model.config),
        max_length=model.length,
        vocab_size=int(model.config.get_text_config().vocab_size),
        eos_token_id=_eos_token_id(files.folder),
        device="cuda" if gpus() else "cpu",
        weights=weights,
        probe=model.probe,
    )


def _eos_token_id(folder: Path) -> Any:
    """Of generation_config.json, or of the config where there is none, as in transformers."""
    file = folder / "generation_config.json"
    return read_json_file(file if file.is_file() else folder / "config.json").get("eos_token_id")
