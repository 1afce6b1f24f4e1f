"""Prompt templates of xtuner 0.1 by name: their markup, and the same as a Jinja chat template.

Only markup stands here. Sentences that xtuner puts into prompts are read, never run, from the xtuner that
the user has: around the config, installed, or a wheel.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.convert.pyconfig import Section, read_config
from tunesmith.core.errors import UserError
from tunesmith.recipe.compat import Template

PLACE = Path("utils") / "templates.py"
HOW_TO_GET = "pip download --no-deps xtuner==0.1.18 brings the wheel"


def _t(system: str, instruction: str, suffix: str = "", *, eos: bool = False, sep: str = "\n") -> Template:
    return Template(system=system, instruction=instruction, suffix=suffix, suffix_as_eos=eos, sep=sep)


_CHATML = Template()
_INST = _t("[INST] {system} [/INST]\n", "[INST] {input} [/INST]")
MARKUP: dict[str, Template] = {
    "default": _t("<|System|>:{system}\n", "<|User|>:{input}\n<|Bot|>:"),
    "qwen_chat": _CHATML,
    "internlm2_chat": _CHATML,
    "internlm_chat": _t("<|System|>:{system}\n", "<|User|>:{input}<eoh>\n<|Bot|>:", "<eoa>", eos=True),
    "zephyr": _t("<|system|>\n{system}\n", "<|user|>\n{input}\n<|assistant|>\n"),
    "moss_sft": _t("{system}\n", "<|Human|>: {input}<eoh>\n"),
    "code_llama_chat": _t("{system}\n", "[INST] {input} [/INST]", sep=""),
    "chatglm2": _t("{system}\n", "[Round {round}]\n\n问：{input}\n\n答：", sep="\n\n"),
    "chatglm3": _t("<|system|>\n{system}", "<|user|>\n{input}<|assistant|>\n"),
    "baichuan_chat": _t("{system}\n", "<reserved_102>{input}<reserved_103>"),
    "baichuan2_chat": _t("{system}\n", "<reserved_106>{input}<reserved_107>"),
    "deepseek_moe": _INST,
    "mistral": _INST,
    "mixtral": _INST,
    "gemma": _t(
        "<start_of_turn>system\n{system}<end_of_turn>\n",
        "<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "cohere_chat": _t(
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{input}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        eos=True,
        sep="",
    ),
    "llama3_chat": _t(
        "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        eos=True,
        sep="",
    ),
    # Their system parts hold sentences: those come from the user's own xtuner.
    "llama2_chat": _t("", "[INST] {input} [/INST]"),
    "vicuna": _t("", "USER: {input} ASSISTANT:"),
    "wizardlm": _t("", "USER: {input} ASSISTANT:"),
    "wizardcoder": _t("", "### Instruction:\n{input}\n\n### Response:", sep="\n\n"),
    "deepseek_coder": _t("", "### Instruction:\n{input}\n### Response:\n"),
    "deepseekcoder": _t("", "### Instruction:\n{input}\n### Response:\n"),
}
# Models whose tokenizer brings this markup as its own chat template, by the name of the model.
OWN = {
    "qwen_chat": r"qwen1\.5.*chat|qwen2.*instruct|yi-.*chat",
    "internlm2_chat": r"internlm2.*chat",
    "llama2_chat": r"llama-2-.*chat",
    "llama3_chat": r"llama-3-.*instruct",
    "gemma": r"gemma-.*it$",
    "mistral": r"mistral-.*instruct",
    "mixtral": r"mixtral-.*instruct",
    "deepseek_moe": r"deepseek-moe-.*chat",
    "deepseek_coder": r"deepseek-coder-.*instruct",
    "zephyr": r"zephyr",
    "cohere_chat": r"c4ai-command-r",
}


def model_brings(template: str, model: str) -> bool:
    """Whether the model's own chat template is the one that this name stands for."""
    name = Path(model).name.lower()
    return bool(re.search(OWN[template], name)) if template in OWN else False


