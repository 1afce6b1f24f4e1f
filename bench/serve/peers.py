"""`tunesmith serve` beside its peers: the same prompts, in turns, at 1, 8 and 32 clients.

    python bench/serve/peers.py --model DIR --peer transformers --peer fastchat --envs ENVS --install

Each peer runs in an environment of its own, made from requirements-NAME.txt beside this file. For each:
output tokens/s, times to the first token and between tokens, time until it is ready, most memory of its
processes; and ours over it. llama.cpp's server is a program that you have: --llama-server and --gguf. Read
ratios rather than absolute values, and run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import EventClient, free_port, wait_until_ready
from tunesmith.core.units import GIB
from tunesmith.hub.sources import resolve_model
from tunesmith.workflows.bench_measure import Usage
from tunesmith.workflows.bench_peers import make_environment
from tunesmith.workflows.bench_serve import LoadOptions, measure, watched
from tunesmith.workflows.bench_serve_report import curves_svg, load_name, table

HERE = Path(__file__).parent
OURS = "tunesmith"
START_S = 600.0


@dataclass(frozen=True)
class System:
    """One contender: its processes in the order of their start, the path that answers 200 when it is ready,
    the model's name there (None: its first), and whether it knows ignore_eos."""

    commands: list[list[str]]
    ready: str
    model: str | None = None
    ignore_eos: bool = False
    env: dict[str, str] = field(default_factory=dict)


def ours(options: argparse.Namespace, folder: Path, port: int, *more: str) -> System:
    args = ["serve", str(folder), "--port", str(port), "--model-name", "bench", *more]
    return System([[sys.executable, "-m", "tunesmith", *args]], "/ready", ignore_eos=True)


def transformers(options: argparse.Namespace, folder: Path, port: int) -> System:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    args = ["serve", "--host", "127.0.0.1", "--port", str(port), "--continuous-batching", "--dtype", dtype]
    return System(
        [[str(program(options, "transformers", "transformers")), *args]], "/health", model=str(folder)
    )


def fastchat(options: argparse.Namespace, folder: Path, port: int) -> System:
    python = str(program(options, "fastchat", "python"))
    controller, worker = free_port(), free_port()
    told = f"http://127.0.0.1:{controller}"
    return System(
        [
            [python, "-m", "fastchat.serve.controller", "--port", str(controller)],
            [
                python, "-m", "fastchat.serve.model_worker", "--model-path", str(folder), "--device", "cpu",
                "--controller-address", told, "--port", str(worker),
                "--worker-address", f"http://127.0.0.1:{worker}", "--model-names", "bench",
            ],
            [
                python, "-m", "fastchat.serve.openai_api_server", "--controller-address", told,
                "--port", str(port),
            ],
        ],
        "/v1/models",
        model="bench",
    )  # fmt: skip


def vllm(options: argparse.Namespace, folder: Path, port: int) -> System:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    args = ["serve", str(folder), "--port", str(port), "--dtype", dtype, "--max-model-len", "2048"]
    return System([[str(program(options, "vllm", "vllm")), *args]], "/health", ignore_eos=True)


def llamacpp(options: argparse.Namespace, folder: Path, port: int) -> System:
    if not (options.llama_server and options.gguf):
        raise TunesmithError("llamacpp: give --llama-server and --gguf")
    most = max(options.concurrency)
    args = ["-m", options.gguf, "--port", str(port), "-np", str(most), "-c", str(512 * most)]
    args += ["-t", str(os.cpu_count() or 1)]
    return System([[options.llama_server, *args]], "/health", ignore_eos=True)


PEERS = {"transformers": transformers, "fastchat": fastchat, "vllm": vllm, "llamacpp": llamacpp}


def program(options: argparse.Namespace, env: str, name: str) -> Path:
    """A program of a peer's environment, which is made when it is missing and --install is given."""
    folder = options.envs / env
    found: Path = folder / "bin" / name
    if not found.exists() and options.install:
        make_environment(folder, HERE / f"requirements-{env}.txt")
    if not found.exists():
        raise TunesmithError(f"{found} is not there", hint="--install makes the environment")
    return found


