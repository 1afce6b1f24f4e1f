"""Settings that an objective does not use are refused, and rows it cannot learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tunesmith.core.errors import UserError
from tunesmith.recipe.schema import Objective, Recipe
from tunesmith.train.objective import Supervised
from tunesmith.train.preference import Preference
from tunesmith.workflows.train_data import RunData, open_data
from tunesmith.workflows.train_preference import check_objective


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"type": "sft", "beta": 0.2}, r"objective\.beta: 0\.2 is not used by objective\.type sft"),
        ({"type": "orpo", "loss": "ipo"}, r"objective\.loss: ipo"),
        ({"type": "dpo", "desirable_weight": 2}, r"objective\.desirable_weight: 2"),
        ({"type": "kto", "sft_weight": 1}, r"objective\.sft_weight: 1"),
        ({"type": "dpo", "loss": "hinge", "label_smoothing": 0.1}, r"not used by objective\.loss hinge"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_objective(Objective.model_validate(given))


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
def test_settings_that_are_used_pass(kind: str) -> None:
    check_objective(Objective.model_validate({"type": kind, "beta": 0.3}))


def opened(folder: Path, smol: Path, objective: dict[str, Any], rows: int = 12, **data: Any) -> RunData:
    lines = [{"prompt": f"{n}?", "chosen": "yes " * (n + 1), "rejected": "no"} for n in range(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"sources": [{"path": str(folder / "pairs.jsonl")}], "max_length": 64, "workers": 1,
                     "eval_fraction": 0.3} | data,
            "objective": objective,
            "train": {"precision": "fp32"},
        }
    )  # fmt: skip
    return open_data(recipe, AutoTokenizer.from_pretrained(smol))


@pytest.mark.parametrize(("kind", "answers"), [("dpo", 2), ("orpo", 2), ("kto", 3)])
def test_rows_of_the_objective(tmp_path: Path, smol: Path, kind: str, answers: int) -> None:
    found = opened(tmp_path, smol, {"type": kind})
    objective = found.objective(None)
    assert isinstance(objective, Preference) and (objective.reference is None) == (kind == "orpo")
    for batch in [*found.steps(0), *found.eval_batches]:
        assert batch.branches is not None and batch.branches.shape[1] == 1 + answers
        assert objective.units(batch) == batch.num_documents
    assert found.steps.max_length == 64 * answers
    if objective.reference is not None:
        documents = sum(batch.num_documents for batch in objective.reference.documents())
        assert documents == len(found.prepared.train) + len(found.prepared.eval) == 12


def test_answers_alone_are_fine_tuning(tmp_path: Path, smol: Path) -> None:
    with pytest.raises(UserError, match="preference data"):
        opened(tmp_path, smol, {"type": "sft"})
    source = {"path": str(tmp_path / "pairs.jsonl"), "columns": {"prompt": "prompt", "completion": "chosen"}}
    with pytest.raises(UserError, match="preference data"):
        opened(tmp_path, smol, {"type": "sft"}, sources=[source])
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"instruction": "q", "output": "a"}\n')
    rows = opened(tmp_path, smol, {"type": "sft"}, sources=[{"path": str(plain)}], eval_fraction=0.0)
    assert isinstance(rows.objective(None), Supervised) and rows.steps.max_length == 64
    with pytest.raises(UserError, match="a chosen and a rejected answer"):
        opened(tmp_path, smol, {"type": "dpo"}, sources=[{"path": str(plain)}])


def test_kto_needs_a_second_prompt(tmp_path: Path, smol: Path) -> None:
    with pytest.raises(UserError, match="one pair alone"):
        opened(tmp_path, smol, {"type": "kto"}, rows=1, eval_fraction=0.0)
