"""Exports of a run: loadable by everyone else, published only when they answer as the trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.make_run import make_run, stir
from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.export.merge import write_merged, write_plain
from tunesmith.export.probes import probe_logits, relative_difference, rounding_noise
from tunesmith.hub.sources import resolve_model
from tunesmith.model.adapters import load_adapter
from tunesmith.model.load import load_model
from tunesmith.workflows.export import export_run

IDS = torch.arange(200, 260)[None]
PROBES = [list(range(100, 130)), list(range(7))]


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs" / "one", tiny)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


def trained(run: RunFolder, tiny: Path, step: int = 10) -> torch.Tensor:
    """Logits of the checkpoint by peft and transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(run.checkpoint(step) / "adapter")))


def test_peft_loads_the_adapter_with_its_base(run: RunFolder, tiny: Path) -> None:
    done = export_run(run.path, "adapter")
    assert (done.folder, done.step) == (run.adapter, 10)
    model = AutoPeftModelForCausalLM.from_pretrained(str(done.folder), dtype=torch.float32)
    torch.testing.assert_close(logits(model), trained(run, tiny), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(done.folder).chat_template


def test_transformers_loads_the_merged_model(run: RunFolder, tiny: Path) -> None:
    done = export_run(run.path, "merged")
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model), trained(run, tiny), rtol=1e-4, atol=1e-5)
    assert [check.passed for check in done.checks] == [True, True]
    assert done.checks[0].difference <= 1e-4 == done.checks[0].bound
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    adapter = AutoPeftModelForCausalLM.from_pretrained(
        export_run(run.path, "adapter").folder, dtype=torch.float32
    )
    answers = [m.generate(**prompt, max_new_tokens=20, do_sample=False) for m in (model, adapter)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)]
)
def test_dtype_of_merged_weights(run: RunFolder, dtype: str | None, kind: torch.dtype) -> None:
    done = export_run(run.path, "merged", dtype=dtype)
    tensors = load_file(done.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    assert done.checks[1].passed and done.checks[1].difference > 0


def test_merged_dtype_is_the_base_s(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    shutil.copytree(tiny, base)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base)
    done = export_run(make_run(tmp_path / "one", base).path, "merged")
    assert done.dtype == "bfloat16"


def test_files_beside_the_weights(run: RunFolder, tiny: Path) -> None:
    (tiny_config := run.path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for kind in ("adapter", "merged"):
        folder = export_run(run.path, kind).folder
        assert (folder / "chat_template.jinja").read_text() == tiny_config.read_text()
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
        assert str(run.path) not in (folder / "tokenizer_config.json").read_text()
        about = json.loads((folder / "export.json").read_text())
        assert (about["step"], about["to"], about["run"]) == (10, kind, "one")
        card = (folder / "README.md").read_text()
        assert "held-out loss at step 0 | 4.5" in card and "held-out loss at step 10 | 2.5" in card
        assert "sources: [{path: rows.jsonl}]" in card and f'base_model: "{tiny}"' in card
        assert not list(folder.parent.glob(".*"))


def test_an_api_key_stays_at_home(run: RunFolder) -> None:
    run.recipe.write_text(run.recipe.read_text() + "serve: {api_key: my-secret-key}\n")
    folder = export_run(run.path, "adapter").folder
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json", ".jinja")]
    assert "rows.jsonl" in "".join(texts) and "my-secret-key" not in "".join(texts)


def test_older_checkpoint_to_a_folder_of_its_own(run: RunFolder, tiny: Path, tmp_path: Path) -> None:
    done = export_run(run.path, "merged", output=tmp_path / "out", checkpoint=5, dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), trained(run, tiny, 5), rtol=1e-4, atol=1e-5)
    assert done.step == 5
    export_run(run.path, "merged", output=tmp_path / "out")  # an earlier export is replaced


def test_full_run(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "full", tiny, full=True)
    done = export_run(run.path, "merged")
    theirs = AutoModelForCausalLM.from_pretrained(run.checkpoint(10) / "model", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="trained all weights, so it has no adapter"):
        export_run(run.path, "adapter")


def test_run_over_a_run(tiny: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny)
    second = make_run(tmp_path / "second", first.path)
    merged = export_run(second.path, "merged")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), str(first.checkpoint(10) / "adapter")
    ).merge_and_unload()
    expected = logits(PeftModel.from_pretrained(model, str(second.checkpoint(10) / "adapter")))
    ours = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    adapter = export_run(second.path, "adapter").folder
    assert resolve_model(str(adapter)).base_adapters == (first.checkpoint(10) / "adapter",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "merged", "checkpoint": 7}, "no complete checkpoint of that step"),
        ({"to": "adapter", "dtype": "bf16"}, "--dtype is for merged models"),
        ({"to": "merged", "dtype": "int8"}, "'int8' is not a format"),
    ],
)
def test_wrong_options(run: RunFolder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_run(run.path, **options)


def test_other_folders_are_not_replaced(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no earlier export"):
        export_run(run.path, "adapter", output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_no_checkpoint_and_no_run(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "none", tiny, steps=())
    run.checkpoints.mkdir()
    with pytest.raises(UserError, match="no complete checkpoint to export"):
        export_run(run.path, "merged")
    with pytest.raises(UserError, match="not a run folder"):
        export_run(tiny, "merged")


def test_changed_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    run = make_run(tmp_path / "one", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the base model has changed since the training: model\.safetensors"):
        export_run(run.path, "merged")


def adapted(run: RunFolder, tiny: Path) -> Any:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    return load_adapter(model, run.checkpoint(10) / "adapter")


@pytest.mark.parametrize("layer", ["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"])
def test_wrong_merge_is_refused(run: RunFolder, tiny: Path, tmp_path: Path, layer: str) -> None:
    """One module of the adapter is damaged in memory after the reference logits were taken."""
    model = adapted(run, tiny)
    part = model.get_base_model().get_submodule(f"model.{layer}")
    merge = part.merge

    def wrong_merge(*args: Any, **kwargs: Any) -> None:
        part.scaling["default"] *= 0.5
        merge(*args, **kwargs)

    part.merge = wrong_merge
    with pytest.raises(RunFailed, match="merged weights against adapter: logits differ"):
        write_merged(model, tmp_path / "out", dtype=torch.float32, prompts=PROBES)


def test_stored_weights_that_moved_more_than_rounding_are_refused(
    run: RunFolder, tiny: Path, tmp_path: Path
) -> None:
    reference = probe_logits(adapted(run, tiny), PROBES)
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    stir(model, std=0.02, seed=1)
    with pytest.raises(RunFailed, match="files read back"):
        write_plain(model, tmp_path / "out", dtype=torch.bfloat16, prompts=PROBES, reference=reference)


def test_fp16_overflow_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(RunFailed, match="not finite as float16"):
        write_plain(model, tmp_path / "out", dtype=torch.float16, prompts=PROBES)


def test_refused_export_publishes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.export.merge.FP32_BOUND", 0.0)
    with pytest.raises(RunFailed):
        export_run(run.path, "merged")
    assert list((run.path / "export").iterdir()) == []


def test_difference_of_logits() -> None:
    a, b = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.0, -3.0]])
    assert relative_difference([a], [b]) == 0.25
    assert relative_difference([a, a], [a, a]) == 0
    assert relative_difference([a], [torch.full((1, 2), float("nan"))]) == float("inf")


def test_rounding_noise_is_bounded_seeded_and_undone(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = []
    for _ in range(2):
        with rounding_noise(model, {name}, 2**-8):
            seen.append(model.get_parameter(name).clone())
            change = (seen[-1] / before[name] - 1).abs()
            assert 0 < change.max() <= 2**-8 * 1.001
            assert torch.equal(model.model.norm.weight, before["model.norm.weight"])
    assert torch.equal(*seen)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
