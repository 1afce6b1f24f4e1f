"""Tokenising and packing beside the tokenizer library's own batch speed, and memory at 1x and 10x the rows.

    python bench/data.py --rows 10000 [--model MODEL_FOLDER] [--json]

Both sides encode the same conversations, rendered by the same template, on the same cores, each in a process
of its own and in turns: the library's `encode_batch` on strings that are ready, and all of ours: reading the
file, parsing, rendering, tokenising, labels, hashes, writing, splitting, packing. Wall and processor seconds
of that work alone, without start-up; the lowest of --repeat turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_LENGTH = 2048
LIMITS = {"over_library": 1.5, "waste": 0.01, "growth": 1.5}


def resident_mib(key: str) -> float:
    """VmRSS, or VmHWM: the most there ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before, wall, cpu = resident_mib("VmRSS"), time.perf_counter(), time.process_time()
    found = work()
    children = os.times()
    found |= {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu + children.children_user + children.children_system,
        "grown_mib": resident_mib("VmHWM") - before,
    }
    return found


def library(args: argparse.Namespace) -> dict[str, Any]:
    """The tokenizers library: `encode_batch` on the rendered texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = []
    for row in json.loads(Path(args.data).read_text()):
        asked = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    backend = tokenizer.backend_tokenizer

    def work() -> dict[str, Any]:
        encoded = backend.encode_batch(texts, add_special_tokens=False)
        return {"tokens": sum(len(one.ids) for one in encoded)}

    backend.encode_batch(texts[:64], add_special_tokens=False)
    return timed(work)


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Everything from the file to the packs of every step."""
    from tunesmith.data.batches import StepPlan
    from tunesmith.data.prepare import prepare
    from tunesmith.model.tokenizer import load_tokenizer
    from tunesmith.recipe.schema import Data

    tokenizer = load_tokenizer(Path(args.model))
    source = {"sources": [{"path": args.data}], "max_length": MAX_LENGTH, "workers": args.workers or "auto"}
    data = Data.model_validate(source | {"eval_fraction": 0.0})

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            prepared = prepare(data, tokenizer, cache_dir=Path(cache))
            plan = StepPlan(
                prepared.train,
                packing=True,
                max_length=MAX_LENGTH,
                micro_batch_size=1,
                grad_accumulation=8,
                seed=0,
            )
            return {"tokens": plan.total_tokens, "waste": 1 - plan.pack_efficiency}

    return timed(work)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"library": library, "ours": ours}


def in_process(side: str, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    given = ["--model", args.model, "--data", str(data), "--workers", str(args.workers)]
    done = subprocess.run(
        [sys.executable, __file__, *given, "--only", side], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_rows(folder: Path, count: int, suffix: str) -> Path:
    """Rows as a JSON list, or a line each."""
    from tunesmith.workflows.bench_rows import alpaca_rows

    path = folder / f"rows-{count}{suffix}"
    with path.open("w", encoding="utf-8") as file:
        if suffix == ".json":
            json.dump(list(alpaca_rows(count)), file)
        else:
            file.writelines(json.dumps(row) + "\n" for row in alpaca_rows(count))
    return path


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data = write_rows(folder, args.rows, ".json")
    runs = [{side: in_process(side, args, data) for side in SIDES} for _ in range(args.repeat)]
    best = {side: min((run[side] for run in runs), key=lambda one: one["wall_s"]) for side in SIDES}
    cpu = {side: min(run[side]["cpu_s"] for run in runs) for side in SIDES}
    memory = {
        times: in_process("ours", args, write_rows(folder, args.rows * times, ".jsonl")) for times in (1, 10)
    }
    return {
        "rows": args.rows,
        "tokens": best["ours"]["tokens"],
        "library_s": best["library"]["wall_s"],
        "ours_s": best["ours"]["wall_s"],
        "over_library": best["ours"]["wall_s"] / best["library"]["wall_s"],
        "over_library_cpu": cpu["ours"] / cpu["library"],
        "waste": best["ours"]["waste"],
        "grown_mib": {times: one["grown_mib"] for times, one in memory.items()},
        "growth": memory[10]["grown_mib"] / memory[1]["grown_mib"],
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything that tunesmith takes")
    parser.add_argument("--workers", type=int, default=0, help="processes of ours; 0: as a recipe's auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(SIDES[args.only](args)))
        return
    from tunesmith.hub.sources import resolve_model

    args.model = str(resolve_model(args.model).folder)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder))
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        limit = f"  (at most {LIMITS[name]})" if name in LIMITS else ""
        print(f"{name:18} {value if not isinstance(value, float) else round(value, 4)}{limit}")


if __name__ == "__main__":
    main()
