"""The planned peak beside that of the real step, and a few layers carried on beside all of them traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.reference.conftest import make_documents, make_model, one_batch, resolved_recipe, trainer_in
from tunesmith.model import attention
from tunesmith.model.batch import Batch
from tunesmith.model.hardware import afresh
from tunesmith.model.live_tensors import LiveTensors
from tunesmith.model.quant import quantize
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.metrics import loss_curve
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import base_dtype
from tunesmith.train.speed import speed_up
from tunesmith.workflows.plan_memory import full_batch, plan_memory
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.train_model import adapted, finish

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "vocab_size": 4000, "tie_word_embeddings": True},
    "qwen3": SIZES
    | {"model_type": "qwen3", "vocab_size": 5000, "head_dim": 32, "tie_word_embeddings": False},
    "gemma": SIZES | {"model_type": "gemma", "vocab_size": 4000, "head_dim": 32},
    "phi": SIZES | {"model_type": "phi", "vocab_size": 4000, "num_key_value_heads": 4},
}
WHOLE = pytest.mark.whole
CHECKPOINTED, PURE = {"gradient_checkpointing": "full"}, {"precision": "bf16-pure"}
# kind, method, settings of train, tokens of a document, documents: each value of each in one case at least
CASES: list[tuple[str, str, dict[str, Any], int, int]] = [
    ("llama", "full", {"precision": "bf16", "grad_accumulation": 3}, 64, 2),
    ("llama", "full", {"memory": "smallest", "max_grad_norm": None}, 128, 1),
    ("llama", "lora", {"gradient_checkpointing": "selective"}, 100, 1),
    ("qwen3", "qlora", CHECKPOINTED, 128, 1),
    ("gemma", "full", {}, 100, 2),
    ("phi", "lora", {}, 64, 2),
]
# The same with other values.
MORE: list[tuple[str, str, dict[str, Any], int, int]] = [
    ("llama", "full", {}, 300, 2),
    ("llama", "full", CHECKPOINTED, 64, 4),
    ("llama", "full", PURE, 128, 1),
    ("llama", "qlora", {}, 128, 2),
    ("qwen3", "full", {"memory": "low"}, 200, 1),
    ("qwen3", "lora", {"precision": "bf16"}, 128, 2),
    ("qwen3", "qlora", CHECKPOINTED, 300, 1),
]
DEVICES = ("cpu", "cuda")


def measured_cases() -> list[Any]:
    return [*(pytest.param(*case) for case in CASES), *(pytest.param(*case, marks=WHOLE) for case in MORE)]


def carried_cases() -> list[Any]:
    """Each case on one device, in turns; all on both with the whole."""
    return [
        pytest.param(*case[:3], device, marks=() if case in CASES and number % 2 == turn else WHOLE)
        for turn, device in enumerate(DEVICES)
        for number, case in enumerate([*CASES, *MORE])
    ]


def recipe_of(method: str, train: dict[str, Any], length: int, documents: int) -> Recipe:
    return resolved_recipe(
        data={"sources": [{"path": "unused"}], "max_length": length},
        method={"type": method, "rank": 8},
        train={"precision": "fp32", "micro_batch_size": documents} | train,
    )


def real_model(recipe: Recipe, config: Any) -> Any:
    precision, method = recipe.train.precision, recipe.method.type
    assert precision != "auto"
    model = AutoModelForCausalLM.from_config(config, dtype=base_dtype(precision, full=method == "full"))
    attention.install(model, max_length=512)
    if method == "qlora":
        quantize(model, device="cpu", compute_dtype=base_dtype(precision, full=False), double_quant=True)
    model = model if method == "full" else adapted(model, recipe, [])
    finish(model, recipe)
    return model.train()


def followed(recipe: Recipe, config: Any, batch: Batch) -> int:
    """Peak of live tensor bytes of two real optimizer steps."""
    model = real_model(recipe, config)
    speed_up(model, recipe.train)
    with afresh(), LiveTensors() as live:
        for tensor in [*model.state_dict(keep_vars=True).values(), *model.buffers()]:
            if isinstance(tensor, torch.Tensor):
                live.track(tensor, "held")
        engine = SingleEngine(model, Supervised(), recipe)
        for _ in range(2):
            engine.begin(1e-4, 0)
            passes = recipe.train.grad_accumulation
            for number in range(passes):
                loss = engine.forward(batch) / batch.num_supervised
                engine.backward(loss, last=number == passes - 1)
                del loss
            engine.update(divide_by=1.0, max_norm=recipe.train.max_grad_norm)
            engine.drop_gradients()
    return live.peak_bytes


@pytest.mark.parametrize(
    ("kind", "method", "train", "length", "documents"), measured_cases(), ids=lambda value: str(value)[:40]
)
def test_the_planned_peak_is_the_real_steps(
    kind: str, method: str, train: dict[str, Any], length: int, documents: int
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model(**CONFIGS[kind])
    recipe, batch = recipe_of(method, train, length, documents), full_batch(length, documents, supervised=0.7)
    plan = plan_memory(recipe, config, Work(batch=batch), device="cpu", exact=False)
    assert plan.live_bytes == pytest.approx(followed(recipe, config, batch), rel=0.03)


@pytest.mark.parametrize("train", [{}, {"memory": "low"}], ids=["plain", "8bit"])
def test_a_plan_leaves_nothing_that_a_real_step_would_meet(tmp_path: Path, train: dict[str, Any]) -> None:
    curves = []
    for planned in (False, True):
        if planned:
            recipe = recipe_of("full", train, 64, 2)
            plan_memory(
                recipe, AutoConfig.for_model(**CONFIGS["llama"]), Work(batch=full_batch(64, 2)), device="cpu"
            )
        model, batches = make_model("llama-tied"), [one_batch(make_documents(4))]
        trainer = trainer_in(
            tmp_path / str(planned), model, lambda _, given=batches: given, steps=3, train=train
        )
        trainer.run()
        curves.append(loss_curve(trainer.task.run.events))
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("kind", "method", "train", "device"), carried_cases(), ids=str)
def test_a_few_layers_carried_on_are_all_of_them(
    kind: str, method: str, train: dict[str, Any], device: Literal["cpu", "cuda"]
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model(**CONFIGS[kind] | {"num_hidden_layers": 7})
    recipe = recipe_of(method, train, 64, 2)
    work = Work(batch=full_batch(64, 2), eval_batch=full_batch(80, 1), sample_tokens=20)
    whole, carried = (
        plan_memory(recipe, config, work, device=device, exact=exact) for exact in (True, False)
    )
    for wanted, found in zip(whole.moments, carried.moments, strict=True):
        assert found.phase == wanted.phase
        assert found.num_bytes == pytest.approx(wanted.num_bytes, rel=1e-3), found.phase
