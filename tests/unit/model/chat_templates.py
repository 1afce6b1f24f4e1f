"""Chat templates and tokenizers for the tests: the kinds that models come with."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.model.batch import IGNORE
from tunesmith.model.template import Encoded

# ChatML with tools, as Qwen's: definitions in the system turn, calls and results as tagged JSON.
CHATML_TOOLS = """\
{%- set first = messages[0] if messages[0].role == 'system' else none %}
{%- if tools or first %}
{{- '<|im_start|>system\\n' }}{{ first.content if first else 'You are helpful.' }}
{%- if tools %}
{{- '\\n\\nTools:' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'tool' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' }}{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Reasoning as Qwen3's: the answer after the last question opens with <think>, earlier ones lose it.
CHATML_THINK = """\
{%- set last = namespace(index=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.index = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > last.index %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# As DeepSeek-R1's: the prompt opens <think>, which no rendered conversation has.
OPENED_THINK = """\
{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<User>' + message.content }}
{%- else %}{{ '<Assistant>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""

# As Llama 2's: writes its own BOS, trims, ends answers with EOS.
INST = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

# As Phi-3's: its own end of turn, and EOS after the whole conversation.
EOS_LAST = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""

# Plain words, no token that ends an answer.
NO_STOP = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

WORDS = (
    "the quick brown fox jumps over a lazy dog and says hello to you and me [INST] User assistant: 12 34 !?"
)


def metaspace_tokenizer(scheme: str, *, legacy: bool = False) -> PreTrainedTokenizerFast:
    """A small BPE in SentencePiece's manner: a space before the first word, BOS put before by itself."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *byte_tokens], show_progress=False
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    backend = _with_special_only(backend, special)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def _with_special_only(backend: Tokenizer, special: list[str]) -> Tokenizer:
    """The byte tokens belong to the vocabulary; only `special` are added tokens."""
    described = json.loads(backend.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(described))


def with_tokens(tokenizer: PreTrainedTokenizerFast, *contents: str) -> PreTrainedTokenizerFast:
    """Add tokens that are not special, as DeepSeek's roles and Qwen's tags are."""
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in contents])
    return tokenizer


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **more: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more)


def learned(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The supervised stretches as text."""
    runs: list[list[int]] = []
    before = IGNORE
    for label in encoded.labels:
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]
