from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith.core.errors import PlanRefused
from tunesmith.core.paths import free_bytes
from tunesmith.recipe.load import check
from tunesmith.recipe.resolve import Facts, resolve, resolve_steps
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.workflows.plan import matmul_rate, plan_run

FACTS = Facts(context_length=1024, device="cpu", threads=1, precision="fp32", serve_precision="fp32")


def recipe(**sections: dict[str, Any]) -> Recipe:
    base = {"model": {"path": "x"}, "data": {"sources": [{"path": "a", "format": "text"}]}}
    return resolve_steps(resolve(check(base | sections, "r"), FACTS), 100)


def test_lora_plan_counts_adapters_as_trained(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    plan = plan_run(recipe(), model, steps=100, tokens=1000, supervised=300, run=tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.work.trained_parameters == trained
    assert plan.work.total_parameters == before + trained
    assert plan.disk.checkpoint_bytes == trained * 12
    assert plan.work.seconds and plan.work.seconds > 0


def test_full_plan_trains_everything_and_refuses_a_disk_too_small(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    full = recipe(method={"type": "full"}, train={"keep_checkpoints": 10**9, "save_every": 1})
    plan = plan_run(full, model, steps=1, tokens=1000, supervised=300, run=tmp_path)
    assert plan.work.trained_parameters == plan.work.total_parameters
    steps = free_bytes(tmp_path) // plan.disk.checkpoint_bytes + 10
    with pytest.raises(PlanRefused, match="of disk") as caught:
        plan_run(full, model, steps=steps, tokens=1000, supervised=300, run=tmp_path)
    assert caught.value.exit_code == 3 and "keep_checkpoints" in str(caught.value.hint)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"memory": "low"},
        {"optimizer": "adamw-offload", "precision": "bf16-pure"},
        {"optimizer": "adamw-8bit"},
    ],
    ids=["plain", "low", "offload", "8bit"],
)
def test_a_planned_checkpoint_has_the_size_of_a_written_one(
    train: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    full = recipe(method={"type": "full"}, train=train)
    dtype = torch.bfloat16 if full.train.precision == "bf16-pure" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    planned = plan_run(full, model, steps=9, tokens=1000, supervised=300, run=tmp_path).disk
    engine = SingleEngine(model, Supervised(), full)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.begin(1e-3, seed=0)
    engine.update(divide_by=1.0, max_norm=None)
    engine.write(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written == pytest.approx(planned.checkpoint_bytes, rel=0.02)


def test_the_probe_measures_a_rate() -> None:
    assert 1e8 < matmul_rate(torch.float32, torch.device("cpu")) < 1e15
