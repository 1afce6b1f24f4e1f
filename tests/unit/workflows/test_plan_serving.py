"""What a card serves: by hand for each engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tiny_models import FAMILIES, SIZES
from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.cards import card_named
from tunesmith.plan.serving import FORMATS, GGUF_FORMATS
from tunesmith.workflows.plan_serving import LOCAL_FORMATS, VLLM_FORMATS, ServingPlan, plan_serving

MIB = 1 << 20
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip


def tiny(**changes: Any) -> Any:
    kind, _, extra = FAMILIES["llama"]
    return kind(**(SIZES | extra | changes))


def test_our_engine_on_a_card() -> None:
    """Four fifths of what weights and context leave, in pages of 16 tokens."""
    card = card_named("rtx3090")
    plan = plan_serving(LLAMA_8B, card=card)
    free = int(card.usable_gib * GIB) - int(card.context_mib * MIB) - 8030261248 * 2
    assert plan.parts["weights"] == 8030261248 * 2
    assert plan.token_bytes == 131072
    assert plan.most_tokens == int(0.8 * free) // 131072 // 16 * 16
    assert (plan.max_length, plan.requests) == (4096, 32)
    assert plan.cache_tokens == plan.most_tokens + 16  # our engine rounds up
    assert plan.most_requests == plan.most_tokens // 4096 == 13
    assert plan.fits
    assert sum(plan.parts.values()) + plan.cache_bytes < card.usable_gib * GIB


def test_fewer_requests_set_up_a_smaller_cache() -> None:
    plan = plan_serving(LLAMA_8B, card=card_named("rtx3090"), requests=2, max_length=1000)
    assert plan.cache_tokens == 2000
    assert plan.most_requests == plan.most_tokens // 1008  # whole pages of 16


def test_our_engine_on_a_cpu_takes_as_much_as_the_weights() -> None:
    """Or half a GiB: 2 layers x 2 x 2 heads x 16 x 4 bytes = 512 a token."""
    plan = plan_serving(tiny(), total_bytes=16 * GIB, device="cpu", requests=1000)
    assert plan.weights == "fp32"
    assert plan.token_bytes == 512
    assert plan.cache_tokens == plan.most_tokens == GIB // 2 // 512
    small = plan_serving(tiny(), total_bytes=GIB, device="cpu", requests=1000)
    assert small.most_tokens == pytest.approx(GIB // 4 // 512, rel=0.01)


def test_a_model_that_does_not_fit() -> None:
    plan = plan_serving(LLAMA_8B, card=card_named("t4"))
    assert (plan.most_tokens, plan.most_requests, plan.fits) == (0, 0, False)
    assert plan.weights == "fp16"  # a T4 multiplies no bf16
    assert "no room for a request of 4,096 tokens" in plan.sentence()
    assert plan_serving(LLAMA_8B, card=card_named("t4"), precision="nf4").fits


def test_vllm_on_a_card() -> None:
    """Llama-3.1-8B at 0.95 of 79.19 GiB logged 476,016 tokens; at the default of 0.19, 0.9, it is that less."""
    plan = plan_serving(
        LLAMA_8B, total_bytes=int(79.19 * GIB), engine="vllm", requests=1024, vllm_release=(0, 19)
    )
    assert plan.most_tokens == pytest.approx(476016 - 0.05 * 79.19 * GIB / 131072, rel=0.005)
    assert plan.low_tokens < plan.most_tokens < plan.high_tokens
    assert plan.block == 16
    assert plan.cache_tokens == plan.most_tokens


def test_an_unknown_release_of_vllm_has_the_interval_of_all() -> None:
    card = card_named("h100")
    known = plan_serving(LLAMA_8B, card=card, engine="vllm", vllm_release=(0, 32), requests=1024)
    unknown = plan_serving(LLAMA_8B, card=card, engine="vllm", requests=1024)
    assert unknown.most_tokens == known.most_tokens
    assert unknown.low_tokens < known.low_tokens < known.high_tokens <= unknown.high_tokens


def test_cards_share_the_model() -> None:
    card = card_named("a100-80")
    one = plan_serving(LLAMA_8B, card=card, engine="vllm")
    plans = [plan_serving(LLAMA_8B, card=card, engine="vllm", cards=cards) for cards in (2, 4, 8)]
    for cards, plan in zip((2, 4, 8), plans, strict=True):
        assert plan.token_bytes == one.token_bytes // cards
        assert plan.parts["weights"] == pytest.approx(one.parts["weights"] / cards, rel=0.03)
        assert plan.parts["other than torch"] > one.parts["other than torch"]
    assert one.most_requests < plans[0].most_requests < plans[1].most_requests < plans[2].most_requests
    assert plans[0].sentence().startswith("after training: 2 of these cards serve")


def test_adapters_take_room() -> None:
    """Rank 16 on q, k, v, o, gate, up, down of 32 layers; ours in fp32, and joined where there are several."""
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    one = 16 * 32 * layer
    card = card_named("h100")
    ours = [plan_serving(LLAMA_8B, card=card, adapters=n).parts["adapters"] for n in (0, 1, 3)]
    assert ours == [0, one * 4, one * 4 * 3 * 2]
    assert plan_serving(LLAMA_8B, card=card, adapters=3, engine="vllm").parts["adapters"] == one * 2 * 3


def test_llama_cpp() -> None:
    plan = plan_serving(LLAMA_8B, total_bytes=16 * GIB, device="cpu", engine="llamacpp", precision="q4_k_m")
    assert plan.parts["weights"] / 1e9 == pytest.approx(4.91, abs=0.01)  # the file that everybody downloads
    assert plan.parts["a batch"] / MIB == 258.5  # as llama.cpp logs it for this model
    assert plan.most_requests == plan.most_tokens // 4096


@pytest.mark.parametrize("engine", ["local", "vllm", "llamacpp"])
def test_every_format_of_every_engine(engine: Any) -> None:
    formats = {"local": LOCAL_FORMATS["cuda"], "vllm": VLLM_FORMATS, "llamacpp": GGUF_FORMATS}[engine]
    plans = {
        name: plan_serving(LLAMA_8B, total_bytes=80 * GIB, engine=engine, precision=name) for name in formats
    }
    sizes = [plan.parts["weights"] for plan in plans.values()]
    assert max(sizes) == plans[next(iter(formats))].parts["weights"]
    assert set(VLLM_FORMATS) < set(FORMATS)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"precision": "int8"}, "'int8': the engine 'local' does not store weights so"),
        ({"engine": "vllm", "precision": "q4_k_m"}, "'q4_k_m'"),
        ({"engine": "vllm", "device": "cpu"}, "planned for cards only"),
        ({"cards": 2}, "computes on one card, not 2"),
        ({"max_length": 200_000}, "131072"),
    ],
)
def test_what_an_engine_does_not_have(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_serving(LLAMA_8B, total_bytes=80 * GIB, **wanted)
    assert caught.value.hint


def test_a_plan_as_data_and_as_text() -> None:
    plan = plan_serving(LLAMA_8B, card=card_named("h100"), engine="vllm")
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["most_requests"] == plan.most_requests
    assert data["parts"] == plan.parts
    rows = dict(plan.rows())
    assert rows["keys and values of a token"] == "128.0 KiB"
    assert f"({plan.low_tokens:,} to {plan.high_tokens:,})" in rows["tokens that fit"]
    assert f"serves {plan.most_requests:,} requests of 4,096 tokens at a time (vllm, bf16)" in plan.sentence()


def test_a_plan_needs_a_size() -> None:
    with pytest.raises(ValueError, match="give card or total_bytes"):
        plan_serving(tiny())
    assert isinstance(plan_serving(tiny(), total_bytes=GIB), ServingPlan)
