"""What saves memory and claims equality: the same curve as the plain loop, the same bits when resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_documents, make_model, one_batch, trainer_in
from tunesmith.core.errors import RunFailed
from tunesmith.model.adapters import attach_lora
from tunesmith.train.activations import checkpoint_layers
from tunesmith.train.loop import Trainer
from tunesmith.train.metrics import loss_curve

STEPS = 12
ALONE = {"max_grad_norm": None, "optimizer_in_backward": True}
EIGHT = {"optimizer": "adamw-8bit"}
ROUNDED = {"precision": "bf16-pure", "stochastic_rounding": True}
OFFLOAD = {"optimizer": "adamw-offload"}


def model_of(method: str, precision: str = "fp32", *, dropout: float = 0.1) -> Any:
    model = make_model("llama-tied")
    if method == "lora":
        settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False}
        return attach_lora(model, dropout=dropout, seed=0, **settings)
    return model.to(torch.bfloat16) if precision == "bf16-pure" else model


def batches(step: int) -> list[Any]:
    return [one_batch(make_documents(4, seed=step % 2))]


def trainer_of(folder: Path, model: Any, steps: int = STEPS, **train: Any) -> Trainer:
    settings = {"lr": 5e-3, "warmup_steps": 2, "weight_decay": 0.1, "seed": 11} | train
    return trainer_in(folder, model, batches, steps=steps, train=settings)


def curve(trainer: Trainer) -> list[float]:
    trainer.run()
    return list(loss_curve(trainer.task.run.events).values())


@pytest.fixture
def curve_of(tmp_path: Path) -> Callable[..., list[float]]:
    made = iter(range(100))

    def run(model: Any, **train: Any) -> list[float]:
        return curve(trainer_of(tmp_path / str(next(made)), model, **train))

    return run


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("train", [OFFLOAD, ALONE, ALONE | OFFLOAD], ids=["offload", "in-backward", "both"])
def test_the_curve_is_the_plain_optimizers(
    method: str, train: dict[str, Any], curve_of: Callable[..., list[float]]
) -> None:
    plain = curve_of(model_of(method), max_grad_norm=train.get("max_grad_norm", 1.0))
    assert plain[0] - plain[-1] > 0.1
    assert curve_of(model_of(method), **train) == plain


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.1)])
def test_activations_computed_again_change_no_loss(
    method: str, dropout: float, kind: Any, curve_of: Callable[..., list[float]]
) -> None:
    plain = curve_of(model_of(method, dropout=dropout))
    model = model_of(method, dropout=dropout)
    checkpoint_layers(model, kind)
    assert curve_of(model) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "train",
    [EIGHT, EIGHT | ROUNDED, ROUNDED, EIGHT | ROUNDED | ALONE],
    ids=["8bit", "8bit-rounded", "rounded", "smallest"],
)
def test_8_bit_averages_and_rounded_weights_learn_as_exact_ones_do(
    train: dict[str, Any], curve_of: Callable[..., list[float]]
) -> None:
    plain = curve_of(model_of("full"), max_grad_norm=train.get("max_grad_norm", 1.0))
    found = curve_of(model_of("full", train.get("precision", "fp32")), **train)
    assert found != plain and plain[0] - plain[-1] > 0.5
    assert found == pytest.approx(plain, abs=0.05)


def test_masters_in_host_memory_keep_what_bf16_loses(curve_of: Callable[..., list[float]]) -> None:
    """With so small a rate bf16 weights stand still; offloaded AdamW learns as fp32 does."""
    exact = curve_of(model_of("full"), lr=2e-5)
    masters = curve_of(model_of("full", "bf16-pure"), lr=2e-5, precision="bf16-pure", **OFFLOAD)
    assert masters == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("full", EIGHT),
        ("full", EIGHT | ROUNDED),
        ("full", ROUNDED),
        ("full", EIGHT | ROUNDED | ALONE),
        ("full", OFFLOAD | {"precision": "bf16-pure"}),
        ("lora", EIGHT),
        ("lora", OFFLOAD | ALONE),
    ],
    ids=["8bit", "8bit-rounded", "rounded", "smallest", "offload", "lora-8bit", "lora-offload-in-backward"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, method: str, train: dict[str, Any]) -> None:
    precision = train.get("precision", "fp32")
    whole = curve(trainer_of(tmp_path / "whole", model_of(method, precision), save_every=8, **train))
    checkpoint = tmp_path / "whole" / "run" / "checkpoints" / "step-000008"
    model = model_of(method, precision)
    if method == "full":
        stored = type(model).from_pretrained(checkpoint / "model", dtype=next(model.parameters()).dtype)
        model.load_state_dict(stored.state_dict())
    resumed = trainer_of(tmp_path / "resumed", model, **train)
    resumed.restore(checkpoint)
    assert curve(resumed) == whole[8:]


def test_only_b_matrices_learn_faster_with_lora_plus(tmp_path: Path) -> None:
    model = model_of("lora")
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_in(
        tmp_path, model, batches, steps=1, train={"lr": 1e-3}, method={"lora_plus_ratio": 16.0}
    )
    trainer.run()
    moved = {
        name: float((value - before[name]).abs().max())
        for name, value in model.state_dict().items()
        if "lora_B" in name
    }
    # AdamW's first step moves each element by its learning rate.
    assert moved and all(abs(step - 16e-3) < 1e-5 for step in moved.values()), moved


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (ALONE, "Weights whose gradients came before it are updated already"),
        ({}, "The weights were not touched"),
    ],
    ids=["in-backward", "after"],
)
def test_a_bad_gradient_tells_what_became_of_the_weights(
    tmp_path: Path, train: dict[str, Any], said: str
) -> None:
    """The first layer's gradient, which comes last, is not finite: the layers after it have theirs by then."""
    model = make_model("llama-tied")
    first, last = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    before = last.detach().clone()
    first.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunFailed, match=said):
        trainer_of(tmp_path, model, **train).run()
    assert torch.equal(last, before) == (not train)
