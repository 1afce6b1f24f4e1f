"""GGUF files: what readers of others find in them is the model, and llama.cpp answers as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.make_run import make_run, stir
from tunesmith.core.errors import RunFailed, TunesmithError, UserError
from tunesmith.core.run_folder import manifest_holds
from tunesmith.export.gguf import (
    DIRECT,
    GgufModel,
    check_family,
    check_gguf,
    end_ids,
    error_bound,
    neighbours,
    usable_context,
    write_gguf,
)
from tunesmith.export.gguf_tokenizer import CONTROL, UNUSED, gguf_tokenizer, pre_tokenizer_name, probe_texts
from tunesmith.hub.gguf_file import convert
from tunesmith.workflows import export_gguf as workflow
from tunesmith.workflows.export_gguf import export_gguf

IDS = torch.arange(300, 340)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 704,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama3-rope": LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "wide-heads": LlamaConfig(**SMALL, head_dim=32, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, tie_word_embeddings=False, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
}


def make(config: Any, folder: Path) -> Path:
    """A random model of `config` with a small tokenizer; biases and norms that are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    stir(model, std=0.05, seed=3)
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(FAMILIES["llama"], tmp_path_factory.mktemp("small") / "small")


def exported(folder: Path, target: Path, quant: str) -> Path:
    return next(export_gguf(str(folder), quant=quant, output=target).folder.glob("*.gguf"))


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    folder = make(FAMILIES[name], tmp_path / "model")
    path = exported(folder, tmp_path / "out", "f32")
    # By GGUF a config lacks the size of a head; a Mistral is a Llama there.
    config = {} if name == "mistral" else {"config": FAMILIES[name]}
    back = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **config
    )
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, state = back.state_dict(), ours.state_dict()
    # transformers reads neither Llama 3's frequencies nor attention biases of a Llama out of GGUF.
    state = {key: value for key, value in state.items() if key in found}
    for key, value in state.items():
        assert torch.equal(found[key], value), key
    if name not in ("llama3-rope", "wide-heads"):
        torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)


def test_metadata_is_the_configs(tmp_path: Path) -> None:
    path = exported(make(FAMILIES["qwen3"], tmp_path / "model"), tmp_path / "out", "f32")
    found = fields(path)
    assert found["general.architecture"] == "qwen3" and found["qwen3.block_count"] == 2
    assert (found["qwen3.context_length"], found["qwen3.attention.key_length"]) == (256, 32)
    assert (found["qwen3.attention.head_count"], found["qwen3.attention.head_count_kv"]) == (4, 2)
    assert found["tokenizer.ggml.pre"] == "gpt-2" and found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert found["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["tokenizer.ggml.token_type"][:3] == [CONTROL] * 3
    assert found["tokenizer.ggml.token_type"][-4:] == [UNUSED] * 4
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(path).tensors}


def test_rows_of_q_and_k_are_neighbours() -> None:
    rows = np.arange(8)[:, None]
    assert neighbours(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert neighbours(rows[:, 0], 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_llama3_frequencies_are_transformers(tmp_path: Path) -> None:
    config = FAMILIES["llama3-rope"]
    path = exported(make(config, tmp_path / "model"), tmp_path / "out", "f32")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.from_numpy(tensor.data.copy()), wanted)
    assert tensor.data.max() == pytest.approx(8.0) and tensor.data.min() == pytest.approx(1.0)


@pytest.mark.parametrize("fmt", DIRECT)
def test_every_format_is_within_its_rounding(fmt: str, small: Path, tmp_path: Path) -> None:
    done = export_gguf(str(small), quant=fmt, output=tmp_path / "out")
    (check,) = done.checks
    assert check.passed and check.bound == error_bound(fmt)
    assert (check.difference == 0) == (fmt in ("f32",)), check
    path = next(done.folder.glob("*.gguf"))
    back = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted = load_file(small / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    found = back.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.linalg.norm(found - wanted) <= error_bound(fmt) * torch.linalg.norm(wanted)
    assert manifest_holds(done.folder)
    sizes = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
    assert sizes["blk.0.attn_norm.weight"] == "f32" and sizes["blk.0.ffn_down.weight"] == fmt
    assert sizes["token_embd.weight"] == ("q8_0" if fmt.startswith("q") else fmt)


def test_our_own_reader_brings_back_model_and_tokenizer(tiny: Path, tmp_path: Path) -> None:
    path = exported(tiny, tmp_path / "out", "bf16")
    convert(path, tmp_path / "back")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny, tmp_path / "back"))
    for text in (*probe_texts(), "<|im_start|>user\nHi 123<|im_end|>"):
        assert after(text).input_ids == before(text).input_ids, text
    assert after.chat_template == before.chat_template and after.eos_token_id == 2
    wanted = load_file(tiny / "model.safetensors")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name


