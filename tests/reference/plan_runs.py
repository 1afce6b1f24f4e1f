"""Small trainings by every engine in two processes, each storage of which is followed."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.reference.conftest import resolved_recipe
from tests.reference.parallel_runs import ENGINES, join
from tunesmith.core.events import EventLog
from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.batch import Batch
from tunesmith.model.quant import quantize
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engines import make_engine
from tunesmith.train.group import leave_group
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.plan_memory import full_batch
from tunesmith.workflows.plan_parallel import following, learns_an_order
from tunesmith.workflows.train_model import adapted, finish

PROCESSES = 2
# engine, method, precision; the engines are those of parallel_runs: each engine, method and precision once
CASES = (
    "ddp lora bf16",
    "fsdp-2 full bf16-pure",
    "fsdp-3-optimizer full bf16",
    "fsdp-3 lora fp32",
    "zero-2-optimizer full fp32",
    "zero-3 lora bf16",
)
# The same with other values.
MORE = (
    "ddp full fp32",
    "ddp qlora bf16",
    "fsdp-2 lora fp32",
    "fsdp-3 full fp32",
    "fsdp-3 lora bf16",
    "fsdp-3-parameters full fp32",
    "zero-2 full fp32",
    "zero-2 lora bf16",
    "zero-3 full fp32",
    "zero-3-optimizer lora bf16",
    "zero-3-parameters full fp32",
)
LENGTH, DOCUMENTS = 96, 2


def config_of(case: str) -> Any:
    """Two kinds of layers; vocabularies and layers of like size, tied and not."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 704, "vocab_size": 3001, "max_position_embeddings": 512}
    kind = Qwen2Config if "full" in case else LlamaConfig
    return kind(**sizes, tie_word_embeddings="fp32" in case, eos_token_id=2)


def recipe_of(case: str) -> Recipe:
    engine, method, precision = case.split()
    kind, stage, offload = ENGINES[engine]
    settings = {"lr": 1e-3, "precision": precision, "optimizer": "adamw", "stochastic_rounding": False}
    recipe = resolved_recipe(
        data={"sources": [{"path": "unused"}], "max_length": LENGTH},
        method={"type": method, "rank": 8},
        train=settings | {"micro_batch_size": DOCUMENTS, "grad_accumulation": 2 * PROCESSES},
        eval={"every": 1},
        samples={"every": 0},
        parallel={"engine": kind, "zero_stage": stage, "offload": offload},
    )
    hardware = recipe.hardware.model_copy(update={"processes": PROCESSES})
    return recipe.model_copy(update={"hardware": hardware})


def batch_of(recipe: Recipe) -> Batch:
    batch = full_batch(LENGTH, DOCUMENTS, supervised=0.8)
    return Batch(batch.input_ids, batch.labels, batch.starts, batch.rows)


def measure(case: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Train, with all that is around a step, as `tunesmith train` does: one step, or two where the second
    takes other memory. Returns the peak of live tensor bytes, and what of it."""
    recipe, batch = recipe_of(case), batch_of(recipe_of(case))
    with Trace() as trace, following(trace):
        engine = make_engine(_model(recipe, config_of(case)), Supervised(), recipe, ranks)
        task = Task(
            recipe=recipe,
            run=RunFolder(folder),
            model=engine.model,
            total_steps=1 + learns_an_order(recipe),
            batches=lambda step: [batch] * 2 * PROCESSES,
            longest=batch,
            epochs_after=float,
            eval_batches=[batch] * PROCESSES,
        )
        with EventLog(task.run.events if ranks.first else Path(os.devnull)) as events:
            Trainer(task, events, engine).run()
    peak = trace.timeline.peak()
    return {"bytes": peak.num_bytes, "parts": dict(peak.parts), "largest": trace.timeline.largest()}


def _model(recipe: Recipe, config: Any) -> nn.Module:
    """As `train_model.make_model` does, with random weights."""
    assert recipe.train.precision != "auto"
    full = recipe.method.type == "full"
    dtype = base_dtype(recipe.train.precision, full=full)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    attention.install(model, max_length=LENGTH)
    if recipe.method.type == "qlora":
        quantize(model, device="cpu", compute_dtype=dtype, double_quant=recipe.method.double_quant)
    model = model if full else adapted(model, recipe, [])
    finish(model, recipe)
    return model


def measure_all(local: int, out: Path, port: int, cases: tuple[str, ...]) -> None:
    """One of the processes."""
    ranks = join(local, port, PROCESSES)
    found = {}
    for case in cases:
        torch.manual_seed(0)
        found[case] = measure(case, out / case.replace(" ", "-"), ranks)
        gc.collect()
    (out / f"measured-{local}.json").write_text(json.dumps(found))
    leave_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an interpreter that ends by itself
