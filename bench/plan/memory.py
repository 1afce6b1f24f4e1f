"""Predicted peak of live tensor bytes beside the peak followed in the real step, on the CPU.

    python bench/plan/memory.py [--only NAME …] [--largest-gib 12] [--json]

Each recipe is planned from a configuration and then really stepped, in a process of its own: the model with
random weights, the real engine, two optimizer steps. Matrix products of the real step are left uncomputed
(zeros of the same shape), which changes no tensor's size; --products computes them.
`bench/memory.py` looks into one such step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from tunesmith.core.units import GIB
from tunesmith.model.batch import Batch
from tunesmith.plan.sizes import config_of
from tunesmith.recipe.resolve import Facts, resolve
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_memory import full_batch

MODELS = {"smol": "smollm2-135m", "qwen": "qwen1.5-0.5b"}
FULL, LORA, QLORA = ({"type": kind} for kind in ("full", "lora", "qlora"))
CHECKPOINTED = {"gradient_checkpointing": "full"}
BF16, PURE = {"precision": "bf16"}, {"precision": "bf16-pure"}
# name: model, method, tokens of a document, documents, settings of train
RECIPES: dict[str, tuple[str, dict[str, Any], int, int, dict[str, Any]]] = {
    "smol-full-128": ("smol", FULL, 128, 1, {}),
    "smol-full-512x4": ("smol", FULL, 512, 4, {}),
    "smol-full-2048": ("smol", FULL, 2048, 1, {}),
    "smol-full-2048-checkpointed": ("smol", FULL, 2048, 1, CHECKPOINTED),
    "smol-full-1024-accumulated": ("smol", FULL, 1024, 1, {"grad_accumulation": 4}),
    "smol-full-512-bf16": ("smol", FULL, 512, 1, BF16),
    "smol-full-1024-pure": ("smol", FULL, 1024, 1, PURE),
    "smol-full-1024-selective": ("smol", FULL, 1024, 1, {"gradient_checkpointing": "selective"}),
    "smol-full-1024-low": ("smol", FULL, 1024, 1, {"memory": "low"}),
    "smol-full-512-smallest": ("smol", FULL, 512, 1, {"memory": "smallest", "max_grad_norm": None}),
    "smol-lora-128x8": ("smol", LORA, 128, 8, {}),
    "smol-lora-2048": ("smol", LORA, 2048, 1, {}),
    "smol-lora-1024-checkpointed": ("smol", LORA, 1024, 1, CHECKPOINTED),
    "smol-lora-512-bf16": ("smol", LORA, 512, 1, BF16),
    "smol-lora-dropout-512": ("smol", LORA | {"dropout": 0.1}, 512, 1, {}),
    "smol-dora-256": ("smol", LORA | {"dora": True}, 256, 1, {}),
    "smol-qlora-256": ("smol", QLORA, 256, 1, {}),
    "smol-qlora-1024-checkpointed": ("smol", QLORA, 1024, 1, CHECKPOINTED),
    "smol-qlora-512-bf16": ("smol", QLORA | {"double_quant": False}, 512, 1, BF16),
    "qwen-full-128": ("qwen", FULL, 128, 1, {}),
    "qwen-full-2048": ("qwen", FULL, 2048, 1, {}),
    "qwen-full-512x2-checkpointed": ("qwen", FULL, 512, 2, CHECKPOINTED),
    "qwen-full-1024-pure": ("qwen", FULL, 1024, 1, PURE | CHECKPOINTED),
    "qwen-full-512-accumulated-bf16": ("qwen", FULL, 512, 1, BF16 | {"grad_accumulation": 2}),
    "qwen-lora-512": ("qwen", LORA, 512, 1, {}),
    "qwen-lora-2048-checkpointed": ("qwen", LORA, 2048, 1, CHECKPOINTED),
    "qwen-lora-1024-bf16": ("qwen", LORA | {"rank": 64}, 1024, 1, BF16),
    "qwen-lora-offload-256": ("qwen", LORA, 256, 1, {"optimizer": "adamw-8bit"}),
    "qwen-qlora-512": ("qwen", QLORA, 512, 1, {}),
    "qwen-qlora-1024-bf16": ("qwen", QLORA, 1024, 1, BF16 | CHECKPOINTED),
}


def recipe_of(name: str) -> tuple[Recipe, Any, Batch]:
    """The resolved recipe, the model's configuration and the micro-batch."""
    model, method, tokens, documents, train = RECIPES[name]
    recipe = Recipe.model_validate(
        {
            "model": {"path": model},
            "data": {"sources": [{"path": "random"}], "max_length": tokens},
            "method": method,
            "train": {"micro_batch_size": documents} | train,
        }
    )
    facts = Facts(context_length=8192, device="cpu", threads=1, precision="fp32", serve_precision="fp32")
    config = config_of(MODELS[model])
    return resolve(recipe, facts), config, full_batch(tokens, documents, supervised=0.8)


