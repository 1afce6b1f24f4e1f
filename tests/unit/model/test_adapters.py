"""Adapters against peft itself, and the faults that peft only warns about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.make_run import stir
from tunesmith.core.errors import UserError
from tunesmith.model.adapters import attach_lora, load_adapter, merge_adapter, save_adapter
from tunesmith.model.load import load_model

IDS = torch.arange(100, 140)[None]


def base(tiny: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(tiny, dtype=dtype, device="cpu")


def lora(model: Any, **changes: Any) -> PeftModel:
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "seed": 3}
    return attach_lora(model, **(settings | changes))


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    wrapped = lora(base(tiny))
    stir(wrapped, std=0.1, seed=0, only="lora_B")
    save_adapter(wrapped, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_fresh_adapter_changes_nothing_and_only_it_is_trained(tiny: Path) -> None:
    plain = base(tiny)(IDS).logits
    wrapped = lora(base(tiny))
    torch.testing.assert_close(wrapped(IDS).logits, plain, rtol=0, atol=0)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_init_is_peft_s_own_and_leaves_the_random_state(tiny: Path) -> None:
    before = torch.get_rng_state()
    ours = {n: p for n, p in lora(base(tiny)).named_parameters() if "lora_A" in n}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = dict(get_peft_model(base(tiny), config).named_parameters())
    assert len(ours) == 14
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
    torch.set_rng_state(before)


def test_all_linear_leaves_out_the_head(tiny: Path) -> None:
    assert not any("lm_head" in name for name, _ in lora(base(tiny)).named_parameters() if "lora" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_fp32(tiny: Path, adapter: Path, dtype: torch.dtype) -> None:
    for wrapped in (lora(base(tiny, dtype)), load_adapter(base(tiny, dtype), adapter)):
        kinds = {p.dtype for n, p in wrapped.named_parameters() if "lora_" in n}
        assert kinds == {torch.float32}


def test_unknown_target_names_the_near_one(tiny: Path) -> None:
    with pytest.raises(UserError, match="'q_prog'") as caught:
        lora(base(tiny), targets=["v_proj", "q_prog"])
    assert "did you mean 'q_proj'" in str(caught.value.hint)


def test_saved_files_are_peft_s_and_the_same_each_time(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    ours = load_adapter(base(tiny), adapter)
    theirs = PeftModel.from_pretrained(base(tiny), str(adapter)).eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=0)
    assert (ours(IDS).logits - base(tiny)(IDS).logits).abs().max() > 1e-3
    save_adapter(theirs, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_trainable_or_not(tiny: Path, adapter: Path) -> None:
    assert not any(p.requires_grad for p in load_adapter(base(tiny), adapter).parameters())
    trained = [
        n for n, p in load_adapter(base(tiny), adapter, trainable=True).named_parameters() if p.requires_grad
    ]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("rslora", [False, True])
def test_merge_is_w_plus_scale_b_a(tiny: Path, rslora: bool) -> None:
    wrapped = lora(base(tiny), rslora=rslora)
    stir(wrapped, std=0.1, seed=0, only="lora_B")
    layer = wrapped.get_base_model().model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = layer.base_layer.weight.double() + (8 / (2 if rslora else 4)) * b @ a
    logits = wrapped.eval()(IDS).logits
    merged = merge_adapter(wrapped)
    torch.testing.assert_close(
        merged.model.layers[1].mlp.up_proj.weight.double(), expected, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_merge_refuses_what_is_not_finite(tiny: Path) -> None:
    wrapped = lora(base(tiny))
    stir(wrapped, std=float("inf"), seed=0, only="layers.0.mlp.up_proj.lora_B")
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(wrapped)


def change(adapter: Path, **changes: Any) -> None:
    """Set tensors whose names end in a key of `changes` (None: remove it)."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = next((n for n in tensors if n.endswith(key)), key)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.mlp.up_proj.lora_A.weight": None}, "it lacks 1 tensors"),
        ({"base_model.model.model.layers.7.x.lora_A.weight": torch.zeros(4, 64)}, "no place for 1 tensors"),
        (
            {"layers.1.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
            r"is \[4, 32\] where the model needs \[4, 64\]",
        ),
    ],
)
def test_adapter_that_does_not_fit(tiny: Path, adapter: Path, changes: dict[str, Any], message: str) -> None:
    change(adapter, **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(base(tiny), adapter)


def test_adapter_of_another_architecture(tiny: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(base(tiny), adapter)


def test_other_kinds_and_missing_files(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="peft_type is IA3"):
        load_adapter(base(tiny), other)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickles"):
        load_adapter(base(tiny), adapter)


def test_hub_snapshot_is_named_by_id_and_commit(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny, snapshot)
    save_adapter(lora(base(snapshot)), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "a" * 40)


WHOLE = [["input_layernorm", "mlp"], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("changes", [{"dora": True}, *({"modules_to_save": names} for names in WHOLE)])
def test_kinds_come_back_and_merge(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    wrapped = lora(base(tiny), **changes)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) > (14 if changes.get("dora") else 0)
    for name in trained:
        stir(wrapped, std=0.05, seed=0, only=name)
    logits = wrapped.eval()(IDS).logits
    save_adapter(wrapped, tmp_path / "adapter")
    ours = load_adapter(base(tiny), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base(tiny), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(ours(IDS).logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=0, atol=0)
    assert not any(p.requires_grad for p in ours.parameters())
    merged = merge_adapter(ours)
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings
    assert (merged.lm_head.in_features, merged.lm_head.out_features) == (64, 49152)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_a_merged_low_rank_head_leaves_the_tied_embeddings(tiny: Path, tmp_path: Path) -> None:
    wrapped = lora(base(tiny), targets=["lm_head"])
    stir(wrapped, std=0.1, seed=0, only="lora_B")
    logits = wrapped.eval()(IDS).logits
    merged = merge_adapter(wrapped)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.model.embed_tokens.weight, base(tiny).model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["embed_token"]}, "no module of the model is named 'embed_token'"),
        ({"modules_to_save": ["layers"]}, "'layers' is a list of modules"),
        ({"modules_to_save": ["q_proj"], "targets": ["q_proj"]}, "'q_proj' is in method.targets too"),
    ],
)
def test_modules_that_cannot_be_trained_whole(tiny: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora(base(tiny), **changes)
