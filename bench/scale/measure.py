"""Predicted seconds of an optimizer step in one and in two processes, beside those of the real engine.

    python bench/scale/measure.py                      four recipes over gloo on this machine
    python bench/scale/measure.py --only ddp-full --json

A prediction is made before the model exists: the step is traced on fake tensors with all that its processes
would send each other, timed in one process with three layers in place of all, and the link by short messages
between the processes. Then they make the model and take real steps.

Run it where nothing else runs. "others" is what other programs took of the machine's cores meanwhile: where
it is more than a few hundredths, both columns are about another machine than this one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunesmith.model import attention
from tunesmith.model.batch import Batch, join
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.plan.duration import RunLoad, StepTime
from tunesmith.plan.scale import MeasuredNetwork
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engines import make_engine
from tunesmith.train.group import join_group, leave_group
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype
from tunesmith.train.ranks import ranks_from
from tunesmith.train.speed import make_fast
from tunesmith.workflows.launch import Cluster, Crew, enter_worker
from tunesmith.workflows.plan_link import measure, network_of
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_time import (
    Traced,
    plan_time,
    probed_step,
    real_steps,
    run_load,
    together,
    trace_calls,
)
from tunesmith.workflows.train_model import adapted, finish

# The shapes of SmolLM2-135M's layers, eight of them, and a third of its vocabulary.
CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=16384,
    tie_word_embeddings=True,
)
TOKENS, MICRO_BATCHES = 256, 2
# A run so long that the probe may take all the time that it ever takes.
PLANNED_STEPS = 1000
MEASURED_STEPS = 4
PROCESSES = 2


@dataclass(frozen=True)
class Case:
    engine: str
    method: str
    stage: int = 3


CASES = {
    "ddp-full": Case("ddp", "full"),
    "ddp-lora": Case("ddp", "lora"),
    "fsdp-2-full": Case("fsdp", "full", 2),
    "fsdp-3-full": Case("fsdp", "full", 3),
}


def recipe_of(case: Case, processes: int) -> Recipe:
    """One process computes both micro-batches of a step, two processes one each."""
    return Recipe.model_validate(
        {
            "model": {"path": "random"},
            "data": {"sources": [{"path": "random"}], "max_length": TOKENS},
            "method": {"type": case.method, "alpha": 16.0},
            "train": {
                "precision": "fp32",
                "optimizer": "adamw",
                "kernels": "torch",
                "compile": False,
                "lr": 1e-4,
                "optimizer_in_backward": False,
                "stochastic_rounding": False,
                "gradient_checkpointing": "none",
                "grad_accumulation": MICRO_BATCHES,
                "save_every": PLANNED_STEPS,
            },
            "eval": {"every": 0},
            "parallel": {"engine": "single" if processes == 1 else case.engine, "zero_stage": case.stage},
            "hardware": {"processes": processes, "device": "cpu", "threads": 1},
        }
    )


def batches_of(step: int) -> list[Batch]:
    draw = np.random.default_rng(step)
    found = []
    for _ in range(MICRO_BATCHES):
        ids = draw.integers(0, CONFIG.vocab_size, TOKENS)
        found.append(join([(ids, np.where(np.arange(TOKENS) < 0.3 * TOKENS, -100, ids))]))
    return found


# -- in the processes of the run -----------------------------------------------------------------------------


def alone(recipe: Recipe) -> tuple[StepTime, Traced, RunLoad]:
    """The step as one process alone takes it, and what it would send."""
    micro = batches_of(0)
    tokens = PLANNED_STEPS * sum(batch.num_tokens for batch in micro)
    labels = PLANNED_STEPS * sum(batch.num_supervised for batch in micro)
    run, typical = run_load(recipe, PLANNED_STEPS, batches_of, tokens=tokens, labels=labels)
    work = Work(batch=typical)
    traced = trace_calls(recipe, CONFIG, work, device="cpu")
    return probed_step(recipe, CONFIG, work, traced, run, device="cpu"), traced, run


def work_on(case: Case) -> None:
    """One of the processes. The first predicts before the others are met, they measure their link, and then
    the run begins."""
    enter_worker(os.environ)
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks = ranks_from(os.environ)
    recipe = recipe_of(case, ranks.size)
    planned = alone(recipe) if ranks.first else None
    network = None
    try:
        if ranks.size > 1:
            join_group(ranks, "cpu")
            found = measure(ranks, CONFIG.hidden_size, CONFIG.intermediate_size)
            network = network_of(found, ranks.size)
        torch.manual_seed(0)
        engine: Any = make_engine(model_of(recipe), Supervised(), recipe, ranks)
        steps = [batches_of(number) for number in range(MEASURED_STEPS)]
        seconds = real_steps(engine, steps, max_norm=recipe.train.max_grad_norm)
    finally:
        leave_group()
    if planned is not None:
        print(json.dumps(row_of(planned, recipe, network) | {"steps_s": seconds}))


def row_of(
    planned: tuple[StepTime, Traced, RunLoad], recipe: Recipe, network: MeasuredNetwork | None
) -> dict[str, Any]:
    step, traced, run = planned
    if network is not None:
        step = together(step, traced, recipe, network)
    plan = plan_time(run, step, device="cpu")
    crowding = 1.0 if network is None else network.crowding
    return {"predicted_s": plan.step_s, "sent_s": plan.sent_s, "crowding": crowding}


def model_of(recipe: Recipe) -> Any:
    """The model of random weights that the recipe trains."""
    full = recipe.method.type == "full"
    assert recipe.train.precision != "auto"
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=base_dtype(recipe.train.precision, full=full))
    attention.install(model, max_length=TOKENS)
    if not full:
        model = adapted(model, recipe, [])
    finish(model, recipe)
    make_fast(model, recipe.train)
    return model.train()


# -- from outside --------------------------------------------------------------------------------------------


class Others:
    """Cores that programs other than this one and its own took, from /proc/stat."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.perf_counter(), _busy_s(), _own_s()

    def cores(self) -> float:
        taken = (_busy_s() - self.busy) - (_own_s() - self.own)
        return max(0.0, taken / (time.perf_counter() - self.began))


def _busy_s() -> float:
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def compare(name: str, processes: int) -> dict[str, Any]:
    others = Others()
    args = [sys.executable, str(Path(__file__).resolve()), "--worker", "--only", name]
    with Crew(args, processes, Cluster()) as crew:
        row = crew.wait().value
    measured = median(row["steps_s"])
    return row | {
        "recipe": name,
        "processes": processes,
        "measured_s": measured,
        "ratio": row["predicted_s"] / measured,
        "others_cores": others.cores(),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['recipe']:12} {row['processes']:9} {row['predicted_s']:11.3f} {row['sent_s']:8.3f} "
        f"{row['measured_s']:10.3f} {row['ratio']:6.2f} {row['crowding']:8.2f} {row['others_cores']:7.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, PROCESSES])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        work_on(CASES[args.only[0]])
        return
    if not args.json:
        print("recipe       processes predicted s   sent s measured s  ratio crowding  others")
    rows = []
    for name in args.only:
        for processes in args.processes:
            rows.append(compare(name, processes))
            if not args.json:
                print(line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
