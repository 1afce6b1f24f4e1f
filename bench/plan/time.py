"""Predicted seconds of an optimizer step beside measured ones, on this machine's processor.

    python bench/plan/time.py                            six recipes, models of random weights
    python bench/plan/time.py --only qwen-lora-512 --json
    python bench/plan/time.py --facts FILE.jsonl         tokens per second beside published ones, by card

A prediction is made before the model exists: its step is traced on fake tensors, and timed with three layers
in place of all. Then the model is made, and takes real steps. Run it where nothing else runs.

Published rows are traced as `plan.stock` traces them, with four layers and with five; what a layer more takes
is what all others take.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.batch import Batch, join
from tunesmith.model.hardware import set_threads
from tunesmith.model.quant import quantize
from tunesmith.plan.card_rates import Rates, card_rates
from tunesmith.plan.cards import card_named
from tunesmith.plan.facts_types import Unknown
from tunesmith.plan.memory import FEW
from tunesmith.plan.operations import Calls
from tunesmith.plan.sizes import config_of
from tunesmith.plan.stack import Stack, parse_stack
from tunesmith.plan.stock_step import StockStep
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype
from tunesmith.train.speed import speed_up
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import (
    Traced,
    plan_time,
    probed_step,
    real_steps,
    run_load,
    trace_calls,
)
from tunesmith.workflows.train_model import adapted, finish

# A run so long that the probe may take all the time that it ever takes.
PLANNED_STEPS = 1000

SMOLLM2_135M, QWEN15_05B = config_of("smollm2-135m"), config_of("qwen1.5-0.5b")


@dataclass(frozen=True)
class Case:
    """A recipe: documents of these lengths in a micro-batch, seven tokens of ten with a label."""

    name: str
    config: Any
    method: str
    lengths: tuple[int, ...]
    checkpointing: str = "none"
    accumulation: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"


CASES = (
    Case("smol-full-512", SMOLLM2_135M, "full", (512,)),
    Case("smol-lora-2048-checkpointing", SMOLLM2_135M, "lora", (2048,), checkpointing="full"),
    Case("smol-qlora-4x128", SMOLLM2_135M, "qlora", (128,) * 4, accumulation=2),
    Case("smol-full-128-8bit", SMOLLM2_135M, "full", (128,), optimizer="adamw-8bit", accumulation=2),
    Case("qwen-lora-512", QWEN15_05B, "lora", (512,)),
    Case("qwen-qlora-3-documents", QWEN15_05B, "qlora", (384, 256, 128), checkpointing="full"),
    Case("qwen-full-256", QWEN15_05B, "full", (256,)),
)


def recipe_of(case: Case, threads: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "random"},
            "data": {"sources": [{"path": "random"}], "max_length": max(case.lengths)},
            "method": {"type": case.method, "alpha": 16.0},
            "train": {
                "precision": case.precision,
                "optimizer": case.optimizer,
                "kernels": "torch",
                "compile": False,
                "lr": 1e-4,
                "optimizer_in_backward": False,
                "stochastic_rounding": False,
                "gradient_checkpointing": case.checkpointing,
                "grad_accumulation": case.accumulation,
                "save_every": PLANNED_STEPS,
            },
            "eval": {"every": 0},
            "parallel": {"engine": "single"},
            "hardware": {"processes": 1, "device": "cpu", "threads": threads},
        }
    )


def batch_of(case: Case, number: int) -> Batch:
    draw = np.random.default_rng(number)
    documents = []
    for length in case.lengths:
        ids = draw.integers(0, case.config.vocab_size, length)
        labels = np.where(np.arange(length) < 0.3 * length, -100, ids)
        documents.append((ids, labels))
    return join(documents)


def steps_of(case: Case, number: int) -> list[Batch]:
    return [batch_of(case, number * case.accumulation + micro) for micro in range(case.accumulation)]


def predict(case: Case, recipe: Recipe) -> tuple[Traced, float]:
    """The traced step, and the predicted seconds of one."""
    first = steps_of(case, 0)
    total = PLANNED_STEPS * sum(batch.num_tokens for batch in first)
    labels = PLANNED_STEPS * sum(batch.num_supervised for batch in first)
    run, typical = run_load(
        recipe, PLANNED_STEPS, lambda step: steps_of(case, step), tokens=total, labels=labels
    )
    traced = trace_calls(recipe, case.config, Work(batch=typical), device="cpu")
    step = probed_step(recipe, case.config, Work(batch=typical), traced, run, device="cpu")
    return traced, plan_time(run, step, device="cpu").step_s


def engine_of(case: Case, recipe: Recipe) -> SingleEngine:
    """Around the model of random weights that the recipe trains."""
    full = recipe.method.type == "full"
    dtype = base_dtype(recipe.train.precision, full=full)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(case.config, dtype=dtype)
    attention.install(model, max_length=max(case.lengths))
    if recipe.method.type == "qlora":
        quantize(model, device="cpu", compute_dtype=dtype, double_quant=True)
    if not full:
        model = adapted(model, recipe, [])
    finish(model, recipe)
    speed_up(model, recipe.train)
    model.train()
    return SingleEngine(model, Supervised(), recipe)


def compare(case: Case, threads: int, steps: int) -> dict[str, Any]:
    recipe = recipe_of(case, threads)
    began = time.perf_counter()
    traced, predicted = predict(case, recipe)
    planned_s = time.perf_counter() - began
    engine = engine_of(case, recipe)
    seconds = real_steps(engine, [steps_of(case, n) for n in range(steps)], max_norm=1.0)
    measured = median(seconds)
    del engine
    gc.collect()
    return {
        "recipe": case.name,
        "tokens": sum(batch.num_tokens for batch in steps_of(case, 0)),
        "tflop": case.accumulation * traced.calls.flops("forward", "backward") / traced.passes / 1e12,
        "predicted_s": predicted,
        "measured_s": measured,
        "ratio": predicted / measured,
        "steps_s": seconds,
        "planned_s": planned_s,
    }


# -- published rates -----------------------------------------------------------------------------------------


def stock_seconds(stack: Stack, rates: Rates, layers: int) -> float:
    """An optimizer step of a stock trainer's over its micro-batches: of one of them its share."""
    step = StockStep(stack, layers)
    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        calls = Calls(trace)
        trace.listeners.append(calls)
        step.run(trace)

    counts = calls.of("forward", "backward")
    for call, n in calls.of("update").items():
        counts[call] += n / stack.accumulation  # type: ignore[assignment]
    attention = rates.product_s("attention", "bf16", layers * attention_flops(stack))
    return rates.all_s(((calls.operations[call], n) for call, n in counts.items()), more_s=attention)


