"""GGUF files against the model they were written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir
from tunesmith.hub.sources import resolve_model
from tunesmith.model.load import load_model
from tunesmith.model.tokenizer import load_tokenizer

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return made


def llama_cpp_order(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each head's rotary pairs interleaved."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm"
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "20"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["2 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        add_tensor(writer, name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: Any, name: str, array: np.ndarray) -> None:
    if name == "lm_head.weight":
        return
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        writer.add_tensor("token_embd.weight" if "embed" in name else "output_norm.weight", array)
        return
    _, _, layer, *rest = name.split(".")
    part = ".".join(rest[:-1])
    if part.endswith("q_proj"):
        array = llama_cpp_order(array, HEADS)
    if part.endswith("k_proj"):
        array = llama_cpp_order(array, KV_HEADS)
    writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", np.ascontiguousarray(array))


def test_same_model_comes_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    files = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert (files.source, files.name) == ("gguf", "tiny")
    assert files.folder.parent == cache_dir() / "models"
    stored = load_file(files.folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(stored[name].float(), tensor), name
    ids = torch.arange(3, 60)[None]
    loaded = load_model(files.folder, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_configs_are_plain(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model))).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = (folder / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in tokenizer
    assert json.loads(tokenizer)["model_max_length"] == 128


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", 4), ("gpt-2", 3)])
def test_digits_are_split_as_in_pretraining(
    model: LlamaForCausalLM, tmp_path: Path, pre: str, tokens: int
) -> None:
    folder = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model, pre=pre))).folder
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("2024").input_ids
    assert len(ids) == tokens
    assert tokenizer.decode(ids) == "2024"
    assert tokenizer("a<|im_end|>").input_ids[-1] == 2
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == 2


def test_unknown_pre_tokenizer_is_told(model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model, pre="something-new")))
    assert "its pre-tokenizer 'something-new' is not known here" in capfd.readouterr().err


def test_second_call_takes_the_cache_and_a_damaged_one_is_made_again(model: Any, tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", model))
    weights = resolve_model(path).folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert resolve_model(path).folder == weights.parent
    assert weights.stat().st_mtime_ns == made
    weights.write_bytes(weights.read_bytes()[:-1])
    resolve_model(path)
    assert len(load_file(weights)) == 20


def test_damaged_file_leaves_nothing(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"tiny\.gguf: the GGUF file could not be read"):
        resolve_model(str(path))
    assert [p.name for p in (cache_dir() / "models").iterdir() if p.is_dir()] == []


def test_unknown_architecture(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture="neverheard")
    with pytest.raises(UserError, match="neverheard"):
        resolve_model(str(path))


def test_part_of_a_split_file(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny-00001-of-00002.gguf", model)
    with pytest.raises(UserError, match="one part of a split GGUF"):
        resolve_model(str(path))


def test_transformers_reads_the_folder_by_itself(model: Any, tmp_path: Path) -> None:
    folder = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model))).folder
    assert AutoTokenizer.from_pretrained(folder)("2024").input_ids == load_tokenizer(folder)("2024").input_ids
