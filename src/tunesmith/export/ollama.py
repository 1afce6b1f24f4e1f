"""An Ollama Modelfile for an exported GGUF: Ollama renders chats by a Go template of its own.

The Go template is chosen by what the model's chat template writes: conversations are rendered with it, and
a known form is taken only when its text is the same. Format: https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]
Render = Callable[[list[Message]], str]

_SYSTEM: Message = {"role": "system", "content": "Reply in one word."}
_USER: Message = {"role": "user", "content": "Which colour has the sky?"}
_TALK: list[Message] = [
    _USER,
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And\ngrass?"},
]


@dataclass(frozen=True)
class Form:
    """A way to write turns: text before and after each, by role, and what asks for the answer.

    A role that is missing has no turn of its own. go: the same for Ollama, over its .Messages.
    """

    name: str
    before: dict[str, str]
    after: dict[str, str]
    ask: str
    go: str

    def render(self, messages: Sequence[Message]) -> str:
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return "".join(turns) + self.ask


def _same(before: str, after: str) -> tuple[dict[str, str], dict[str, str]]:
    roles = ("system", "user", "assistant")
    return {role: before.format(role=role) for role in roles}, dict.fromkeys(roles, after)


def _uniform(name: str, before: str, after: str) -> Form:
    """A form whose turns differ by the name of the role alone."""
    heads, tails = _same(before, after)
    body = "{{- range .Messages }}" + before.format(role="{{ .Role }}") + "{{ .Content }}" + after
    return Form(name, heads, tails, heads["assistant"], body + "{{ end }}" + heads["assistant"])


def _instruct(name: str, before: str, after: str, answer: str) -> Form:
    """Mistral's: users inside [INST], answers between them; no system turn."""
    heads = {"user": before, "assistant": answer}
    tails = {"user": after, "assistant": "</s>"}
    go = (
        f'{{{{- range .Messages }}}}{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{after}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}</s>{{{{ end }}}}{{{{ end }}}}'
    )
    return Form(name, heads, tails, "", go)


FORMS = (
    _uniform("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n"),
    _uniform("Llama 3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    _uniform("Zephyr", "<|{role}|>\n", "</s>\n"),
    _instruct("Mistral", "[INST] ", " [/INST]", " "),
    _instruct("Mistral", "[INST] ", "[/INST]", " "),
    _instruct("Mistral", "[INST] ", " [/INST]", ""),
    _instruct("Mistral", "[INST]", "[/INST]", ""),
)


@dataclass(frozen=True)
class Match:
    """A form that writes what the chat template writes. system: the text it puts where none is given."""

    form: Form
    system: str | None
    takes_system: bool


def match_form(render: Render, bos: str | None) -> Match | None:
    """The form of a chat template; `render` gives its text with the question for an answer at the end.

    `bos`: the begin token where Ollama adds it by itself. None when no form gives the same text.
    """

    def text(messages: list[Message]) -> str:
        found = render(messages)
        return found.removeprefix(bos) if bos else found

    try:
        plain, talk = text([_USER]), text(_TALK)
    except Exception:  # a template may raise whatever it likes, and does so by design
        return None
    for form in FORMS:
        system = _default_system(form, plain)
        if system is None or talk != _with_system(form, system, _TALK):
            continue
        return Match(form, system or None, _takes_system(form, text))
    return None


def _default_system(form: Form, plain: str) -> str | None:
    """The system text that stands before a lone user turn, "" for none; None when the form does not fit."""
    asked = form.render([_USER])
    if plain == asked:
        return ""
    if "system" not in form.before or not plain.endswith(asked):
        return None
    head, tail = form.before["system"], form.after["system"]
    turn = plain.removesuffix(asked)
    fits = turn.startswith(head) and turn.endswith(tail) and len(turn) > len(head) + len(tail)
    return turn[len(head) : len(turn) - len(tail)] if fits else None


def _with_system(form: Form, system: str, messages: list[Message]) -> str:
    return form.render([{"role": "system", "content": system}, *messages] if system else messages)


def _takes_system(form: Form, text: Render) -> bool:
    if "system" not in form.before:
        return False
    try:
        return text([_SYSTEM, _USER]) == form.render([_SYSTEM, _USER])
    except Exception:  # some templates refuse a system message
        return False


def modelfile(gguf_name: str, *, match: Match | None, stops: Sequence[str], context: int) -> str:
    """The Modelfile's text: weights, template, stop strings, context, and greedy-neutral sampling."""
    lines = [f"FROM ./{gguf_name}"]
    if match is None:
        lines += [
            "# RAW: this model's chat template is none that is known here, so there is no TEMPLATE: Ollama",
            "# may guess one that the training did not use. Render the chat with the model's own template",
            '# (tunesmith serve does) and send it with "raw": true.',
        ]
    else:
        lines += [f"# {match.form.name}: the same text as the model's chat template", _template(match)]
        if not match.takes_system:
            lines.append(
                "# System messages are left out: the model's own template has another place for them."
            )
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    # Ollama's own defaults (temperature 0.8, top_k 40, top_p 0.9, repeat_penalty 1.1, a short context) would
    # change the answers unasked.
    lines += ["PARAMETER temperature 1", "PARAMETER top_k 0", "PARAMETER top_p 1", "PARAMETER min_p 0"]
    lines += ["PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {context}"]
    return "\n".join(lines) + "\n"


def _template(match: Match) -> str:
    text = f'TEMPLATE """{match.form.go}"""'
    return text if match.system is None else f'{text}\nSYSTEM """{match.system}"""'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
