"""New tokens in a tokenizer and in embeddings: tied or not, spare rows or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_model
from tests.tiny_models import VOCAB
from tunesmith.core.errors import UserError
from tunesmith.model.adapters import attach_lora, load_adapter, save_adapter
from tunesmith.model.new_tokens import grow, is_tied, start_rows, token_ids
from tunesmith.model.template import encode_dialogue
from tunesmith.model.tokenizer import load_tokenizer

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": False, "seed": 7}
NEW = [VOCAB, VOCAB + 1]


def test_a_new_token_is_one_token_in_rows_and_comes_back_as_text(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny, new_tokens=["<tool>", "[X]"])
    first, second = token_ids(tokenizer, ["<tool>", "[X]"])
    assert (first, second) == (49152, 49153)
    encoded = encode_dialogue(
        tokenizer, [{"role": "user", "content": "a<tool>b"}, {"role": "assistant", "content": "[X] c"}]
    )
    assert encoded.ids.count(first) == encoded.ids.count(second) == encoded.labels.count(second) == 1
    assert not encoded.escaped
    assert tokenizer.decode([first, second], skip_special_tokens=True) == "<tool>[X]"
    tokenizer.save_pretrained(tiny.parent / "with-tokens")
    again = load_tokenizer(tiny.parent / "with-tokens")
    assert again("a<tool>b").input_ids == tokenizer("a<tool>b").input_ids


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<a>", "<a>"], r"new_tokens\.1: '<a>' is there twice"),
        ([" "], r"new_tokens\.0: ' ' is empty"),
        (["<a> "], "begins or ends with a space"),
        (["<|im_end|>"], r"is already a token of the model \(number 2\)"),
    ],
)
def test_refused(tiny: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(tiny, new_tokens=tokens)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
def test_rows_start_as_the_mean_of_the_others(kind: str) -> None:
    model: Any = make_model(kind)
    before = [part.weight.detach().clone() for part in (model.model.embed_tokens, model.lm_head)]
    state = torch.get_rng_state()
    start_rows(model, NEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.vocab_size == VOCAB + 2 and is_tied(model) == (kind == "llama-tied")
    for old, part in zip(before, (model.model.embed_tokens, model.lm_head), strict=True):
        assert torch.equal(part.weight[:VOCAB], old)
        mean = old.double().mean(0)
        for row in part.weight[VOCAB:].double():
            torch.testing.assert_close(row, mean, rtol=0, atol=1e-8)


def test_spare_rows_are_taken_and_not_part_of_the_mean() -> None:
    model: Any = make_model("qwen2")
    old = model.lm_head.weight.detach().clone()
    start_rows(model, [500, 501])
    assert model.lm_head.weight.shape == old.shape
    torch.testing.assert_close(model.lm_head.weight[501], old[:500].mean(0))
    assert torch.equal(model.lm_head.weight[502:], old[502:])


def test_growing_never_shrinks() -> None:
    model: Any = make_model("qwen2")
    grow(model, 3)
    assert model.config.vocab_size == VOCAB


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("whole", [[], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_brings_its_rows_to_a_plain_base(kind: str, whole: list[str], tmp_path: Path) -> None:
    model: Any = make_model(kind)
    start_rows(model, NEW)
    wrapped: Any = attach_lora(model, **LORA, targets="all-linear", new_token_ids=NEW, modules_to_save=whole)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    ids = torch.tensor([[5, NEW[0], 7, NEW[1]]])
    logits = wrapped.eval()(ids).logits
    save_adapter(wrapped, tmp_path / "adapter")
    loaded = load_adapter(make_model(kind), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
def test_a_low_rank_head_and_new_tokens_are_refused_together(kind: str) -> None:
    model: Any = make_model(kind)
    start_rows(model, NEW)
    with pytest.raises(UserError, match=r"'lm_head'.*new_tokens"):
        attach_lora(model, **LORA, targets=["q_proj", "lm_head"], new_token_ids=NEW)