def test_a_run_is_exported_with_its_adapter(small: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one", small)
    done = export_gguf(str(run.path), quant="f32")
    assert done.folder == run.path / "export" / "gguf" / "f32" and done.step == 10
    assert [check.passed for check in done.checks] == [True, True]
    path = done.folder / "one-F32.gguf"
    back = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    changed = logits(back) - logits(base)
    assert changed.abs().max() > 1e-2
    from peft import PeftModel

    trained = PeftModel.from_pretrained(base, str(run.checkpoint(10) / "adapter"))
    torch.testing.assert_close(logits(back), logits(trained), rtol=1e-4, atol=1e-4)
    assert export_gguf(str(run.path), quant="f32", checkpoint=5).step == 5


def test_the_default_format_is_the_weights_own(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "model")
    done = export_gguf(str(tmp_path / "model"), output=tmp_path / "out")
    assert done.dtype == "bf16" and done.checks[0].difference == 0


def test_refusals_come_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TUNESMITH_LLAMA_QUANTIZE", raising=False)
    with pytest.raises(UserError, match="'llama-quantize' writes this format"):
        export_gguf(str(small), quant="q4_k_m", output=tmp_path / "out")
    monkeypatch.setenv("TUNESMITH_LLAMA_QUANTIZE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none' of \$TUNESMITH_LLAMA_QUANTIZE is no program"):
        export_gguf(str(small), quant="q4_k_m", output=tmp_path / "out")
    with pytest.raises(UserError, match="'q9' is not a format"):
        export_gguf(str(small), quant="q9", output=tmp_path / "out")
    with pytest.raises(UserError, match="needs a place"):
        export_gguf(str(small), quant="f32")
    with pytest.raises(UserError, match="no run folder"):
        export_gguf(str(small), output=tmp_path / "out", checkpoint=3)
    monkeypatch.setattr(workflow, "OTHER_FILES_BYTES", 2**60)
    with pytest.raises(TunesmithError, match="of disk"):
        export_gguf(str(small), quant="f32", output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope of type 'dynamic'",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "attention_factor": 0.7,
                }
            },
            "attention_factor",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_family(LlamaConfig(**SMALL, **change))


def test_other_families_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="a 'gpt2' model cannot be written"):
        check_family(GPT2Config())


def test_a_sliding_window_ends_the_context() -> None:
    assert usable_context(MistralConfig(**SMALL, sliding_window=100)) == 100
    assert usable_context(MistralConfig(**SMALL, sliding_window=None)) == 256
    assert usable_context(Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=100)) == 256


def test_a_damaged_file_is_noticed(small: Path, tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small)
    words = gguf_tokenizer(tokenizer, 704)
    model = GgufModel("small", source.config, source.state_dict(), words, None, 1, None, 2, (2,))
    path = tmp_path / "one.gguf"
    for fmt in ("f32", "q8_0"):
        write_gguf(model, path, fmt)
        data = bytearray(path.read_bytes())
        data[-100] ^= 0x40
        path.write_bytes(bytes(data))
        with pytest.raises(RunFailed, match=r"is not what was written|not finite"):
            check_gguf(model, path, fmt)
    big = {name: t * 1e6 if "down_proj" in name else t for name, t in source.state_dict().items()}
    with pytest.raises(RunFailed, match="not finite as F16"), np.errstate(over="ignore"):
        write_gguf(GgufModel("big", source.config, big, words, None, 1, None, 2, (2,)), path, "f16")


