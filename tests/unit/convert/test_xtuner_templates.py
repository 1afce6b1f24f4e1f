"""Prompt templates: the Jinja form renders as the rows were written, and sentences are read, never run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tunesmith.convert.pyconfig import Symbol, read_config
from tunesmith.convert.xtuner_templates import (
    MARKUP,
    find_package,
    jinja,
    model_brings,
    sentences,
    system_text,
    template_of,
)
from tunesmith.convert.xtuner_turns import Turn, encode_rows
from tunesmith.core.errors import UserError
from tunesmith.model.template import encode_dialogue, encode_prompt
from tunesmith.recipe.load import check

TURNS = [Turn("What?", "That.", "Be brief."), Turn("And?", "This.")]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "This."},
]


@pytest.fixture(scope="module")
def tokenizer(smol: Path) -> Any:
    return AutoTokenizer.from_pretrained(smol)


@pytest.mark.parametrize("name", [name for name in MARKUP if MARKUP[name].system])
def test_jinja_writes_what_the_rows_had(tokenizer: Any, name: str) -> None:
    template = MARKUP[name]
    ids, _ = encode_rows([TURNS], template, tokenizer)[0]
    tokenizer.chat_template = jinja(template)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["default", "qwen_chat", "mistral", "moss_sft", "chatglm2"])
def test_the_template_trains_and_serves_alike(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = jinja(MARKUP[name])
    encoded = encode_dialogue(tokenizer, MESSAGES)
    assert (encoded.answers, encoded.unmatched, encoded.without_stop) == (2, 0, 0)
    prompt = encode_prompt(tokenizer, MESSAGES[:-1])
    assert encoded.ids[: len(prompt)] == prompt and encoded.labels[len(prompt)] == encoded.ids[len(prompt)]


def test_which_models_bring_their_template() -> None:
    assert model_brings("qwen_chat", "Qwen/Qwen1.5-0.5B-Chat")
    assert model_brings("qwen_chat", "/root/models/Qwen1.5-0.5B-Chat")
    assert not model_brings("qwen_chat", "Qwen/Qwen1.5-0.5B")
    assert not model_brings("default", "Qwen/Qwen1.5-0.5B-Chat")


TEMPLATES = """\
from mmengine.config import ConfigDict
PROMPT_TEMPLATE = ConfigDict(
    plain=dict(SYSTEM='S {system}', INSTRUCTION='Q {input} A', SEP='|'),
    vicuna=dict(SYSTEM='Dear {system}', INSTRUCTION='U {input}', SUFFIX='</s>', SUFFIX_AS_EOS=True))
SYSTEM_TEMPLATE = ConfigDict(coder=('Write ' 'code.\\n'))
"""


def test_sentences_come_from_the_users_own_xtuner(tmp_path: Path) -> None:
    folder = tmp_path / "xtuner" / "utils"
    folder.mkdir(parents=True)
    (folder / "templates.py").write_text(TEMPLATES)
    config = tmp_path / "xtuner" / "configs" / "deep" / "config.py"
    assert find_package(config, None) == tmp_path / "xtuner"
    package = find_package(tmp_path / "config.py", tmp_path)
    assert package == tmp_path
    assert system_text(Symbol("xtuner.utils.SYSTEM_TEMPLATE.coder"), package) == "Write code.\n"
    name, template = template_of(Symbol("xtuner.utils.PROMPT_TEMPLATE.vicuna"), package) or ("", None)
    assert name == "vicuna" and template is not None and template.system == "Dear {system}"
    known = template_of(Symbol("xtuner.utils.PROMPT_TEMPLATE.plain"), package)
    assert known is not None and known[1].sep == "|" and not known[1].suffix_as_eos


def test_sentences_come_from_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "xtuner-0.1.18-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("xtuner/utils/templates.py", TEMPLATES)
    assert sentences(find_package(tmp_path / "c.py", wheel))["SYSTEM_TEMPLATE"] == {"coder": "Write code.\n"}
    wheel.write_bytes(b"no wheel")
    sentences.cache_clear()
    with pytest.raises(UserError, match="not a wheel of xtuner"):
        sentences(wheel)


def test_without_an_xtuner_its_sentences_are_not_had(tmp_path: Path) -> None:
    assert system_text(Symbol("xtuner.utils.SYSTEM_TEMPLATE.coder"), None) is None
    assert system_text("Be brief.", None) == "Be brief."
    assert template_of(Symbol("xtuner.utils.PROMPT_TEMPLATE.unheard_of"), None) is None
    with pytest.raises(UserError, match="there is no xtuner in it"):
        find_package(tmp_path / "c.py", tmp_path)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"instruction": "{input.__class__}"}, "'{input.__class__}' is not put in"),
        ({"system": "{bot}"}, "'{bot}' is not put in"),
        ({"instruction": "{input!r}"}, "is not put in"),
        ({"instruction": "{"}, "Single '{'"),
    ],
)
def test_only_what_is_put_in_may_stand_in_braces(given: dict[str, str], fault: str) -> None:
    values = {"model": {"path": "x"}, "data": {"sources": [{"path": "y"}]}, "compat": {"template": given}}
    with pytest.raises(UserError) as error:
        check(values, "recipe.yaml")
    assert fault in str(error.value) and "recipe.yaml: compat.template" in str(error.value)


def test_a_prompt_template_of_the_configs_own(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("own = dict(SYSTEM='S', INSTRUCTION='Q{input}', SEP=3)\n")
    with pytest.raises(UserError, match="the prompt template's SEP"):
        template_of(read_config(path).values["own"], None)
