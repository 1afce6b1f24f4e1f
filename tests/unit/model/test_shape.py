from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2MoeConfig

from tunesmith.model.quant import quantize
from tunesmith.model.shape import (
    decoder_layers,
    has_equal_layers,
    make_fake,
    meta_model,
    quantise_shape,
    with_layers,
)

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def test_shapes_are_those_of_the_real_model() -> None:
    real = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    found = meta_model(CONFIG, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(found)
        kinds = {type(p) for p in found.parameters()}
        logits = found(input_ids=torch.zeros(1, 5, dtype=torch.int64)).logits
    assert kinds == {FakeTensor} and logits.shape == (1, 5, 300)
    told = {name: (p.shape, p.dtype) for name, p in found.named_parameters()}
    assert told == {name: (p.shape, p.dtype) for name, p in real.named_parameters()}
    assert found.lm_head.weight is found.model.embed_tokens.weight, "tied weights are one tensor"


def test_with_fewer_layers_only_their_number_changes() -> None:
    config = Qwen2Config(num_hidden_layers=6, layer_types=["full_attention", "sliding_attention"] * 3)
    few = with_layers(config, 4)
    assert few.num_hidden_layers == 4 and config.num_hidden_layers == 6
    assert few.layer_types == ["full_attention", "sliding_attention"] * 2
    assert len(decoder_layers(meta_model(CONFIG, torch.float32, layers=2))) == 2


def test_layers_of_experts_here_and_there_are_not_equal() -> None:
    mixed = Qwen2MoeConfig(
        num_hidden_layers=4, decoder_sparse_step=2, hidden_size=64, intermediate_size=96, num_experts=4,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=100,
    )  # fmt: skip
    assert has_equal_layers(CONFIG) and not has_equal_layers(mixed)


def test_the_vocabulary_grows_for_new_tokens() -> None:
    assert meta_model(CONFIG, torch.float32, vocabulary=310).get_input_embeddings().weight.shape[0] == 310
    assert meta_model(CONFIG, torch.float32, vocabulary=10).get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_take_what_the_real_ones_take(double_quant: bool) -> None:
    pytest.importorskip("bitsandbytes")
    real = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    settings = {"compute_dtype": torch.float32, "double_quant": double_quant}
    count = quantize(real, device="cpu", **settings)  # type: ignore[arg-type]
    found = meta_model(CONFIG, torch.float32)
    assert quantise_shape(found, **settings) == count == 3 * 7  # type: ignore[arg-type]
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(found)
        assert found(input_ids=torch.zeros(1, 5, dtype=torch.int64)).logits.shape == (1, 5, 300)
    for path in ("q_proj", "k_proj"):
        wanted = getattr(real.model.layers[1].self_attn, path).weight
        mine = getattr(found.model.layers[1].self_attn, path).weight
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
        for name in ("absmax", "code", "offset"):
            a, b = getattr(mine.quant_state, name), getattr(wanted.quant_state, name)
            assert (a is None and b is None) or (a.numel(), a.dtype) == (b.numel(), b.dtype), name
        if double_quant:
            assert mine.quant_state.state2.absmax.shape == wanted.quant_state.state2.absmax.shape