def test_stop_ids_have_three_places(small: Path) -> None:
    words = gguf_tokenizer(AutoTokenizer.from_pretrained(small), 704)
    model = GgufModel("m", LlamaConfig(**SMALL), {}, words, None, 1, None, 0, (2, 0, 5))
    assert end_ids(model) == [0, 2, 5]


# -- tokenizers --------------------------------------------------------------------------------------

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def test_pre_tokenizers_are_known_by_what_they_do() -> None:
    assert pre_tokenizer_name(split(QWEN2)) == "qwen2"
    assert (
        pre_tokenizer_name(split(QWEN2.replace(r"\p{N}", r"\p{N}{1,3}", 3).replace("{1,3}]", "]")))
        == "llama-bpe"
    )
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert pre_tokenizer_name(split(gpt2)) == "gpt-2"
    for other in (split(r"\s+|\S+"), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        with pytest.raises(UserError, match="cuts text as none of"):
            pre_tokenizer_name(other)


def trained(*, byte_fallback: bool, **parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None)
    )
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = [] if byte_fallback else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", *([f"<0x{n:02X}>" for n in range(256)] if byte_fallback else [])]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*probe_texts(), "the cat sat on the mat, the other cat " * 30], trainer)
    if byte_fallback:  # byte tokens belong to the vocabulary, they are no special tokens
        raw = json.loads(tokenizer.to_str())
        raw["added_tokens"] = raw["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = trained(byte_fallback=False, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sentencepiece(scheme: str = "legacy") -> PreTrainedTokenizerFast:
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        return trained(byte_fallback=True, normalizer=normalizers.Sequence(steps))
    return trained(
        byte_fallback=True, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    )


def test_sentencepiece_scores_follow_the_merges() -> None:
    words = gguf_tokenizer(sentencepiece(), 800)
    assert words.model == "llama" and words.add_space_prefix and words.notes == ()
    assert words.scores is not None and words.types[3] == 6 and words.types[790] == UNUSED
    numbers = {text: number for number, text in enumerate(words.tokens)}
    assert words.scores[numbers["the"]] < words.scores[numbers["th"]] < 0.5
    assert gguf_tokenizer(sentencepiece("never"), 800).add_space_prefix is False
    assert "begins with one" in gguf_tokenizer(sentencepiece("always"), 800).notes[0]
    assert "control token" in gguf_tokenizer(sentencepiece("first"), 800).notes[1]


def test_what_llama_cpp_would_tokenise_otherwise_is_refused() -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = trained(byte_fallback=False, pre_tokenizer=level)
    assert gguf_tokenizer(plain, 700).pre == "gpt-2"
    with pytest.raises(UserError, match="embeddings have 600 rows"):
        gguf_tokenizer(plain, 600)
    lower = trained(byte_fallback=False, pre_tokenizer=level, normalizer=normalizers.Lowercase())
    with pytest.raises(UserError, match="normalizer 'Lowercase'"):
        gguf_tokenizer(lower, 700)
    composed = trained(byte_fallback=False, pre_tokenizer=level, normalizer=normalizers.NFC())
    assert "NFC" in gguf_tokenizer(composed, 700).notes[0]
    whole = trained(byte_fallback=False, pre_tokenizer=level)
    whole.backend_tokenizer.model.ignore_merges = True
    with pytest.raises(UserError, match="ignore_merges: true"):
        gguf_tokenizer(whole, 700)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="WordLevel model"):
        gguf_tokenizer(words, 700)
