"""The same small training by every engine: in two processes that meet, and in one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.core.events import EventLog
from tunesmith.core.run_folder import RunFolder
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import states
from tunesmith.train.engines import check_engine, make_engine
from tunesmith.train.group import join_group, leave_group
from tunesmith.train.loop import Task, Trainer
from tunesmith.train.metrics import final_events
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype, cast_trained
from tunesmith.train.ranks import Ranks, ranks_from

STEPS, SAVED = 6, 3
PREDICTED = "predicted"  # file with the bytes of a checkpoint's tensors, as the engine tells them
# name: (engine, zero_stage, offload)
ENGINES = {
    "single": ("single", 3, "none"),
    "ddp": ("ddp", 3, "none"),
    "fsdp-2": ("fsdp", 2, "none"),
    "fsdp-3": ("fsdp", 3, "none"),
    "fsdp-3-optimizer": ("fsdp", 3, "optimizer"),
    "fsdp-3-parameters": ("fsdp", 3, "parameters"),
    "zero-2": ("deepspeed", 2, "none"),
    "zero-2-optimizer": ("deepspeed", 2, "optimizer"),
    "zero-3": ("deepspeed", 3, "none"),
    "zero-3-optimizer": ("deepspeed", 3, "optimizer"),
    "zero-3-parameters": ("deepspeed", 3, "parameters"),
}
METHODS = ("full", "lora")
ONCE = {"fsdp-2": "lora", "fsdp-3-optimizer": "full", "fsdp-3-parameters": "full", "zero-2": "full",
        "zero-2-optimizer": "lora", "zero-3-optimizer": "full", "zero-3-parameters": "lora"}  # fmt: skip
"""The one method that an engine is tried with where not all are: what differs from `ddp`, `fsdp-3` and
`zero-3`, tried with both, is where it keeps gradients and states, of whatever is trained."""


def pairs(*, whole: bool) -> list[tuple[str, str]]:
    """(engine, method) of several processes. whole: each engine with each method."""
    return [
        (engine, method)
        for method in METHODS
        for engine in ENGINES
        if engine != "single" and (whole or ONCE.get(engine, method) == method)
    ]


def batches(step: int) -> list[Batch]:
    """Three micro-batches of unequal size: one of two processes has two of them."""
    return [one_batch(make_documents(2 + number, seed=10 * step + number)) for number in range(3)]


def recipe_for(engine: str, method: str) -> Recipe:
    kind, stage, offload = ENGINES[engine]
    return Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"sources": [{"path": "unused"}], "max_length": 512},
            "method": {"type": method},
            "train": {
                "lr": 5e-3,
                "weight_decay": 0.01,
                "precision": "fp32",
                "optimizer": "adamw",
                "save_every": SAVED,
                "keep_checkpoints": 9,
            },
            "eval": {"every": SAVED},
            "samples": {"every": 0},
            "parallel": {"engine": kind, "zero_stage": stage, "offload": offload},
            "hardware": {"device": "cpu"},
        }
    )


def model_for(method: str, found: Path | None) -> Any:
    model = make_model("llama-tied")
    if method == "full" and found is not None:
        model = type(model).from_pretrained(found / "model")
    attention.install(model)
    if method == "lora":
        model = attach_lora(model, rank=3, alpha=6.0, dropout=0.1, targets="all-linear", rslora=False, seed=0)
        if found is not None:
            states.read_adapter(found, model)
    return model


def train(folder: Path, engine: str, method: str, ranks: Ranks, found: Path | None = None) -> RunFolder:
    """Train in `folder`, from a checkpoint or the beginning."""
    recipe, model = recipe_for(engine, method), model_for(method, found)
    check_engine(recipe, ranks)
    run = RunFolder(folder)
    task = Task(
        recipe=recipe,
        run=run,
        model=model,
        total_steps=STEPS,
        batches=batches,
        longest=batches(0)[2],
        epochs_after=float,
        eval_batches=batches(100),
    )
    log = run.events if ranks.first else Path(os.devnull)
    with EventLog(log) as events:
        trainer = Trainer(task, events, make_engine(model, Supervised(), recipe, ranks))
        if found is not None:
            trainer.restore(found)
        trainer.run()
        if ranks.first:
            (folder / PREDICTED).write_text(str(trainer.engine.num_bytes()))
    return run


def curve(run: RunFolder) -> dict[str, float]:
    """Losses and gradient norms by step, and held-out losses."""
    steps, evals = final_events(run.events, "step"), final_events(run.events, "eval")
    found = {f"loss {event['step']}": event["loss"] for event in steps}
    found |= {f"norm {event['step']}": event["grad_norm"] for event in steps}
    return found | {f"eval {event['step']}": event["loss"] for event in evals}


def two_batches(step: int) -> list[Batch]:
    return batches(step)[:2]


def train_in_bf16(folder: Path, engine: str, method: str, ranks: Ranks) -> RunFolder:
    """fp32 weights that are multiplied in bf16. Two micro-batches a step, one for each of two processes, and
    no clipping: so every sum is of two numbers, the same in either order."""
    recipe = recipe_for(engine, method)
    changed = {"precision": "bf16", "max_grad_norm": None, "save_every": 100}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})
    model = make_model("llama-tied").to(base_dtype("bf16", full=method == "full"))
    attention.install(model)
    if method == "lora":
        model = attach_lora(model, rank=3, alpha=6.0, dropout=0.0, targets="all-linear", rslora=False, seed=0)
    cast_trained(model, "bf16")
    run = RunFolder(folder)
    task = Task(
        recipe=recipe,
        run=run,
        model=model,
        total_steps=STEPS,
        batches=two_batches,
        longest=two_batches(0)[1],
        epochs_after=float,
    )
    with EventLog(run.events if ranks.first else Path(os.devnull)) as events:
        Trainer(task, events, make_engine(model, Supervised(), recipe, ranks)).run()
    return run


def run_bf16(local: int, out: Path, port: int) -> None:
    """One of two processes."""
    ranks = join(local, port, 2)
    for method in METHODS:
        for engine in ("ddp", "fsdp-3"):
            train_in_bf16(out / f"{engine}-{method}", engine, method, ranks)
    end()


def end() -> None:
    """Leave the group and end this process, as the program's own workers do."""
    leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join(local: int, port: int, processes: int) -> Ranks:
    os.environ |= {
        "RANK": str(local),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    ranks = ranks_from(os.environ)
    join_group(ranks, "cpu")
    return ranks


def run_all(local: int, out: Path, port: int, processes: int, wanted: list[tuple[str, str]]) -> None:
    """One of the processes: engines and methods, from the beginning and from one process's checkpoint."""
    ranks = join(local, port, processes)
    curves = {}
    for engine, method in wanted:
        single = RunFolder(out / f"single-{method}").checkpoint(SAVED)
        whole = train(out / f"{engine}-{method}", engine, method, ranks)
        rest = train(out / f"{engine}-{method}-resumed", engine, method, ranks, single)
        if ranks.first:
            curves[f"{engine} {method}"] = {"whole": curve(whole), "resumed": curve(rest)}
            (out / "curves.json").write_text(json.dumps(curves))
    end()
