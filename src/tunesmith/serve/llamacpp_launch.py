"""llama.cpp's server out of the package xllamacpp, under the options of llama-server that we use.

Started as a file, by the Python that has xllamacpp: it imports nothing of ours.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
from collections.abc import Sequence
from typing import Any


def main(args: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    given = _parser().parse_args(args)
    package: Any = importlib.import_module("xllamacpp")
    params = package.CommonParams()
    params.model.path = given.model
    params.hostnames = [given.host]
    params.port = given.port
    params.n_ctx, params.n_parallel = given.ctx_size, given.parallel
    if given.threads:
        params.cpuparams.n_threads = given.threads
        params.cpuparams_batch.n_threads = given.threads_batch or given.threads
    if given.n_gpu_layers is not None:
        params.n_gpu_layers = given.n_gpu_layers
    params.lora_adapters = [_lora(package, path) for path in given.lora]
    params.lora_init_without_apply = given.lora_init_without_apply
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    server = package.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--threads-batch", type=int)
    parser.add_argument("--n-gpu-layers", type=int)
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--lora-init-without-apply", action="store_true")
    return parser


def _lora(package: Any, path: str) -> Any:
    entry = package.CommonAdapterLoraInfo()
    entry.path, entry.scale = path, 1.0
    return entry


if __name__ == "__main__":
    main()