def jinja(template: Template) -> str:
    """A chat template that renders as `template` does; the question's markup opens the answer.

    A begin token comes first, and again after each end token, as the rows were tokenised there.
    """
    system, instruction = _written(template.system, "system"), _written(template.instruction, "input")
    end = json.dumps(template.suffix, ensure_ascii=False)
    again = " or fresh" if not template.suffix_as_eos else ""
    eos = "" if template.suffix_as_eos else " + (eos_token or '')"
    sep = json.dumps(template.sep, ensure_ascii=False)
    return (
        "{%- set ns = namespace(round=0, fresh=false) -%}{%- for message in messages -%}"
        "{%- set fresh = ns.fresh -%}"
        f"{{%- if loop.first{again} -%}}{{{{- bos_token or '' -}}}}{{%- endif -%}}"
        "{%- set ns.fresh = message['role'] == 'assistant' -%}"
        "{%- if message['role'] == 'system' -%}{{- " + system + " -}}"
        "{%- elif message['role'] == 'user' -%}{%- set ns.round = ns.round + 1 -%}{{- " + instruction + " -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- message['content'] + " + end + eos + " + " + sep + " -}}{%- endif -%}{%- endfor -%}"
    )


def _written(text: str, slot: str) -> str:
    """A format string as a Jinja expression of `message` and `ns.round`."""
    slots = {f"{{{slot}}}": "message['content']", "{round}": "(ns.round | string)"}
    parts = re.split(r"(\{system\}|\{input\}|\{round\})", text)
    return " + ".join(slots.get(part, json.dumps(part, ensure_ascii=False)) for part in parts if part) or "''"


# -- the user's own xtuner -----------------------------------------------------------------------------------


def find_package(config: Path, given: Path | None) -> Path | None:
    """The folder or wheel of an xtuner: as given, around the config, or installed; None if there is none.

    Raises UserError when what is given holds no xtuner.
    """
    if given is not None:
        if given.suffix == ".whl" or (given / PLACE).is_file() or (given / "xtuner" / PLACE).is_file():
            return given
        raise UserError(f"--xtuner {given}: there is no xtuner in it", hint=HOW_TO_GET)
    for folder in config.absolute().parents:
        if folder.name == "xtuner" and (folder / PLACE).is_file():
            return folder
    found = importlib.util.find_spec("xtuner")
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) if places and (Path(places[0]) / PLACE).is_file() else None


@lru_cache(maxsize=4)
def sentences(package: Path | None) -> Section:
    """{"PROMPT_TEMPLATE": ..., "SYSTEM_TEMPLATE": ...} of an xtuner, read by its syntax tree; {} for None."""
    if package is None:
        return Section({}, {}, 0)
    if package.suffix != ".whl":
        place = package / PLACE if (package / PLACE).is_file() else package / "xtuner" / PLACE
        return read_config(place).values
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(package) as wheel:
                taken = Path(folder) / "templates.py"
                taken.write_bytes(wheel.read(f"xtuner/{PLACE.as_posix()}"))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"--xtuner {package}: not a wheel of xtuner: {error}", hint=HOW_TO_GET) from None
        return read_config(taken).values


def template_of(value: Any, package: Path | None) -> tuple[str, Template] | None:
    """(name, template) of what a config has as prompt template: a name, or a dict of its own; else None."""
    if isinstance(value, Section):
        return "its own", _from_section(value)
    name = str(value).rpartition(".")[2]
    known = sentences(package).get("PROMPT_TEMPLATE", {}).get(name)
    if isinstance(known, Section):
        return name, _from_section(known)
    return (name, MARKUP[name]) if name in MARKUP else None


def _from_section(given: Section) -> Template:
    try:
        return Template(
            system=given.get("SYSTEM", ""),
            instruction=given.get("INSTRUCTION", "{input}"),
            suffix=given.get("SUFFIX", ""),
            suffix_as_eos=given.get("SUFFIX_AS_EOS", False),
            sep=given.get("SEP", ""),
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"the prompt template's {str(fault['loc'][0]).upper()}: {fault['msg']}") from None


def system_text(value: Any, package: Path | None) -> str | None:
    """The text of a system message: written out, or SYSTEM_TEMPLATE.NAME; None if it is not to be had."""
    if not str(value).startswith("xtuner.") and "SYSTEM_TEMPLATE." not in str(value):
        return str(value)
    text = sentences(package).get("SYSTEM_TEMPLATE", {}).get(str(value).rpartition(".")[2])
    return text if isinstance(text, str) else None
