"""Engines that are programs of others, on the model that a user names: vLLM, llama.cpp's server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir
from tunesmith.hub.gguf_file import is_gguf
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.kv_cache import token_bytes
from tunesmith.model.limits import Limits
from tunesmith.model.load import context_length, load_config, load_tokenizer
from tunesmith.model.weights import read_json_file, weight_files
from tunesmith.serve.http_engine import Driver, HttpEngine
from tunesmith.serve.llamacpp_engine import LlamaCppDriver
from tunesmith.serve.text import Detokenizer
from tunesmith.serve.vllm_engine import VllmDriver, plan_vllm
from tunesmith.workflows.engines import EngineName, llama_server, newest_gguf, vllm_program
from tunesmith.workflows.open_engine import EngineWants, served_length
from tunesmith.workflows.open_model import adapter_beside, with_given_adapter
from tunesmith.workflows.served_models import run_of

PROBE = "The quick brown fox jumps over the lazy dog."
SLOTS = 8


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
    return served, _facts(model, wants, merged=merged)


def _vllm(wants: EngineWants) -> tuple[_Model, Driver, bool]:
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
    model = _opened(files, wants, own | named)
    ranks = [
        int(read_json_file(folder / "adapter_config.json").get("r", 0)) for folder in model.adapters.values()
    ]
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
    plan = plan_vllm(
        weight_bytes=sum(path.stat().st_size for path in weight_files(files.folder)),
        kv_bytes_per_token=token_bytes(model.config, 2),
        max_length=model.length,
        max_concurrent=wants.max_concurrent,
        gpu_bytes=total,
        free_gpu_bytes=free,
        lora_ranks=ranks,
        loras=True,
    )
    return model, VllmDriver(vllm_program(), files.folder, plan, adapters_at_start=model.adapters), False


def _llamacpp(wants: EngineWants) -> tuple[_Model, Driver, bool]:
    """A GGUF file, or the newest that a run was exported to: its adapter is in the weights already."""
    if wants.adapter is not None:
        raise UserError(
            f"--adapter {wants.adapter}: llama.cpp takes adapters as GGUF files beside the model",
            hint="give --adapter NAME=FILE.gguf, or serve the exported GGUF of the run",
        )
    gguf = newest_gguf(Path(wants.path).expanduser().absolute())
    run = run_of(str(gguf.parent))
    files = resolve_model(str(run.path) if run else str(gguf))
    adapters = {name: _lora_file(name, path) for name, path in wants.adapters.items()}
    model = _opened(files, wants, adapters)
    driver = LlamaCppDriver(
        llama_server(),
        gguf,
        Detokenizer(model.tokenizer),
        model.length,
        slots=min(wants.max_concurrent, SLOTS),
        threads=None if wants.threads == "auto" else wants.threads,
        loras=adapters,
    )
    return model, driver, True


def _lora_file(name: str, path: str) -> Path:
    file = Path(path).expanduser().absolute()
    if not file.is_file() or not is_gguf(file):
        raise UserError(
            f"--adapter {name}={path}: llama.cpp takes adapters as GGUF files",
            hint="convert it with llama.cpp's convert_lora_to_gguf.py, or use --engine local",
        )
    return file


def _opened(files: ModelFiles, wants: EngineWants, adapters: Mapping[str, Path]) -> _Model:
    config = load_config(files.folder)
    length = served_length(wants.max_length, context_length(config))
    return _Model(files, load_tokenizer(files.tokenizer), config, length, adapters)


def _facts(model: _Model, wants: EngineWants, *, merged: bool) -> dict[str, Any]:
    files = model.files
    ends = _end_ids(files.folder)
    return {
        "name": wants.model_name or files.name,
        "origin": files.origin,
        "base": str(files.folder),
        "base_revision": files.revision,
        "base_adapters": [str(folder) for folder in files.base_adapters],
        "tokenizer": str(files.tokenizer),
        "adapter": str(files.adapter) if files.adapter else None,
        "adapters": {name: str(folder) for name, folder in model.adapters.items()},
        "merged": merged,
        "context_length": context_length(model.config),
        "max_length": model.length,
        "vocab_size": int(model.config.get_text_config().vocab_size),
        "end_ids": ends,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "weights": "gguf" if merged else "as stored",
        "probe": model.probe,
    }


def _end_ids(folder: Path) -> list[int]:
    """The stop ids of generation_config.json, where there is one."""
    file = folder / "generation_config.json"
    ends = read_json_file(file).get("eos_token_id") if file.is_file() else None
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, list) else [ends])]
