"""Every method from the recipe to answers: trained, resumed exactly, evaluated, exported, opened to serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.train_helpers import write_recipe
from tunesmith.core.run_folder import RunFolder
from tunesmith.train.metrics import loss_curve
from tunesmith.workflows.evaluate import evaluate_model
from tunesmith.workflows.export import export_run
from tunesmith.workflows.open_served import open_served
from tunesmith.workflows.train import train_recipe

TOKENS = ["<add>", "<sum>"]
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"type": "qlora", "rank": 4},
    "qlora with dora": {"type": "qlora", "rank": 4, "double_quant": False, "dora": True, "dropout": 0.1},
    "dora": {"rank": 4, "dora": True, "rslora": True, "dropout": 0.1},
    "whole modules": {
        "rank": 4,
        "modules_to_save": ["embed_tokens", "input_layernorm"],
        "lora_plus_ratio": 8,
    },
    "frozen layers, noise": {
        "type": "full",
        "freeze": ["model.embed_tokens.*", "model.layers.0.*"],
        "neftune_alpha": 5.0,
    },
    "tokens": {"rank": 4},
    "tokens, qlora": {"type": "qlora", "rank": 4, "lora_plus_ratio": 8.0},
    "tokens, whole": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens, full": {"type": "full"},
}


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, trainee: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trainee`, and the same with a head of its own."""
    if request.param:
        return trainee
    folder = tmp_path_factory.mktemp("untied") / "tiny-untied"
    model = AutoModelForCausalLM.from_pretrained(trainee)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trainee).save_pretrained(folder)
    return folder


def recipe_of(folder: Path, base: Path, name: str) -> Path:
    folder.mkdir()
    steps = {"max_steps": 4, "save_every": 2, "precision": "fp32"}
    recipe = write_recipe(folder, base, method={"type": "lora", "dropout": 0.0} | METHODS[name], train=steps)
    if name.startswith("tokens"):
        rows = folder / "rows.jsonl"
        rows.write_text(
            rows.read_text().replace("Add ", "<add> ").replace('"content": "', '"content": "<sum> ')
        )
        recipe.write_text(
            recipe.read_text().replace("model: {", f"model: {{new_tokens: {json.dumps(TOKENS)}, ")
        )
        assert "new_tokens" in recipe.read_text()
    return recipe


def trained_files(run: RunFolder) -> list[bytes]:
    last = run.checkpoint(4)
    assert run.latest_checkpoint() == last
    return [path.read_bytes() for path in sorted(last.rglob("*.safetensors"))]


def resumed(recipe: Path, done: RunFolder) -> RunFolder:
    """The run that a process killed after step 3 left, gone on with."""
    shutil.rmtree(done.checkpoint(4))
    lines = done.events.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"step": 4' in line)
    done.events.write_text("".join(lines[:cut]))
    result = train_recipe(recipe, [])
    assert result.resumed and result.steps == 4
    return result.run


# Of a model with a head of its own only those that touch it; quick ones for every run of the tests.
CASES = [(name, True) for name in METHODS if name != "dora"] + [("tokens", False), ("tokens, whole", False)]
QUICK = [("qlora with dora", True), ("tokens", False)]
# What they are made of is in others: NF4, new tokens, whole modules, a tied head, each with and without the rest.
WHOLE = [("qlora", True), ("tokens", True), ("tokens, whole", True)]


def marks_of(case: tuple[str, bool]) -> list[pytest.MarkDecorator]:
    return ([] if case in QUICK else [pytest.mark.slow]) + ([pytest.mark.whole] if case in WHOLE else [])


@pytest.mark.parametrize(
    ("name", "base"),
    [pytest.param(*case, marks=marks_of(case)) for case in CASES],
    indirect=["base"],
)
def test_a_method_from_recipe_to_answers(name: str, base: Path, tmp_path: Path) -> None:
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    recipe = recipe_of(tmp_path / "one", base, name)
    result = train_recipe(recipe, [])
    run, rows = result.run, tmp_path / "one" / "rows.jsonl"
    files, curve = trained_files(run), loss_curve(run.events)
    assert result.eval_loss is not None and result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before

    again = resumed(recipe, run)
    assert loss_curve(again.events) == curve
    assert trained_files(again) == files

    how: dict[str, Any] = {"data": rows, "max_rows": 8, "exact_match": False, "threads": 1}
    loss = evaluate_model(str(run.path), **how).loss
    merged = export_run(run.path, "merged")
    assert all(check.passed for check in merged.checks)
    assert evaluate_model(str(merged.folder), **how).loss == pytest.approx(loss, abs=1e-5)
    check_served(run, merged.folder)
    if METHODS[name].get("type") != "full":
        adapter = export_run(run.path, "adapter")
        assert evaluate_model(str(adapter.folder), **how).loss == pytest.approx(loss, abs=1e-6)
        check_with_peft(adapter.folder, merged.folder)
    if name.startswith("tokens"):
        check_tokens(run, merged.folder)


def check_served(run: RunFolder, merged: Path) -> None:
    """The endpoint's model is the merged one, in transformers' own hands."""
    opened = open_served(str(run.path), merge=True, threads=1)
    ids = torch.tensor([opened.tokenizer("<add> 1 and 2. <sum> 3").input_ids])
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(opened.model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)


def check_with_peft(adapter: Path, merged: Path) -> None:
    """peft alone opens the adapter folder, grows the vocabulary by its tokenizer, and answers the same."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = torch.tensor([tokenizer("<add> 1 and 2. <sum> 3").input_ids])
    with torch.inference_mode():
        theirs = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32).eval()(ids)
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids)
    torch.testing.assert_close(theirs.logits, plain.logits, rtol=1e-4, atol=1e-5)


def check_tokens(run: RunFolder, merged: Path) -> None:
    """Both new tokens were seen and trained: their rows have left the common start."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == [2048, 2049] and "<add>" in tokenizer.decode(tokenizer("<add> 1").input_ids)
    rows = load_file(merged / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == 2050
    assert (rows[ids[0]] - rows[ids[1]]).abs().max() > 1e-3
    assert (run.path / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_over_a_run_with_new_tokens(trainee: Path, tmp_path: Path) -> None:
    """The second run's base is the first with its adapter and its tokens merged in."""
    first = train_recipe(recipe_of(tmp_path / "one", trainee, "tokens"), []).run
    second = recipe_of(tmp_path / "two", first.path, "dora")
    run = train_recipe(second, []).run
    opened = open_served(str(run.path), merge=True, threads=1)
    assert len(opened.tokenizer) == opened.model.config.vocab_size == 2050
    merged = export_run(run.path, "merged")
    check_served(run, merged.folder)
