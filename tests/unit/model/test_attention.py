"""Which models a layout can serve, and that without a layout nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@torch.no_grad()
def test_without_a_layout_padding_and_caches_work_as_before(llama: Any) -> None:
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before = llama(ids, attention_mask=mask).logits
    text = llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    attention.install(llama)
    torch.testing.assert_close(llama(ids, attention_mask=mask).logits[1], before[1])
    torch.testing.assert_close(llama(ids, attention_mask=mask).logits[0, 4:], before[0, 4:])
    assert torch.equal(llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), text)


@torch.no_grad()
def test_documents_do_not_see_each_other(llama: Any) -> None:
    attention.install(llama)
    ids = torch.randint(3, 97, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    layout = attention.PackedLayout([0, 5, 12])
    first = attention.hidden_states(llama, ids, positions, layout)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 97
    second = attention.hidden_states(llama, changed, positions, layout)
    assert torch.equal(first[:, :2], second[:, :2]), "a token saw a later one"
    assert torch.equal(first[:, 5:], second[:, 5:]), "a document saw another one"
    assert not torch.equal(first[:, 2:5], second[:, 2:5])


@torch.no_grad()
def test_a_peft_model_is_seen_through(llama: Any) -> None:
    attention.install(llama)
    ids = torch.randint(3, 97, (1, 6))
    positions = torch.arange(6)[None]
    plain = attention.hidden_states(llama, ids, positions, attention.PackedLayout([0, 6]))
    head = attention.lm_head(llama)
    wrapped = attach_lora(
        llama, rank=2, alpha=4, dropout=0.0, targets="all-linear", rslora=False, seed=0
    ).eval()
    attention.install(wrapped)
    assert attention.lm_head(wrapped) is head
    found = attention.hidden_states(wrapped, ids, positions, attention.PackedLayout([0, 6]))
    torch.testing.assert_close(found, plain)


def test_attention_dropout_reaches_the_layout() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5))
    attention.install(model)
    ids, positions = torch.randint(3, 97, (1, 8)), torch.arange(8)[None]
    layout = attention.PackedLayout([0, 8])
    quiet = [attention.hidden_states(model.eval(), ids, positions, layout) for _ in range(2)]
    noisy = [attention.hidden_states(model.train(), ids, positions, layout) for _ in range(2)]
    assert torch.equal(*quiet) and not torch.equal(*noisy)


def test_a_window_as_long_as_the_rows_is_no_window() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64))
    with pytest.raises(UserError, match="sliding window of 64 tokens is shorter than the context of 128"):
        attention.install(model)
    attention.install(model, max_length=64)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=512)), "softcapping"),
        (lambda: BertLMHeadModel(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1,
                                            num_attention_heads=4, intermediate_size=48)), "not causal"),
    ],
)  # fmt: skip
def test_models_that_would_come_out_wrong_are_refused(model: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        attention.install(model())
