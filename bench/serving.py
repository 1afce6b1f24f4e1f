"""Tokens per second of `tunesmith serve` at 1, 8 and 32 concurrent streamed requests, beside its peers.

    python bench/serving.py --peer generate --peer transformers-serve --json

Requests: completions of 60 to 300 prompt tokens, greedy, each of the same number of new tokens, through the
official openai client. Peers run one after the other on the same prompts: `generate` is transformers'
generate() on left-padded batches (no server), `transformers-serve` its own continuous-batching server.
Read ratios rather than absolute values, and run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from openai import AsyncOpenAI

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import wait_until_ready

CONCURRENT = (1, 8, 32)
SHORTEST_PROMPT, LONGEST_PROMPT = 60, 300
TEXT = Path(__file__).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """One measurement; times in seconds."""

    system: str
    concurrent: int
    requests: int
    output_tokens: int
    wall_s: float
    tokens_per_s: float
    first_token_p50_s: float | None
    between_tokens_p50_s: float | None


def make_prompts(tokenizer: object, count: int, seed: int) -> list[list[int]]:
    """Token ids of 60 to 300 tokens, cut from this file's text; the same for the same seed."""
    ids = tokenizer(TEXT).input_ids  # type: ignore[operator]
    draw = random.Random(seed)
    lengths = [draw.randint(SHORTEST_PROMPT, LONGEST_PROMPT) for _ in range(count)]
    starts = [draw.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


async def one_request(
    client: AsyncOpenAI, model: str, prompt: list[int] | str, new_tokens: int
) -> tuple[int, list[float]]:
    """(output tokens, when the start and every chunk with text came)."""
    times = [time.perf_counter()]
    tokens = 0
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            times.append(time.perf_counter())
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return tokens, times


async def measure_server(
    system: str, url: str, model: str, prompts: list[list[int]], concurrent: int, new_tokens: int
) -> Row:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    turns = asyncio.Semaphore(concurrent)

    async def in_turn(prompt: list[int]) -> tuple[int, list[float]]:
        async with turns:
            return await one_request(client, model, prompt, new_tokens)

    start = time.perf_counter()
    done = await asyncio.gather(*(in_turn(prompt) for prompt in prompts))
    wall_s = time.perf_counter() - start
    await client.close()
    tokens = sum(count for count, _ in done)
    first = statistics.median(times[1] - times[0] for _, times in done)
    between = [b - a for _, times in done for a, b in pairwise(times[1:])]
    return Row(
        system,
        concurrent,
        len(prompts),
        tokens,
        wall_s,
        tokens / wall_s,
        first,
        statistics.median(between) if between else None,
    )


@contextmanager
def running(args: list[str], url: str, ready: str) -> Iterator[None]:
    log = Path(tempfile.mkdtemp(prefix="bench-serving-")) / "server.log"
    process = proc.start(args, log=log)
    try:
        wait_until_ready(url + ready, alive=lambda: process.poll() is None, timeout_s=300)
        yield
    except TunesmithError:
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
        raise
    finally:
        proc.stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bench_tunesmith(folder: str, tokenizer: object, options: argparse.Namespace) -> list[Row]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    args = [sys.executable, "-m", "tunesmith", "serve", folder, "--port", str(port), "--model-name", "bench"]
    with running(args, url, "/ready"):
        return measure_levels("tunesmith serve", url, "bench", tokenizer, options)


def bench_transformers_serve(folder: str, tokenizer: object, options: argparse.Namespace) -> list[Row]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    args = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--port", str(port)]
    args += ["--continuous-batching", "--dtype", "float32"]
    with running(args, url, "/health"):
        return measure_levels("transformers serve", url, folder, tokenizer, options)


def measure_levels(
    system: str, url: str, model: str, tokenizer: object, options: argparse.Namespace
) -> list[Row]:
    async def all_levels() -> list[Row]:
        rows = []
        await measure_server(system, url, model, make_prompts(tokenizer, 2, 99), 2, 8)
        for concurrent in CONCURRENT:
            prompts = make_prompts(tokenizer, max(4, concurrent * options.rounds), concurrent)
            rows.append(await measure_server(system, url, model, prompts, concurrent, options.new_tokens))
            show(rows[-1])
        return rows

    return asyncio.run(all_levels())


def bench_generate(folder: str, tokenizer: object, options: argparse.Namespace) -> list[Row]:
    """transformers' generate() on batches of `concurrent` prompts, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for concurrent in CONCURRENT:
        prompts = make_prompts(tokenizer, max(4, concurrent * options.rounds), concurrent)
        start = time.perf_counter()
        for at in range(0, len(prompts), concurrent):
            batch = prompts[at : at + concurrent]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=options.new_tokens,
                    min_new_tokens=options.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
        wall_s = time.perf_counter() - start
        tokens = len(prompts) * options.new_tokens
        rows.append(
            Row(
                "transformers generate", concurrent, len(prompts), tokens, wall_s, tokens / wall_s, None, None
            )
        )
        show(rows[-1])
    return rows


def why_not(peer: str) -> str | None:
    """The reason why a peer cannot run here; None when it can."""
    if peer == "transformers-serve":
        if importlib.util.find_spec("transformers.cli.serve") is None:
            return "this transformers has no 'serve' command"
        if not Path(sys.executable).with_name("transformers").exists():
            return "the program 'transformers' is not beside this Python"
    return None


PEERS = {"generate": bench_generate, "transformers-serve": bench_transformers_serve}


def show(row: Row) -> None:
    first = "" if row.first_token_p50_s is None else f"{row.first_token_p50_s:8.2f}"
    between = "" if row.between_tokens_p50_s is None else f"{row.between_tokens_p50_s * 1000:8.1f}"
    line = (
        f"{row.system:24} {row.concurrent:4} {row.requests:4} {row.tokens_per_s:9.1f} {first:>8} {between:>8}"
    )
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything 'tunesmith serve' takes")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="requests for each concurrent one")
    parser.add_argument("--peer", action="append", choices=sorted(PEERS), default=[])
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()

    from tunesmith.hub.sources import resolve_model
    from tunesmith.model.load import load_tokenizer

    files = resolve_model(options.model)
    tokenizer = load_tokenizer(files.tokenizer)
    print(f"{'':24} conc  req   tokens/s  first s  between ms", file=sys.stderr)
    rows = bench_tunesmith(str(files.folder), tokenizer, options)
    skipped = {}
    for peer in options.peer:
        reason = why_not(peer)
        if reason is None:
            try:
                rows += PEERS[peer](str(files.folder), tokenizer, options)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            skipped[peer] = reason
            print(f"{peer}: skipped: {reason}", file=sys.stderr)
    rates = {row.concurrent: row.tokens_per_s for row in rows if row.system == "tunesmith serve"}
    ratios = {f"{level}_over_1": round(rates[level] / rates[1], 2) for level in CONCURRENT[1:]}
    print(f"ratios {ratios}  cores {os.cpu_count()}  load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if options.json:
        result = {"rows": [asdict(row) for row in rows], "ratios": ratios, "skipped": skipped}
        print(json.dumps(result | {"cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
