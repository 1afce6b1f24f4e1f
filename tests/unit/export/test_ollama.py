"""Modelfiles: a known form is taken only where the model's chat template writes the same text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from tunesmith.export.ollama import FORMS, Message, Render, match_form, modelfile

TALK: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def render(template: str) -> Render:
    def refuse(text: str) -> str:
        raise jinja2.TemplateError(text)

    compiled = jinja2.Environment(keep_trailing_newline=True).from_string(template, globals={"raise": refuse})
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True)


def of_tokenizer(folder: Path) -> Render:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda m: str(tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True))


def test_smollm2_is_chatml_with_its_system_text(smol: Path) -> None:
    match = match_form(of_tokenizer(smol), None)
    assert match is not None and match.form.name == "ChatML" and match.takes_system
    assert match.system is not None and match.system.startswith("You are a helpful AI assistant")
    text = modelfile("m.gguf", match=match, stops=["<|im_end|>", 'a"b'], context=2048)
    assert text.startswith("FROM ./m.gguf\n") and 'SYSTEM """You are a helpful AI' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and r'PARAMETER stop "a\"b"' in text
    assert "PARAMETER num_ctx 2048" in text and "RAW" not in text


@pytest.mark.parametrize(
    ("template", "bos", "name", "takes_system"),
    [
        (CHATML, None, "ChatML", True),
        (LLAMA3, "<|begin_of_text|>", "Llama 3", True),
        (MISTRAL, "<s>", "Mistral", False),
        (MISTRAL.replace("[INST] ", "[INST]").replace(" [/INST]", "[/INST]").replace(" {{ m.c", "{{ m.c"), "<s>", "Mistral", False),
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n", None, "Zephyr", True),
    ],
)  # fmt: skip
def test_known_forms(template: str, bos: str | None, name: str, takes_system: bool) -> None:
    match = match_form(render(template), bos)
    assert match is not None
    assert (match.form.name, match.takes_system, match.system) == (name, takes_system, None)
    assert (
        "System messages are left out" in modelfile("m.gguf", match=match, stops=[], context=8)
    ) != takes_system


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>\n", "<|im_end|>"),
        CHATML.replace("{{ m.role }}\n", "{{ m.role }}"),
        CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
        LLAMA3,  # its begin token, where Ollama would not add one
        "{{ raise('no') }}",
    ],
)
def test_a_form_that_differs_by_a_character_is_unknown(template: str) -> None:
    assert match_form(render(template), None) is None
    text = modelfile("m.gguf", match=None, stops=["</s>"], context=8)
    assert 'TEMPLATE "' not in text and "# RAW" in text and 'PARAMETER stop "</s>"' in text


GO = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
    var in struct { Template string; Messages []struct { Role string; Content string } }
    json.NewDecoder(os.Stdin).Decode(&in)
    template.Must(template.New("t").Parse(in.Template)).Execute(os.Stdout, in)
}
"""


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_go_templates_write_what_their_form_does(form: Any) -> None:
    assert _by_hand(form.go, TALK) == form.render(TALK)


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_gos_own_templates_write_it_too(form: Any, tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    body = {"Template": form.go, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in TALK]}
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(body),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == form.render(TALK)


def _by_hand(template: str, messages: list[Message]) -> str:
    """What Go's text/template does with the few actions that the forms use."""
    (body, tail) = re.fullmatch(
        r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    out = ""
    for message in messages:
        turn = body
        if "{{ if eq .Role" in turn:
            user, other = re.fullmatch(
                r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}',
                turn,
                re.DOTALL,
            ).groups()  # type: ignore[union-attr]
            turn = {"user": user, "assistant": other}[message["role"]]
        out += turn.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return out + tail
