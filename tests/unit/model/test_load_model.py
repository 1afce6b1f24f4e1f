"""Loading: every weight comes from the files, and each fault has its own words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, LlamaConfig

from tunesmith.core.errors import UserError
from tunesmith.model.config import context_length
from tunesmith.model.load import ALIGNMENT, load_model
from tunesmith.model.tokenizer import load_tokenizer


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path) -> Any:
    return load_model(folder, dtype=torch.float32, device="cpu")


def test_same_logits_as_transformers(tiny: Path) -> None:
    ids = torch.arange(40)[None]
    ours = load(tiny)
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    assert not ours.training
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


def test_every_weight_begins_where_torch_would_lay_it(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    odd = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(odd, model / "model.safetensors", metadata={"format": "pt", "note": "." * 8})
    found = load(model)
    assert {tensor.data_ptr() % ALIGNMENT for tensor in found.parameters()} == {0}
    head, words = found.get_output_embeddings().weight, found.get_input_embeddings().weight
    assert (head is words) is found.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(tiny: Path, dtype: torch.dtype) -> None:
    assert {p.dtype for p in load_model(tiny, dtype=dtype, device="cpu").parameters()} == {dtype}


def test_missing_weight_is_not_filled_with_random_numbers(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in its files.*layers\.1\.mlp\.up_proj"):
        load(model)


def test_other_shapes_than_the_config(model: Path) -> None:
    edit(model / "config.json", intermediate_size=96)
    with pytest.raises(UserError, match=r"shape|size"):
        load(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "knows no causal language model 'lama'"),
        ({"model_type": ""}, "has no 'model_type'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized \\(gptq\\)"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "its own Python code"),
        ({"num_attention_heads": "four"}, "config.json could not be loaded"),
    ],
)
def test_config_faults(model: Path, changes: dict[str, Any], message: str) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load(model)


def test_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        load(tmp_path)


def test_code_beside_the_weights_is_not_run(model: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (model / "mine.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    edit(model / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(UserError):
        load(model)
    assert not witness.exists()


def test_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(model)


def test_damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(UserError, match="the tokenizer could not be loaded"):
        load_tokenizer(model)


def test_template_file_replaces_the_model_s(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert load_tokenizer(tiny, chat_template=template).chat_template == template.read_text()
    assert load_tokenizer(tiny).chat_template != template.read_text()


def test_template_that_is_no_jinja(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("line one\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"bad\.jinja, line 2"):
        load_tokenizer(tiny, chat_template=template)
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tiny, chat_template=tmp_path / "none.jinja")


def test_context_length() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=777)) == 777
    assert context_length(GPT2Config(n_positions=321)) == 321


def test_model_without_a_template_is_given_as_it_is(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert load_tokenizer(model).chat_template is None