@contextmanager
def running(system: System, url: str, usage: Usage) -> Iterator[float]:
    """The system's processes, watched; seconds until it was ready."""
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as logs, ExitStack() as stack:
        began = time.perf_counter()
        for number, command in enumerate(system.commands):
            log = Path(logs) / f"{number}.log"
            process = proc.start(command, log=log, env=os.environ | system.env)
            stack.callback(proc.stop, process)
            stack.enter_context(watched(process.pid, usage))
        try:
            wait_until_ready(url + system.ready, alive=lambda: process.poll() is None, timeout_s=START_S)
            asyncio.run(wait_for_models(url))
        except TunesmithError:
            print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
            raise
        yield time.perf_counter() - began


async def wait_for_models(url: str) -> None:
    """FastChat's server answers before its worker has said that it is there."""
    client, end = EventClient(url), time.perf_counter() + START_S
    try:
        while not (await client.get("/v1/models")).get("data") and time.perf_counter() < end:
            await asyncio.sleep(0.1)
    finally:
        await client.close()


def run_once(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    system = make(name, options, folder, port)
    usages = [Usage() for _ in system.commands]
    with running(system, url, usages[0]) as ready_s:
        load = LoadOptions(
            target=name,
            model=system.model,
            concurrency=tuple(options.concurrency),
            requests=options.requests,
            new_tokens=options.new_tokens,
            ignore_eos=system.ignore_eos,
            seed=options.seed,
        )
        found = measure(url, replace(load), lambda text: print(f"{name}: {text}", file=sys.stderr))
    return found | {"system": name, "ready_s": ready_s, "peak_gib": usages[0].peak_bytes / GIB}


def make(name: str, options: argparse.Namespace, folder: Path, port: int) -> System:
    if name == OURS or name.startswith(f"{OURS} "):
        return ours(options, folder, port, *name.split()[1:], *options.serve_arg)
    return PEERS[name](options, folder, port)


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose tokens/s at the most clients is in the middle; rates as medians over all."""
    order = sorted(runs, key=lambda run: run["levels"][-1]["tokens_per_s"])
    middle = dict(order[len(order) // 2])
    middle["levels"] = [
        level | {"tokens_per_s": statistics.median(run["levels"][i]["tokens_per_s"] for run in runs)}
        for i, level in enumerate(middle["levels"])
    ]
    return middle


def ratios(systems: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    mine = systems[0]
    return {
        other["system"]: {
            load_name(theirs): round(level["tokens_per_s"] / theirs["tokens_per_s"], 2)
            for level, theirs in zip(mine["levels"], other["levels"], strict=True)
            if theirs["tokens_per_s"]
        }
        for other in systems[1:]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything 'tunesmith serve' takes")
    parser.add_argument("--peer", action="append", choices=sorted(PEERS), default=[])
    parser.add_argument("--variant", action="append", default=[], help="ours again with other arguments")
    parser.add_argument("--serve-arg", action="append", default=[], help="for every run of ours")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the peers")
    parser.add_argument("--envs", type=Path, default=Path("bench-envs"))
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench-serve"))
    options = parser.parse_args()
    folder = resolve_model(options.model).folder
    names = [OURS, *(f"{OURS} {variant}" for variant in options.variant), *options.peer]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for _ in range(options.repeat):
        for name in [n for n in names if n not in failures]:
            try:
                runs[name].append(run_once(name, options, folder))
            except TunesmithError as error:
                failures[name] = error.what
    systems = [median_of(found) for found in runs.values() if found]
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"systems": systems, "ours_over": ratios(systems) if systems else {}, "failures": failures}
    result |= {"cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    (options.output / "results.json").write_text(json.dumps(result, indent=1))
    if systems:
        (options.output / "latency.svg").write_text(curves_svg(systems))
    print(table(systems))
    for name, found in result["ours_over"].items():
        print(f"ours over {name}: " + ", ".join(f"{load} {ratio:g}x" for load, ratio in found.items()))
    for name, why in failures.items():
        print(f"{name}: not measured: {why}")


if __name__ == "__main__":
    main()
