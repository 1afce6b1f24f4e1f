"""The disk that a checkpoint needs is known before the first one is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_model, resolved_recipe
from tests.small_disk import mounted
from tunesmith.core.run_folder import RunFolder
from tunesmith.model.adapters import attach_lora
from tunesmith.recipe.schema import Recipe
from tunesmith.train.checkpoint import SMALL_FILES_BYTES, SaveFailed, State, folder_bytes, write
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import cast_trained
from tunesmith.workflows.plan_files import planned_checkpoint
from tunesmith.workflows.plan_model import counted

PURE = {"precision": "bf16-pure"}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "full": (None, {}),
    "lora": ({}, {}),
    "tied embeddings saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "8 bits": (None, {"optimizer": "adamw-8bit"}),
    "adapters in 8 bits": ({}, {"optimizer": "adamw-8bit"}),
    "offload": (None, {"optimizer": "adamw-offload"}),
    "offload of bf16": (None, {"optimizer": "adamw-offload"} | PURE),
    "stochastic rounding": (None, {"stochastic_rounding": True} | PURE),
    "8 bits, stochastic rounding": (None, {"optimizer": "adamw-8bit", "stochastic_rounding": True} | PURE),
}


def recipe_for(adapters: dict[str, Any] | None, train: dict[str, Any]) -> Recipe:
    return resolved_recipe(
        train={"precision": "fp32"} | train, method={"type": "full" if adapters is None else "lora"}
    )


def engine_for(adapters: dict[str, Any] | None, train: dict[str, Any]) -> SingleEngine:
    model = make_model("llama-tied")
    if adapters is not None:
        settings: dict[str, Any] = {"rank": 16, "alpha": 4, "dropout": 0.0, "rslora": False, "seed": 0}
        model = attach_lora(model, targets="all-linear", **settings, **adapters)
    recipe = recipe_for(adapters, train)
    assert recipe.train.precision != "auto"
    if recipe.train.precision == "bf16-pure":
        model = model.to(torch.bfloat16)
    cast_trained(model, recipe.train.precision)
    return SingleEngine(model, Supervised(), recipe)


def take_a_step(engine: SingleEngine) -> None:
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    engine.begin(1e-3, seed=0)
    engine.update(divide_by=1.0, max_norm=None)


@pytest.mark.parametrize("case", CASES)
def test_the_first_checkpoint_has_the_predicted_size(tmp_path: Path, case: str) -> None:
    engine = engine_for(*CASES[case])
    predicted = engine.num_bytes()
    take_a_step(engine)
    written = folder_bytes(write(RunFolder(tmp_path), State(step=1), engine))
    assert predicted <= written <= 1.05 * predicted, f"{predicted:,} predicted, {written:,} written"


@pytest.mark.parametrize("case", CASES)
def test_the_plan_says_the_same(case: str) -> None:
    engine = engine_for(*CASES[case])
    recipe = recipe_for(*CASES[case])
    planned = planned_checkpoint(recipe, counted(engine.model))
    assert planned == pytest.approx(engine.num_bytes(), rel=0.05)


def test_a_disk_for_less_is_refused_before_the_first_save(tmp_path: Path) -> None:
    engine = engine_for(*CASES["full"])
    take_a_step(engine)
    with mounted(tmp_path / "disk", mib=4) as disk:
        assert engine.num_bytes() < 4 * 2**20 < engine.num_bytes() + SMALL_FILES_BYTES
        with pytest.raises(SaveFailed, match="a checkpoint needs"):
            write(RunFolder(disk), State(step=1), engine)
        assert not list((disk / "checkpoints").iterdir())