def predicted(name: str) -> int:
    from tunesmith.workflows.plan_memory import plan_memory
    from tunesmith.workflows.plan_step import Work

    recipe, config, batch = recipe_of(name)
    return plan_memory(recipe, config, Work(batch=batch), device="cpu", exact=False).live_bytes


def measured(name: str, *, products: bool) -> int:
    """Peak of the real step: two optimizer steps of every micro-batch."""
    import torch

    from tunesmith.model.live_tensors import LiveTensors
    from tunesmith.train.engine import SingleEngine
    from tunesmith.train.objective import Supervised
    from tunesmith.train.speed import speed_up

    recipe, config, batch = recipe_of(name)
    torch.set_num_threads(1)
    model = real_model(recipe, config).train()
    speed_up(model, recipe.train)
    with LiveTensors(products=products) as live:
        for tensor in model.state_dict(keep_vars=True).values():
            if isinstance(tensor, torch.Tensor):
                live.track(tensor, "weight")
        for buffer in model.buffers():
            live.track(buffer, "buffer")
        engine = SingleEngine(model, Supervised(), recipe)
        for _ in range(2):
            engine.begin(1e-4, 0)
            for number in range(recipe.train.grad_accumulation):
                last = number == recipe.train.grad_accumulation - 1
                engine.backward(engine.forward(batch) / batch.num_supervised, last=last)
            engine.update(divide_by=1.0, max_norm=recipe.train.max_grad_norm)
            engine.drop_gradients()
    return live.peak_bytes


def real_model(recipe: Recipe, config: Any) -> Any:
    """The model of the recipe with random weights, adapters and quantised base as in a real run."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.model import attention
    from tunesmith.model.quant import quantize
    from tunesmith.train.precision import base_dtype
    from tunesmith.workflows.train_model import adapted, finish

    precision, method = recipe.train.precision, recipe.method
    assert precision != "auto"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=base_dtype(precision, full=method.type == "full"))
    attention.install(model, max_length=2048)
    if method.type == "qlora":
        compute = base_dtype(precision, full=False)
        quantize(model, device="cpu", compute_dtype=compute, double_quant=method.double_quant)
    if method.type != "full":
        model = adapted(model, recipe, [])
    finish(model, recipe)
    return model


def run(name: str, side: str, products: bool) -> int:
    """One side of one recipe, in a process of its own."""
    args = [sys.executable, __file__, "--only", name, "--side", side, *(["--products"] if products else [])]
    done = subprocess.run(args, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--largest-gib", type=float, default=12.0, help="leave out what would take more")
    parser.add_argument("--products", action="store_true", help="compute the matrix products too")
    parser.add_argument("--side", choices=["predicted", "measured"], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.side:
        (name,) = args.only
        print(predicted(name) if args.side == "predicted" else measured(name, products=args.products))
        return
    rows = []
    for name in args.only:
        planned = run(name, "predicted", False)
        if planned > args.largest_gib * GIB:
            print(f"{name}: {planned / GIB:.2f} GiB predicted, left out", file=sys.stderr)
            continue
        found = run(name, "measured", args.products)
        error = planned / found - 1
        rows.append({"recipe": name, "predicted": planned, "measured": found, "error": error})
        print(f"{name:34} {planned / GIB:8.3f} {found / GIB:8.3f} GiB {error:+8.2%}", flush=True)
    errors = [abs(row["error"]) for row in rows]
    total = {"n": len(rows), "median": statistics.median(errors), "worst": max(errors)}
    print(json.dumps({"rows": rows} | total) if args.json else f"{total}")


if __name__ == "__main__":
    main()
