"""tunesmith export on a run that tunesmith train made: peft, transformers and our engine answer alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import warm
from tunesmith.model.generate import generate
from tunesmith.model.requests import SamplingParams
from tunesmith.workflows.open_model import open_model

RECIPE = """\
model: {{path: '{model}'}}
data: {{sources: [{{path: '{data}'}}], eval_fraction: 0.2}}
train: {{max_steps: 4, micro_batch_size: 2, lr: 1e-2, precision: fp32}}
method: {{rank: 4}}
"""


def test_trained_run_exports_and_all_engines_agree(cli: Any, tiny: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in range(3, 33)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "count.yaml"
    recipe.write_text(RECIPE.format(model=tiny, data=data))
    run = Path(str(cli.json("train", recipe, cwd=tmp_path)["run"]))
    done = {kind: cli.json("export", run, "--to", kind, env=warm.COLD) for kind in ("adapter", "merged")}
    assert all(check["passed"] for check in done["merged"]["checks"])

    tokenizer = AutoTokenizer.from_pretrained(done["merged"]["folder"])
    chat = [{"role": "user", "content": "count to 9"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    merged = AutoModelForCausalLM.from_pretrained(done["merged"]["folder"], dtype=torch.float32)
    adapter = AutoPeftModelForCausalLM.from_pretrained(done["adapter"]["folder"], dtype=torch.float32)
    length = prompt["input_ids"].shape[1]
    answers = [
        model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, length:].tolist()
        for model in (merged, adapter)
    ]
    opened = open_model(str(run), dtype=torch.float32, device="cpu")
    params = SamplingParams(max_new_tokens=24, stop_ids=(2,))
    ours = generate(opened.model, [prompt["input_ids"][0].tolist()], params)[0].ids
    assert answers[0] == answers[1]
    assert [token for token in answers[0] if token != 2] == ours
    card = (Path(str(done["merged"]["folder"])) / "README.md").read_text()
    assert "held-out loss at step 4" in card and "| tokens trained on |" in card and "rows.jsonl" in card


def test_errors_have_codes(cli: Any, tiny: Path) -> None:
    done = cli("export", tiny, "--to", "merged", "--json")
    assert done.returncode == 2
    assert "not a run folder" in json.loads(done.stdout)["error"]["what"]
    assert cli("export", tiny, "--to", "gguf").returncode == 2
