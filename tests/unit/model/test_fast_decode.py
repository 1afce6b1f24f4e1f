"""The forward pass in kernels against transformers': the same values, whatever stands beside a row."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.greedy import greedy
from tests.make_run import stir
from tunesmith.model import attention, cpu_kernels
from tunesmith.model.adapter_bank import AdapterBank, Span
from tunesmith.model.adapters import attach_lora
from tunesmith.model.attention import PackedLayout
from tunesmith.model.fast_decode import make_forward
from tunesmith.model.fused_adapters import AdapterTable
from tunesmith.model.generate import generate
from tunesmith.model.kv_cache import CacheLayout, Chunk, KVCache
from tunesmith.model.load import load_model
from tunesmith.model.requests import SamplingParams
from tunesmith.model.served_weights import PackedLinear, pack_weights
from tunesmith.model.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
}
KNOWN = [kind for kind in MODELS if kind != "gemma"]
STARTS = [0, 25, 26, 40]


@pytest.fixture(autouse=True)
def kernels() -> cpu_kernels.Kernels:
    found = cpu_kernels.load()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def model_of(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # all ones and zeros else
                nn.init.normal_(parameter, 0.5, 0.5)
    attention.install(model, max_length=256)
    return model


def inputs() -> tuple[Tensor, Tensor, PackedLayout]:
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (1, STARTS[-1]), generator=made)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(STARTS)])
    return ids, positions[None], PackedLayout(STARTS)


def reference(model: Any) -> Tensor:
    with torch.inference_mode():
        return attention.hidden_states(model, *inputs())


def passes_in_kernels(model: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a pass goes without transformers' decoder."""
    forward = make_forward(model)
    calls: list[int] = []
    decoder = type(model.get_decoder())
    own = decoder.forward
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(decoder, "forward", lambda *a, **k: calls.append(1) or own(*a, **k))
        found = forward(*inputs())
    torch.testing.assert_close(found, reference(model), atol=2e-5, rtol=2e-5)
    return not calls


