"""Peak memory of a training step: bytes of all tensors alive at once, counted operation by operation.

    python bench/memory.py --memory low
    python bench/memory.py --memory smallest --tokens 2048 --sizes-only
    python bench/memory.py --memory normal --precision bf16      fp32 weights, nothing saved

The model is Qwen1.5-0.5B's configuration with random weights, the step a full fine-tune's of one document in
which every token is supervised, computed for real on the CPU. On a GPU the same tensors exist; what kernels
take for themselves and what the allocator rounds up come on top. What a plan says stands beside such
peaks in `bench/plan/memory.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tunesmith.core.progress import say
from tunesmith.core.units import GIB
from tunesmith.model import attention
from tunesmith.model.batch import Batch, join
from tunesmith.model.live_tensors import LiveTensors
from tunesmith.model.shape import with_layers
from tunesmith.plan.sizes import config_of
from tunesmith.recipe.resolve import Facts, resolve, resolve_steps
from tunesmith.recipe.schema import Recipe
from tunesmith.train.activations import checkpoint_layers
from tunesmith.train.engine import SingleEngine
from tunesmith.train.fast_lora import speed_up
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype


def recipe_for(args: argparse.Namespace) -> Recipe:
    """The resolved recipe of a full fine-tune with these settings."""
    given = {"memory": args.memory, "precision": args.precision, "optimizer": args.optimizer}
    train: dict[str, Any] = {key: value for key, value in given.items() if value}
    if args.memory == "smallest":
        train["max_grad_norm"] = None
    if args.gradient_checkpointing:
        train["gradient_checkpointing"] = args.gradient_checkpointing
    recipe = Recipe.model_validate(
        {
            "model": {"path": "Qwen1.5-0.5B"},
            "data": {"sources": [{"path": "random"}], "max_length": args.tokens},
            "method": {"type": "full"},
            "train": train,
        }
    )
    facts = Facts(context_length=32768, device="cpu", threads=1, precision="bf16", serve_precision="bf16")
    return resolve_steps(resolve(recipe, facts), total_steps=100)


def make_model(recipe: Recipe, layers: int) -> Any:
    assert recipe.train.precision != "auto"
    dtype = base_dtype(recipe.train.precision, full=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(with_layers(config_of("qwen1.5-0.5b"), layers))
    finally:
        torch.set_default_dtype(default)
    attention.install(model, max_length=2048)
    checkpointing = recipe.train.gradient_checkpointing
    assert checkpointing != "auto" and not isinstance(checkpointing, bool)
    checkpoint_layers(model, checkpointing)
    speed_up(model)
    return model.train()


def random_batch(tokens: int, documents: int) -> Batch:
    draw = np.random.default_rng(0)
    rows = [
        draw.integers(3, 150_000, size) for size in np.diff(np.linspace(0, tokens, documents + 1, dtype=int))
    ]
    return join([(ids, ids.copy()) for ids in rows], tuple(range(documents)))


def one_step(engine: SingleEngine, batch: Batch) -> tuple[float, float]:
    """(loss, norm of the gradients)"""
    engine.begin(1e-5, seed=1)
    loss = engine.forward(batch) / batch.num_supervised
    engine.backward(loss, last=True)
    norm = engine.update(divide_by=1.0, max_norm=None)
    engine.drop_gradients()
    return float(loss.detach()), norm


def measure(args: argparse.Namespace) -> dict[str, Any]:
    recipe, batch = recipe_for(args), random_batch(args.tokens, args.documents)
    torch.manual_seed(0)
    with LiveTensors(products=not args.sizes_only) as live:
        model = make_model(recipe, args.layers)
        engine = SingleEngine(model, Supervised(), recipe)
        held = live.live_bytes
        live.reset_peak()
        began = time.process_time()
        loss, norm = one_step(engine, batch)
    train = recipe.train
    return {
        "memory": args.memory,
        "precision": train.precision,
        "optimizer": train.optimizer,
        "stochastic_rounding": train.stochastic_rounding,
        "optimizer_in_backward": train.optimizer_in_backward,
        "gradient_checkpointing": train.gradient_checkpointing,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.tokens,
        "loss": loss,
        "grad_norm": norm,
        "held_gib": round(held / GIB, 3),
        "peak_gib": round(live.peak_bytes / GIB, 3),
        "process_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
        "cpu_s": round(time.process_time() - began, 1),
        "at_peak": [
            {"gib": round(size / GIB, 3), "tensors": label} for size, label in live.at_peak(args.top)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", choices=["normal", "low", "smallest"], default="low")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "bf16-pure"], help="default: as --memory says"
    )
    parser.add_argument("--optimizer", choices=["adamw", "adamw-8bit", "adamw-offload"])
    parser.add_argument("--gradient-checkpointing", choices=["none", "selective", "full"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sizes-only", action="store_true", help="leave matrix products uncomputed: quick")
    parser.add_argument("--top", type=int, default=8, help="kinds of tensors at the peak to name")
    args = parser.parse_args()
    found = measure(args)
    for row in found["at_peak"]:
        say(f"{row['gib']:8.3f} GiB  {row['tensors']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
