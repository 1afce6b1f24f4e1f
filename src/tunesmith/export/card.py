"""README.md of an exported model: what it was made from, how, and how well it did, as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUANTISED = "Beside the same weights in fp32; losses are in nats a token, on rows that were not trained on."
LICENSE_NOTE = "The licence of the base model applies to this model too."


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card tells; every number is measured, what is unknown is left out."""

    name: str
    kind: str  # "adapter", "merged", "int8" or "awq"
    base: str
    base_revision: str | None = None
    base_license: str | None = None
    method: str = ""
    step: int = 0
    recipe: str = ""
    data: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    checks: Sequence[Mapping[str, Any]] = ()
    quantised: Mapping[str, Any] = field(default_factory=dict)  # beside the same weights in fp32
    versions: Mapping[str, str] = field(default_factory=dict)


def card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's YAML head."""
    parts = [_head(facts), f"# {facts.name}", _intro(facts)]
    if facts.results:
        parts += [
            "## Results",
            "Measured by tunesmith during the run.",
            _table(facts.results, "what", "value"),
        ]
    if facts.data:
        parts += ["## Data", _rows(facts.data)]
    if facts.checks:
        parts += ["## Checks of this export", *map(_check, facts.checks)]
    if facts.quantised:
        parts += ["## Quantised", QUANTISED, _table(facts.quantised, "what", "value")]
    parts += ["## Use", _usage(facts)]
    if facts.recipe:
        parts += ["## Recipe", f"```yaml\n{facts.recipe.strip()}\n```"]
    if facts.versions:
        parts += ["## Versions", _table(facts.versions, "package", "version")]
    parts += ["## Licence", _license(facts)]
    return "\n\n".join(parts) + "\n"


def _head(facts: CardFacts) -> str:
    lines = ["---", f"library_name: {'peft' if facts.kind == 'adapter' else 'transformers'}"]
    lines += ["pipeline_tag: text-generation", f"base_model: {_quoted(facts.base)}"]
    if facts.base_license:
        lines.append(f"license: {_quoted(facts.base_license)}")
    tags = ["tunesmith"] + ([facts.method] if facts.method else [])
    return "\n".join([*lines, "tags:", *(f"  - {tag}" for tag in tags), "---"])


def _intro(facts: CardFacts) -> str:
    what = "LoRA adapter for" if facts.kind == "adapter" else "Model fine-tuned from"
    at = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    return f"{what} `{facts.base}`{at}, from optimizer step {facts.step} of its training run."


def _usage(facts: CardFacts) -> str:
    if facts.kind != "adapter":
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        ]
    else:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")',
        ]
    lines.append(
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # with the chat template of the training'
    )
    code = "```python\n" + "\n".join(lines) + "\n```\n\n"
    if facts.kind in ("adapter", "merged"):
        return code + "Or serve it: `tunesmith serve FOLDER`."
    return (
        code + "transformers needs the package `compressed-tensors` for it. Or serve it: `vllm serve FOLDER`."
    )


def _table(values: Mapping[str, Any], left: str, right: str) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join(lines + [f"| {_cell(key)} | {_cell(value)} |" for key, value in values.items()])


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows that share their first row's columns."""
    names = list(rows[0])
    lines = ["| " + " | ".join(map(_cell, names)) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(n, "")) for n in names) + " |" for row in rows])


def _check(check: Mapping[str, Any]) -> str:
    return (
        f"- {check['name']}: logits differ by at most {check['difference']:.2g} of the largest logit; "
        f"bound {check['bound']:.2g} ({check['source']})."
    )


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _license(facts: CardFacts) -> str:
    if facts.base_license:
        return f"{LICENSE_NOTE} The base says: {facts.base_license}."
    return f"{LICENSE_NOTE} The base's files do not say which it is: look at its page."


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
