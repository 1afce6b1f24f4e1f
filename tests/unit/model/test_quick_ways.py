"""The quick ways of rendering and tokenising give, row by row, what the slow ones give."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from tests.unit.model import chat_templates as templates
from tests.unit.model.chat_templates import CALL, TOOL, assistant, user, with_template
from tunesmith.core.errors import UserError
from tunesmith.model.rendering import Renderer, TemplateError
from tunesmith.model.template import ChatEncoder, encoder_of

# What the templates of models use beside plain loops.
USES = {
    "trims, the last message, a date": """{{ bos_token }}{% set date = strftime_now('%Y') %}{{ date }}
{%- for message in messages %}{{ '<|im_start|>' ~ message['role'] }} {{ message['content'] | trim }}
{%- if not loop.last %}<|im_end|>
{% else %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}""",
    "marks of generation, a macro, loop controls": """{% macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{%- if message.role == 'assistant' %}{% generation %}{{ turn('assistant', message.content) }}{% endgeneration %}
{%- else %}{{ turn(message.role, message.content | tojson) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "a namespace, slices, the message before": """{% set ns = namespace(turns=0) %}
{%- for message in messages[1:] %}{% set ns.turns = ns.turns + 1 %}{% endfor %}{{ ns.turns }}
{%- for message in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == message.role %}
{{- raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}
SHIPPED = ("CHATML_TOOLS", "CHATML_THINK", "OPENED_THINK", "INST", "EOS_LAST", "NO_STOP")
TEMPLATES = {"SmolLM2": None, **{name: getattr(templates, name) for name in SHIPPED}, **USES}
HARMLESS = [
    "Hello", " world", "\n", "\n\n", "  ", "", "naïve", "数据", "🙂👩‍👩‍👧", "assistant", "<|", "|>", "12345", "\r\n",
    "{{ x }}", " .", "<think>", "]", "\u2028",
]  # fmt: skip
PIECES = [*HARMLESS, "<|im_end|>", "<|im_start|>user\n", "\U000f0003", "</s>", "<s>", " <|endoftext|> "]
EXTRAS: list[dict[str, Any]] = [{}] * 17 + [{"weight": 0}, {"tool_calls": [CALL]}, {"reasoning": "why"}]


def content(chance: random.Random) -> str:
    return "".join(chance.choices(HARMLESS if chance.random() < 0.7 else PIECES, k=chance.randint(0, 6)))


def conversation(chance: random.Random) -> tuple[list[dict[str, Any]], Any]:
    """Messages and tools: mostly plain, now and then with anything that a row may hold."""
    messages: list[dict[str, Any]] = []
    if chance.random() < 0.2:
        messages.append({"role": "system", "content": chance.choice(["Be brief.", content(chance)])})
    for _ in range(chance.randint(1, 3)):
        extra = chance.choice(EXTRAS)
        messages += [user(content(chance)), assistant(content(chance), **extra)]
    return messages, [TOOL] if chance.random() < 0.05 else None


def slow_encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """Renders as transformers does, tokenises whole texts, and asks the library for all spans."""
    encoder = ChatEncoder(tokenizer)
    encoder._render._compiled = None
    encoder._guard._literal = {}
    return encoder


def assert_the_same(tokenizer: PreTrainedTokenizerBase, seed: str) -> None:
    chance = random.Random(seed)
    rows = [conversation(chance) for _ in range(80)]
    quick, slow = encoder_of(tokenizer), slow_encoder(tokenizer)
    expected = [told(one) for row in rows for one in slow.dialogues([row])]
    for size in (1, 5, 80):
        found = [told(one) for at in range(0, 80, size) for one in quick.dialogues(rows[at : at + size])]
        assert found == expected
    assert sum(not isinstance(one, str) for one in expected) > 20


def told(encoded: Any) -> Any:
    return f"{encoded.what} {encoded.hint}" if isinstance(encoded, UserError) else encoded


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_gives_the_same(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if TEMPLATES[name] is not None:
        with_template(tokenizer, TEMPLATES[name])
    assert_the_same(tokenizer, name)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
def test_added_tokens_of_every_kind_give_the_same(tokenizer: PreTrainedTokenizerBase, flag: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    flags = {"special": False, "normalized": False} | {flag: True}
    tokenizer.add_tokens(
        [AddedToken(word, **flags) for word in ("<think>", "world", "<|im_start|>assistant")]
    )
    assert_the_same(tokenizer, flag)


@pytest.mark.parametrize("template", ["INST", "EOS_LAST", "NO_STOP"])
@pytest.mark.parametrize(("scheme", "legacy"), [("first", False), ("always", False), ("", True)])
def test_sentencepiece_like_tokenizers_give_the_same(scheme: str, legacy: bool, template: str) -> None:
    tokenizer = templates.metaspace_tokenizer(scheme, legacy=legacy)
    assert_the_same(with_template(tokenizer, getattr(templates, template)), scheme + template)


def prompts(chance: random.Random) -> Iterator[list[dict[str, Any]]]:
    for _ in range(100):
        messages = [{"role": m["role"], "content": m["content"]} for m in conversation(chance)[0]]
        yield messages
        yield messages[:1]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_conversations_are_rendered_the_short_way(
    tokenizer: PreTrainedTokenizerBase, name: str, generate: bool
) -> None:
    if TEMPLATES[name] is not None:
        with_template(tokenizer, TEMPLATES[name])
    render = Renderer(tokenizer)
    short = 0
    for messages in prompts(random.Random(name)):
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception:
            with pytest.raises(TemplateError):
                render(messages, generate=generate)
            continue
        assert render(messages, generate=generate) == expected
        short += render._plainly(messages, generate) == expected
    assert short > 100


def test_where_the_short_way_differs_it_is_not_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template whose every rendering differs stands for a transformers that renders otherwise than we do."""
    with_template(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%s.%f') }}")
    render = Renderer(tokenizer)
    assert render._compiled is None
    assert render([user("a")]).startswith("a")


def test_new_special_tokens_are_used_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(copy.deepcopy(tokenizer), USES["trims, the last message, a date"])
    rows = [([user("a"), assistant("b")], None)]
    before = encoder_of(tokenizer).dialogues(rows)
    tokenizer.bos_token = "<|endoftext|>"
    after = encoder_of(tokenizer).dialogues(rows)
    assert after == slow_encoder(tokenizer).dialogues(rows) != before
