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


def test_the_probe_measures_a_rate() -> None:
    assert 1e8 < matmul_rate(torch.float32, torch.device("cpu")) < 1e15
