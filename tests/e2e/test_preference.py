"""Preferences from the command line: trained, killed, resumed to the bit, shown, and refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import Training, write_recipe
from tunesmith.core.events import read_events
from tunesmith.train.metrics import final_events
from tunesmith.workflows.train import train_recipe


def write_pairs(path: Path, count: int = 32) -> Path:
    """Sums, with the right answer chosen and a wrong one rejected."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        numbers = [draw.randint(0, 99) for _ in range(draw.randint(2, 12))]
        chosen, rejected = (f"It is {sum(numbers) + more}." for more in (0, draw.randint(1, 99)))
        lines.append({"prompt": f"Add {numbers}.", "chosen": chosen, "rejected": rejected + " Surely!"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_in(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pairs = write_pairs(folder / "pairs.jsonl")
    given: dict[str, Any] = {
        "data": {"sources": [{"path": str(pairs)}], "eval_fraction": 0.2, "packing": True},
        "train": {"max_steps": 8, "lr": 1e-3, "micro_batch_size": 1},
        "eval": {"every": 3},
    }
    return write_recipe(folder, model, **(given | sections))


def history(run: Path) -> list[dict[str, Any]]:
    """What was measured at every step and evaluation, without times."""
    events = run / "events.jsonl"
    timed = ("time", "seconds", "step_s", "tokens_per_s", "peak_gib")
    found = [*final_events(events, "step"), *final_events(events, "eval")]
    return [{key: value for key, value in event.items() if key not in timed} for event in found]


def finish(recipe: Path) -> list[dict[str, Any]]:
    code, _, errors = (training := Training(recipe)).end()
    assert code == 0, errors
    return history(training.run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ({"type": "full"}, {"type": "dpo", "sft_weight": 0.1}),
        ({"type": "lora", "rank": 4, "dropout": 0.1}, {"type": "kto"}),
    ],
    ids=["full-dpo", "lora-kto"],
)
def test_killed_and_resumed_it_is_the_same(
    tmp_path: Path, trainee: Path, method: dict[str, Any], objective: dict[str, Any]
) -> None:
    given = {"method": method, "objective": objective}
    never = history(train_recipe(recipe_in(tmp_path / "never", trainee, **given), []).run.path)
    recipe = recipe_in(tmp_path / "killed", trainee, **given)
    training = Training(recipe)
    training.wait_for(lambda: training.new_events("step") >= 4)
    training.kill()
    assert finish(recipe) == never
    evals = [event for event in never if "lr" not in event]
    assert evals[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert evals[-1]["reward_margin"] > 0.01 and evals[-1]["loss"] < evals[0]["loss"]
    assert [e["event"] for e in read_events(training.events)].count("resume") == 1


def test_shown_checked_and_trained(tmp_path: Path, trainee: Path, cli: Cli) -> None:
    recipe = recipe_in(tmp_path / "run", trainee, objective={"type": "orpo"}, train={"max_steps": 2})
    shown: Any = cli.json("data", "show", recipe, "-n", "1")
    parts = [(span["part"], span["supervised"]) for span in shown["rows"][0]["spans"]]
    assert parts == [
        ("prompt", False),
        ("chosen", True),
        ("chosen", False),
        ("rejected", True),
        ("rejected", False),
    ]
    text = cli("data", "show", recipe, "-n", "1").stdout
    assert "\nchosen:\n" in text and "Surely!<|im_end|>⟧" in text
    trained: Any = cli.json("train", recipe)
    assert trained["steps"] == 2 and trained["eval_loss"] < trained["eval_loss_before"]


def test_what_cannot_work_is_refused(tmp_path: Path, trainee: Path, cli: Cli) -> None:
    recipe = recipe_in(tmp_path / "run", trainee, objective={"type": "dpo"})
    done = cli("train", recipe, "--set", "objective.desirable_weight=2")
    assert done.returncode == 2 and "hint:" in done.stderr
    assert "objective.desirable_weight: 2.0 is not used by objective.type dpo" in done.stderr
