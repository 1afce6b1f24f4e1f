"""int8 and 4-bit exports: exact within half a step, loadable by others, refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from tests.make_run import make_run
from tests.unit.export.test_gguf import FAMILIES, make
from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.export.int8 import round_rows, write_int8
from tunesmith.export.linears import check_linears, empty_model, linears, quantised_bytes
from tunesmith.export.quality import Behaviour, behaviour, compared, load_quantised, mean_loss
from tunesmith.model.load import load_model
from tunesmith.recipe.load import load_recipe
from tunesmith.workflows.calibration import run_rows
from tunesmith.workflows.export_quantised import export_quantised

LAYER = "model.layers.0.mlp.up_proj"


def needs(name: str) -> None:
    pytest.importorskip(name, reason=f"the package {name} is not installed")


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunFolder:
    """A run whose data is there, a fifth of it held out."""
    made = make_run(tmp_path / "one", tiny)
    rows = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in range(3, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.recipe.write_text(
        f"model: {{path: '{tiny}'}}\nmethod: {{type: lora}}\n"
        f"data: {{sources: [{{path: '{tmp_path / 'rows.jsonl'}'}}], eval_fraction: 0.2, max_length: 256}}\n"
    )
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_times_scale_are_the_weights_within_half_a_step(dtype: torch.dtype) -> None:
    weight = (
        torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 1, 64)[:, None]
    )
    weight[7] = 0
    codes, scale = round_rows(weight, dtype)
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, dtype, (64, 1))
    error = (codes.float() * scale.float() - weight).abs()
    assert bool((error <= scale.float() * (0.5 + 1e-3)).all())
    assert not codes[7].any() and int(codes.abs().amax()) == 127


def test_int8_files_hold_the_layers_and_nothing_else_is_rounded(tiny: Path, tmp_path: Path) -> None:
    before = load_model(tiny, dtype=torch.float32, device="cpu").state_dict()
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    names = set(linears(model))
    write_int8(model, tmp_path / "out", dtype=torch.float32)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {n.removesuffix(".weight") for n, t in stored.items() if t.dtype == torch.int8} == names
    for name in names:
        wrong = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"] - before[f"{name}.weight"]
        assert float((wrong.abs() / stored[f"{name}.weight_scale"]).max()) <= 0.501
    others = [n for n, t in stored.items() if t.dtype != torch.int8 and not n.endswith("weight_scale")]
    assert others and all(torch.equal(stored[n], before[n]) for n in others)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors" and section["ignore"] == ["lm_head"]


def test_planned_bytes_are_those_of_the_files(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    planned = quantised_bytes(empty_model(model.config), 8, None, torch.bfloat16)
    write_int8(model, tmp_path, dtype=torch.bfloat16)
    written = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    assert planned == written


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_loads_int8_of_every_family(name: str, tmp_path: Path) -> None:
    needs("compressed_tensors")
    folder = make(FAMILIES[name], tmp_path / "model")
    model = load_model(folder, dtype=torch.float32, device="cpu")
    rows = [(ids := list(range(5, 60)), ids)]
    loss = mean_loss(model, rows)
    write_int8(model, tmp_path / "out", dtype=torch.float32)
    found = load_quantised(tmp_path / "out")
    assert found.get_submodule(LAYER).weight_scale.shape[1] == 1
    assert mean_loss(found, rows) == pytest.approx(loss, abs=0.05)


def test_loss_is_transformers_own(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    ids = list(range(40, 90))
    labels = [-100] * 20 + ids[20:]
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert mean_loss(model, [(ids, labels)]) == pytest.approx(float(theirs), rel=1e-5)


def test_exported_run_is_judged_on_its_held_out_rows(run: RunFolder) -> None:
    needs("compressed_tensors")
    done = export_quantised(run.path, "int8")
    assert done.folder == run.path / "export" / "int8" and done.notes == ()
    assert done.figures["rows"] == len(run_rows(load_recipe(run.recipe), open_tokenizer(run)).judged) > 0
    assert done.figures["loss_after"] == pytest.approx(done.figures["loss_before"], abs=0.1)
    card = (done.folder / "README.md").read_text()
    assert "| loss_after |" in card and "vllm serve FOLDER" in card
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[1] > 3
    (run.path.parent / "rows.jsonl").unlink()
    again = export_quantised(run.path, "int8")
    assert "loss was not compared" in again.notes[0] and "rows" not in again.figures


def open_tokenizer(run: RunFolder) -> Any:
    from tunesmith.model.tokenizer import load_tokenizer

    return load_tokenizer(run.path / "tokenizer")


def test_calibration_rows_are_those_of_the_training_and_not_the_held_out(run: RunFolder) -> None:
    tokenizer = open_tokenizer(run)
    rows = run_rows(load_recipe(run.recipe), tokenizer)
    texts = [tokenizer.decode(ids) for ids in rows.trained]
    assert len(rows.trained) + len(rows.judged) == 37
    assert all("count to" in text and tokenizer.eos_token in text for text in texts)
    assert not {tuple(ids) for ids in rows.trained} & {tuple(ids) for ids, _ in rows.judged}


def test_awq_of_a_run(run: RunFolder) -> None:
    needs("llmcompressor")
    done = export_quantised(run.path, "awq", group_size=32)
    stored = load_file(done.folder / "model.safetensors")
    packed = stored[f"{LAYER}.weight_packed"]
    rows, width = stored[f"{LAYER}.weight_shape"].tolist()
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (rows, width // 8))
    assert tuple(stored[f"{LAYER}.weight_scale"].shape) == (rows, width // 32)
    assert done.figures["loss_after"] == pytest.approx(done.figures["loss_before"], abs=0.3)


def test_awq_needs_the_rows(run: RunFolder) -> None:
    needs("llmcompressor")
    (run.path.parent / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="--to awq: calibrates on the run's own rows"):
        export_quantised(run.path, "awq", group_size=32)


def test_packages_that_are_not_installed_are_named_before_the_work(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package compressed-tensors is not installed") as caught:
        export_quantised(run.path, "int8")
    assert caught.value.hint == "pip install 'tunesmith[int8]'"
    with pytest.raises(UserError, match="package llmcompressor is not installed"):
        export_quantised(run.path, "awq")


def test_shapes_that_do_not_fit_are_refused() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=96, intermediate_size=192, num_attention_heads=3, vocab_size=64
    )
    with pytest.raises(UserError, match=r"--group-size 128: .* with 96 inputs") as caught:
        check_linears(empty_model(config), "awq", 128)
    assert caught.value.hint == "take --group-size 32"
    check_linears(empty_model(config), "awq", 32)
    config.intermediate_size = 200
    with pytest.raises(UserError) as caught:
        check_linears(empty_model(config), "awq", 64)
    assert "--to int8" in str(caught.value.hint)


def test_experts_are_refused() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(
        UserError, match=r"a 'mixtral' model cannot be quantised so: '.*experts.*' is no matrix"
    ):
        check_linears(empty_model(config), "int8", None)


@pytest.mark.parametrize(
    ("to", "group_size", "message"),
    [("int8", 64, "is for awq"), ("awq", 48, "no such groups")],
)
def test_wrong_groups(run: RunFolder, to: Any, group_size: int, message: str) -> None:
    needs("compressed_tensors" if to == "int8" else "llmcompressor")
    with pytest.raises(UserError, match=message):
        export_quantised(run.path, to, group_size=group_size)


def test_a_model_that_lost_what_it_learnt_is_refused(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    before = behaviour(model, [(list(range(5, 60)), list(range(5, 60)))], [[5, 6, 7]], (2,))
    assert compared(before, before, 1)["greedy_answers_equal"] == "1 of 1"
    assert before.loss is not None
    worse = Behaviour(before.loss + 0.6, before.logits, before.answers)
    with pytest.raises(RunFailed, match=r"the loss rose by 0\.6"):
        compared(before, worse, 1)
    broken = Behaviour(float("nan"), [torch.full_like(x, torch.nan) for x in before.logits], before.answers)
    with pytest.raises(RunFailed, match="not finite"):
        compared(before, broken, 1)
