"""Many adapters at once beside one and none: `tunesmith serve` with eight, under the same load in turns.

    python bench/serve/adapters.py --model DIR

Three ways in turns, on one server: no request has an adapter ("base"), all have the same one ("one"), each
has the next of all ("all"). Every measurement ends after --limit-s, so the whole takes about rounds x levels
x 3 of them and the start. Without --adapter, adapters of noise are made with peft, on all linear layers. Run
it on a machine that does nothing else.
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
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import EventClient
from tunesmith.hub.sources import resolve_model
from tunesmith.workflows.bench_load import Asked, Level, figures, make_prompts, run_level
from tunesmith.workflows.bench_serve_report import load_name, table
from tunesmith.workflows.endpoint import serving

BASE, ONE, ALL = WAYS = ("base", "one", "all")


@dataclass(frozen=True, kw_only=True)
class AskedInTurns(Asked):
    """Requests that take the models in turns."""

    models: Iterator[str]

    def body(self, prompt: str) -> dict[str, Any]:
        return super().body(prompt) | {"model": next(self.models)}


def make_adapters(model: Path, folder: Path, *, count: int, rank: int) -> dict[str, Path]:
    """Adapters of noise in peft's files, by their names."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tunesmith.model.load import load_model

    if not count:
        return {}
    base = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    made = {}
    for number in range(count):
        torch.manual_seed(number)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        wrapped = get_peft_model(base, config)
        made[f"adapter-{number}"] = folder / str(number)
        wrapped.save_pretrained(str(folder / str(number)))
        wrapped.unload()
    return made


def ways(adapters: list[str]) -> dict[str, list[str]]:
    """Of each way the models of its requests."""
    return {BASE: [BASE], ONE: adapters[:1], ALL: adapters}


async def measure(
    url: str, key: str, adapters: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The figures of every measurement, with its way."""
    client = EventClient(url, api_key=key)
    found: list[dict[str, Any]] = []
    asked = Asked(model=BASE, new_tokens=options.new_tokens, extra={"ignore_eos": True})
    try:
        warm = AskedInTurns(**vars(replace(asked, new_tokens=8)), models=cycle([BASE, *adapters]))
        await run_level(client, warm, Level(concurrency=4), make_prompts(9, (60, 60), -1), 0)
        for turn in range(options.repeat):
            for count in options.concurrency:
                for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                    row = await _measure_one(client, asked, ways(adapters)[way], count, len(found), options)
                    print(f"{way}, {count} clients: {row['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
                    found.append(row | {"way": way})
    finally:
        await client.close()
    return found


async def _measure_one(
    client: EventClient, asked: Asked, models: list[str], count: int, number: int, options: argparse.Namespace
) -> dict[str, Any]:
    prompts = make_prompts(options.requests * count, tuple(options.prompt_tokens), options.seed + count)
    # Of the same lengths in every way, and begun so that no cached page of another measurement serves.
    prompts = [f"{number}. {prompt}" for prompt in prompts]
    turns = AskedInTurns(**vars(asked), models=cycle(models))
    level = Level(concurrency=count)
    mets = await run_level(client, turns, level, prompts, options.seed, limit_s=options.limit_s)
    # Those that the limit kept from being sent.
    sent = [met for met in mets if met.chunks or met.failure or not met.cut]
    if not sent or all(met.failure for met in sent):
        raise TunesmithError(f"every request failed: {mets[0].failure}")
    return figures(level, sent)


def summarise(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Of each way and load the measurement in the middle, and the ratios of the medians."""
    systems, rates = [], {}
    for way in WAYS:
        levels = []
        for count in options.concurrency:
            own = [row for row in rows if (row["way"], row["concurrency"]) == (way, count)]
            own.sort(key=lambda row: row["tokens_per_s"])
            rate = statistics.median(row["tokens_per_s"] for row in own)
            levels.append(own[len(own) // 2] | {"tokens_per_s": rate})
            rates[way, load_name(levels[-1])] = rate
        systems.append({"system": way, "new_tokens": options.new_tokens, "levels": levels})
    ratios = {
        f"{over} over {under}": {
            load: round(rate / rates[under, load], 3) for (way, load), rate in rates.items() if way == over
        }
        for over, under in ((ALL, ONE), (ONE, BASE), (ALL, BASE))
    }
    return {"systems": systems, "ratios": ratios}


def bench(options: argparse.Namespace) -> dict[str, Any]:
    model = resolve_model(options.model).folder
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as name:
        folder = Path(name)
        given = {path.resolve().name: path for path in options.adapter}
        adapters = given or make_adapters(model, folder, count=options.count, rank=options.rank)
        args = [part for key, path in adapters.items() for part in ("--adapter", f"{key}={path}")]
        args += ["--model-name", BASE, *options.serve_arg]
        began = time.perf_counter()
        with serving(str(model), log=folder / "server.log", args=args) as endpoint:
            ready_s = time.perf_counter() - began
            rows = asyncio.run(measure(endpoint.url, endpoint.api_key, list(adapters), options))
    found = summarise(rows, options) | {"adapters": len(adapters), "rank": None if given else options.rank}
    return found | {
        "ready_s": ready_s,
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything 'tunesmith serve' takes")
    parser.add_argument("--adapter", action="append", type=Path, default=[], help="a folder; again for more")
    parser.add_argument("--count", type=int, default=8, help="of adapters that are made")
    parser.add_argument("--rank", type=int, default=8, help="of adapters that are made")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--requests", type=int, default=4, help="at most, for every client")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[60, 300])
    parser.add_argument("--limit-s", type=float, default=24.0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-arg", action="append", default=[], help="as --serve-arg=--weights=int8")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    try:
        found = bench(options)
    except TunesmithError as error:
        sys.exit(str(error))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found["systems"]))
    print(f"\n{found['adapters']} adapters, ready in {found['ready_s']:.1f} s")
    for name, ratio in found["ratios"].items():
        print(f"{name}: " + ", ".join(f"{load} {value:.2f}" for load, value in ratio.items()))


if __name__ == "__main__":
    main()
