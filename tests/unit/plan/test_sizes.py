"""Well-known models by name: their shapes add up to the published numbers of parameters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.plan.sizes import SIZES, config_of, num_parameters, size_named

PUBLISHED = {
    "smollm2-135m": 134515008,
    "smollm2-360m": 361821120,
    "smollm2-1.7b": 1711376384,
    "qwen1.5-0.5b": 463987712,
    "qwen1.5-1.8b": 1836828672,
    "qwen1.5-4b": 3950369280,
    "qwen1.5-7b": 7721324544,
    "qwen1.5-14b": 14167290880,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-3b": 3085938688,
    "qwen2.5-7b": 7615616512,
    "qwen2.5-14b": 14770033664,
    "qwen2.5-32b": 32763876352,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920,
    "qwen3-1.7b": 1720574976,
    "qwen3-4b": 4022468096,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-2-70b": 68976648192,
    "llama-3-8b": 8030261248,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "mistral-7b-v0.1": 7241732096,
    "mistral-7b-v0.3": 7248023552,
}


def test_the_list_is_whole() -> None:
    assert set(PUBLISHED) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_published(name: str) -> None:
    assert num_parameters(config_of(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "qwen1.5-0.5b", "qwen3-8b", "llama-3.2-1b", "mistral-7b-v0.3"]
)
def test_parameters_are_those_of_the_model(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_biases_that_a_config_asks_for_are_counted() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = config_of("smollm2-135m")
    config.num_hidden_layers, config.attention_bias, config.mlp_bias = 1, True, True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_other_kinds_of_models_are_not_counted_wrong() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="gpt2"):
        num_parameters(GPT2Config())


def test_published_facts_agree() -> None:
    """Every row of measured runs whose model is in the table has its number of parameters."""
    facts = os.environ.get("TUNESMITH_TEST_FACTS")
    if not facts:
        pytest.skip("needs $TUNESMITH_TEST_FACTS, a file of published facts")
    seen = set()
    for line in Path(facts).read_text(encoding="utf-8").splitlines():
        config = json.loads(line).get("config") or {}
        try:
            size = size_named(config.get("hf_id") or "")
        except UserError:
            continue
        seen.add(size.name)
        assert config["n_params"] == num_parameters(config_of(size.name))
        assert config["intermediate"] == size.arguments["intermediate_size"]
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen1.5-0.5B-Chat", "qwen1.5-0.5b"),
        ("Qwen2.5 7B", "qwen2.5-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_one_model_has_many_spellings(text: str, name: str) -> None:
    assert size_named(text).name == name


def test_other_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'qwen2.5-8b' is no model") as raised:
        config_of("qwen2.5-8b")
    assert raised.value.hint is not None and "did you mean qwen2.5-" in raised.value.hint


def test_rotation_and_window_are_those_of_the_makers() -> None:
    assert config_of("llama-3.2-1b").rope_parameters["factor"] == 32
    assert config_of("qwen1.5-4b").rope_parameters["rope_theta"] == 5e6
    assert config_of("mistral-7b-v0.1").sliding_window == 4096
    assert config_of("mistral-7b-v0.3").sliding_window is None
    assert config_of("qwen3-8b").head_dim == 128