@pytest.mark.parametrize("kind", KNOWN)
def test_plain_and_packed_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    wanted = reference(model)
    assert passes_in_kernels(model, monkeypatch)
    pack_weights(model, "fp32")
    assert passes_in_kernels(model, monkeypatch)
    torch.testing.assert_close(reference(model), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("format", ["bf16", "int8", "nf4"])
def test_other_formats_are_computed_as_their_modules_are(
    format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen3")
    pack_weights(model, format)
    assert passes_in_kernels(model, monkeypatch)


def test_other_models_are_transformers_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not passes_in_kernels(model_of("gemma"), monkeypatch)
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "seed": 0}
    tuned = attach_lora(model_of("llama"), **lora).eval()
    forward = make_forward(tuned)
    with torch.inference_mode():
        assert torch.equal(forward(*inputs()), reference(tuned))
    half = model_of("llama").to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(make_forward(half)(*inputs()), reference(half))


@pytest.mark.parametrize("where", ["layers.0", "layers.1.self_attn", "layers.0.mlp", "norm"])
def test_hooks_are_not_passed_over(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    forward = make_forward(model)
    seen: list[str] = []
    handle = model.get_decoder().get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    with torch.inference_mode():
        forward(*inputs())
    assert seen == [where]
    handle.remove()
    assert passes_in_kernels(model, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj", "embed_tokens"])
def test_hooks_of_what_is_called_change_the_result(name: str, packed: bool) -> None:
    model = model_of("llama")
    if packed:
        pack_weights(model, "fp32")
    forward = make_forward(model)
    decoder = model.get_decoder()
    part = decoder.embed_tokens if name == "embed_tokens" else decoder.layers[1].get_submodule(name)
    part.register_forward_hook(lambda layer, given, y: y * 1.5)
    with torch.inference_mode():
        torch.testing.assert_close(forward(*inputs()), reference(model), atol=2e-5, rtol=2e-5)


ADAPTERS: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 4, "target_modules": "all-linear"},
    "some": {"r": 9, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    "one": {"r": 17, "target_modules": ["down_proj"], "layers_to_transform": [1]},
}
SPANS: list[Span] = [(None, 2), ("some", 3), ("everywhere", 1), ("one", 6), ("some", 1), ("everywhere", 27)]


def with_bank(model: Any, folder: Path, kind: str) -> AdapterBank:
    """A bank with ADAPTERS, made by peft and read from `folder`."""
    bank = AdapterBank(model)
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        wrapped = get_peft_model(model_of(kind), LoraConfig(task_type="CAUSAL_LM", **settings))
        stir(wrapped, std=0.2, seed=number, only="lora_")
        wrapped.save_pretrained(str(folder / name))
        bank.load(name, folder / name)
    return bank


def mixed(model: Any, bank: AdapterBank, spans: list[Span], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Hidden states in kernels, no linear layer called; checked against the layers called one by one."""
    forward = make_forward(model)
    with torch.inference_mode(), bank.selected(spans), monkeypatch.context() as patch:
        wanted = reference(model)
        patch.setattr(PackedLinear, "forward", None)
        found = forward(*inputs())
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    return found[0]


@pytest.mark.parametrize("format", ["fp32", "nf4"])
def test_adapters_are_computed_in_the_kernels(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama-biased")
    pack_weights(model, format)
    bank = with_bank(model, tmp_path, "llama-biased")
    with torch.inference_mode():
        plain = make_forward(model)(*inputs())[0]
    found = mixed(model, bank, SPANS, monkeypatch)
    assert torch.equal(found[:2], plain[:2])
    changes = (found - plain).abs().amax(1)
    assert float(changes[2:].min()) > 0.01
    with torch.inference_mode():
        assert torch.equal(make_forward(model)(*inputs())[0], plain)


def test_a_row_with_its_adapter_is_bit_for_bit_the_same_in_any_batch(tmp_path: Path) -> None:
    """Whoever stands beside it, in whatever order; every token is a sequence of its own."""
    model = model_of("qwen3")
    pack_weights(model, "bf16")
    bank = with_bank(model, tmp_path, "qwen3")
    forward = make_forward(model)
    names = [(None, *ADAPTERS)[i * 7 % 4] for i in range(23)]

    def hidden(rows: list[int]) -> Tensor:
        ids = torch.tensor([[i % 5 + 3 for i in rows]])
        layout = PackedLayout(list(range(len(rows) + 1)))
        with torch.inference_mode(), bank.selected([(names[i], 1) for i in rows]):
            return forward(ids, torch.zeros_like(ids), layout)[0]

    together = hidden(list(range(23)))
    backwards = list(reversed(range(23)))
    assert torch.equal(hidden(backwards), together[backwards])
    for i in (0, 1, 2, 3, 22):
        assert torch.equal(hidden([i])[0], together[i])
    assert len({tuple(row.tolist()) for row in together}) == 20


def test_unloaded_adapters_leave_nothing_with_the_kernels(tmp_path: Path) -> None:
    model = model_of("llama-biased")
    pack_weights(model, "fp32")
    bank, forward = with_bank(model, tmp_path, "llama-biased"), make_forward(model)

    def tables() -> int:
        gc.collect()
        return sum(type(thing) is AdapterTable for thing in gc.get_objects())

    before = tables()
    for _ in range(20):
        bank.load("some", tmp_path / "some")
        with torch.inference_mode(), bank.selected([("some", 40)]):
            forward(*inputs())
    assert tables() == before + 1
    bank.unload("some")
    assert tables() == before


def test_a_pass_of_other_tokens_than_its_spans_is_a_bug(tmp_path: Path) -> None:
    model = model_of("llama-biased")
    pack_weights(model, "fp32")
    bank = with_bank(model, tmp_path, "llama-biased")
    forward, wrong = make_forward(model), bank.selected([("one", 39)])
    with pytest.raises(RuntimeError, match="40 tokens in a pass of 39"), torch.inference_mode(), wrong:
        forward(*inputs())


def test_gradients_and_training_are_transformers_matter() -> None:
    model = model_of("llama").requires_grad_(True)
    forward = make_forward(model)
    forward(*inputs()).sum().backward()
    assert model.get_decoder().layers[0].mlp.up_proj.weight.grad is not None
    dropping = model_of("llama").train()
    dropping.config.attention_dropout = 0.5
    for layer in dropping.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    forward = make_forward(dropping)
    with torch.inference_mode():
        torch.manual_seed(0)
        found = forward(*inputs())
        torch.manual_seed(0)
        assert torch.equal(found, reference(dropping))


def test_a_rows_hidden_state_is_bit_for_bit_the_same_in_any_batch() -> None:
    """Decoding: a row alone, and the same row among others, with another number of pages."""
    model = model_of("qwen3")
    pack_weights(model, "bf16")
    forward = make_forward(model)
    cache = KVCache(40, cpu_kernels.load())
    rows = [(3, 5), (20, 40), (7, 16), (30, 1), (11, 33)]
    chunks = [Chunk(range(first, first + 3), length, 1) for first, length in rows]
    shape = (1, 2, 41 * 16, 32)
    for layer in range(2):
        for pages in cache.at(layer, torch.zeros(shape), torch.zeros(shape)):
            pages.copy_(torch.randn(pages.shape))
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def hidden(numbers: list[int]) -> Tensor:
        some = [chunks[i] for i in numbers]
        layout = CacheLayout(cache, some, dtype=torch.float32, device=torch.device("cpu"))
        return forward(ids[:, numbers], layout.positions[None], layout)[0]

    with torch.inference_mode():
        together = hidden([0, 1, 2, 3, 4])
        assert torch.equal(torch.cat([hidden([i]) for i in range(5)]), together)
        assert torch.equal(hidden([3, 1]), together[[3, 1]])


def test_greedy_answers_are_those_of_transformers(smol: Path) -> None:
    tokenizer = load_tokenizer(smol)
    texts = ["The capital of France is", "def add(a, b):", "Once upon a time there was a", "2, 4, 8, 16,"]
    prompts = [tokenizer(text).input_ids for text in texts]
    plain: Any = load_model(smol, dtype=torch.float32, device=torch.device("cpu")).eval()
    wanted = [greedy(plain, prompt, 16) for prompt in prompts]
    pack_weights(plain, "fp32")
    assert isinstance(plain.get_decoder().layers[0].mlp.up_proj, PackedLinear)
    params = SamplingParams(temperature=0.0, max_new_tokens=16)
    together = [answer.ids for answer in generate(plain, prompts, params)]
    assert together == wanted
    assert [generate(plain, [prompt], params)[0].ids for prompt in prompts[:2]] == wanted[:2]
