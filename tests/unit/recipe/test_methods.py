"""Settings of the method that have no effect or cannot work are named, all at once."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.recipe.load import check
from tunesmith.recipe.methods import check_method
from tunesmith.recipe.schema import Recipe


def recipe(parallel: dict[str, Any] | None = None, **method: Any) -> Recipe:
    data = {"sources": [{"path": "a", "format": "text"}]}
    sections = {"model": {"path": "x"}, "data": data, "method": method, "parallel": parallel or {}}
    return check(sections, "r")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"type": "full", "dora": True}, r"method\.dora: is of adapters"),
        ({"type": "full", "rslora": True}, r"method\.rslora: is of adapters"),
        ({"type": "full", "lora_plus_ratio": 16}, r"method\.lora_plus_ratio: is of adapters"),
        ({"type": "full", "modules_to_save": ["lm_head"]}, r"method\.modules_to_save: is of adapters"),
        ({"type": "lora", "freeze": ["model.norm.*"]}, r"method\.freeze: lora freezes all"),
        ({"type": "qlora", "parallel": {"engine": "fsdp"}}, r"parallel\.engine: fsdp shards weights"),
        (
            {"type": "qlora", "parallel": {"engine": "deepspeed", "zero_stage": 3}},
            r"parallel\.engine: deepspeed with zero_stage 3 shards",
        ),
    ],
)
def test_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_method(recipe(**method))
    assert caught.value.exit_code == 2 and caught.value.hint


def test_several_faults_come_together() -> None:
    with pytest.raises(RecipeErrors) as caught:
        check_method(recipe(type="full", dora=True, rslora=True))
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    "method",
    [
        {"type": "full", "freeze": ["model.norm.*"], "neftune_alpha": 5.0},
        {"type": "full", "rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["q_proj"]},
        {"type": "lora", "dora": True, "rslora": True, "lora_plus_ratio": 16, "modules_to_save": ["norm"]},
        {"type": "qlora", "dora": True, "parallel": {"engine": "ddp"}},
        {"type": "qlora", "parallel": {"engine": "deepspeed", "zero_stage": 2}},
    ],
)
def test_taken(method: dict[str, Any]) -> None:
    check_method(recipe(**method))
