"""The smallest memory plan, killed and gone on with by the real command; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import Cli
from tests.e2e.train_helpers import Training, write_recipe
from tunesmith.train.metrics import loss_curve
from tunesmith.workflows.train import train_recipe

SMALLEST: dict[str, Any] = {
    "memory": "smallest", "max_grad_norm": None, "grad_accumulation": 1, "max_steps": 8, "lr": 1e-3,
    "precision": "auto",
}  # fmt: skip


def recipe_in(folder: Path, model: Path, **train: Any) -> Path:
    folder.mkdir()
    return write_recipe(folder, model, method={"type": "full"}, train=SMALLEST | train)


@pytest.mark.slow
def test_the_smallest_plan_goes_on_exactly_after_a_kill(trainee: Path, tmp_path: Path) -> None:
    whole = train_recipe(recipe_in(tmp_path / "whole", trainee), []).run
    killed = Training(recipe_in(tmp_path / "killed", trainee))
    killed.wait_for(lambda: killed.new_events("step") >= 3)
    killed.kill()
    resumed = Training(tmp_path / "killed" / "recipe.yaml")
    code, _, errors = resumed.end()
    assert code == 0, errors
    curve = loss_curve(whole.events)
    assert list(curve) == list(range(1, 9)) and curve[8] < curve[1]
    assert loss_curve(resumed.events) == curve
    resolved = YAML(typ="safe").load(resumed.run / "resolved.yaml")["train"]
    assert (resolved["precision"], resolved["optimizer"]) == ("bf16-pure", "adamw-8bit")
    assert resolved["optimizer_in_backward"] is resolved["stochastic_rounding"] is True


@pytest.mark.parametrize("train", [{"max_grad_norm": 1.0}, {"grad_accumulation": 2}])
def test_what_an_update_in_the_backward_pass_cannot_do_is_refused(
    train: dict[str, Any], trainee: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli("train", recipe_in(tmp_path / "run", trainee, **train))
    assert done.returncode == 2 and "from train.memory: smallest" in done.stderr
    assert "hint: set" in done.stderr