def attention_flops(stack: Stack) -> float:
    """Of a layer's causal attention, which the stock tracer has as one operation without products: two
    forward, five backward, two again where activations are recomputed."""
    shape = stack.shape
    forward = 2 * stack.batch * shape.heads * shape.head_dim * stack.length**2
    return forward * (3.5 + stack.checkpointing)


def predicted_rate(row: dict[str, Any]) -> float:
    """Tokens per second. Raises Unknown and UserError for a row that does not tell enough."""
    stack, rates = parse_stack(row), card_rates(card_named(str(row["gpu"])))
    few, more = (stock_seconds(stack, rates, layers) for layers in FEW)
    return stack.tokens / (more + (stack.shape.layers - FEW[1]) * (more - few))


def facts(path: Path) -> None:
    """Print every row of one GPU that has a rate, and the errors of all."""
    errors, skipped = [], 0
    print(f"{'row':28}{'card':12}{'predicted':>10}{'published':>10}{'error':>8}")
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] != "train" or row["num_gpus"] != 1 or not row["tokens_per_s"]:
            continue
        try:
            rate = predicted_rate(row)
        except (Unknown, UserError):
            skipped += 1
            continue
        errors.append(rate / row["tokens_per_s"] - 1)
        print(f"{row['id']:28}{row['gpu']:12}{rate:10,.0f}{row['tokens_per_s']:10,.0f}{errors[-1]:+8.1%}")
    ordered = sorted(map(abs, errors))
    if ordered:
        ninth = ordered[min(len(ordered) - 1, round(0.9 * len(ordered)))]
        print(f"{len(ordered)} rows, median error {median(ordered):.1%}, nine of ten within {ninth:.1%}")
    print(f"{skipped} rows skipped: their stack is not told in full, or not traced")


def line_of(found: dict[str, Any]) -> str:
    return (
        f"{found['recipe']:32}{found['tokens']:>7}{found['tflop']:>8.2f}{found['predicted_s']:>10.3f}"
        f"{found['measured_s']:>10.3f}{found['ratio']:>7.2f}{found['planned_s']:>8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--threads", default="auto", help="of the processor; default: its physical cores")
    parser.add_argument("--steps", type=int, default=3, help="real ones, after one that warms up")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--facts", type=Path, help="rows of published rates, one JSON object a line")
    given = parser.parse_args()
    if given.facts:
        facts(given.facts)
        return
    threads = set_threads(given.threads if given.threads == "auto" else int(given.threads))
    torch.manual_seed(0)
    if not given.json:
        print(
            f"{'recipe':32}{'tokens':>7}{'TFLOP':>8}{'predicted':>10}{'measured':>10}"
            f"{'ratio':>7}{'plan s':>8}"
        )
    for case in CASES:
        if not given.only or case.name in given.only:
            found = compare(case, threads, given.steps)
            print(json.dumps(found) if given.json else line_of(found), flush=True)


if __name__ == "__main__":
    main()
