"""The recipe reference as Markdown, generated from the models so that it cannot be out of date."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.recipe.compat import Compat, Template
from tunesmith.recipe.schema import Recipe, Source

HEAD = """\
# Recipe reference

Generated from `src/tunesmith/recipe/schema.py` by `scripts/docs`; do not edit.

A recipe is one YAML file. Keys that are not listed here are refused. `auto` is replaced by a value that
depends on the model, the data and the machine; the values taken are in the run's `resolved.yaml`.
Any key can be given on the command line: `--set train.lr=1e-4`, `--set data.sources.0.path=rows.jsonl`.
"""


def recipe_reference() -> str:
    """The whole page."""
    parts = [HEAD, _section("Top level", Recipe, skip_sections=True)]
    for name, field in Recipe.model_fields.items():
        section = _model_of(field)
        if section is not None:
            parts.append(_section(f"`{name}`", section))
        if name == "data":
            parts.append(_section("`data.sources[]`, `data.eval_sources[]`", Source))
        if name == "compat":
            parts.append(_section("`compat.template`", Template))
    return "\n".join(parts)


def _section(title: str, section: type[BaseModel], *, skip_sections: bool = False) -> str:
    rows = [f"## {title}\n", f"{(section.__doc__ or '').strip()}\n"]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if skip_sections and _model_of(field) is not None and field.default is not None:
            continue
        kind = _type_text(field.annotation, field.metadata).replace("|", "\\|")
        rows.append(f"| `{name}` | {kind} | {_default_text(field)} | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    optional = get_origin(kind) in (Union, types.UnionType)
    kinds = [k for k in (get_args(kind) if optional else (kind,)) if k is not type(None)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _type_text(kind: Any, metadata: list[Any] | None = None) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_text(args[0], list(getattr(args[1], "metadata", [])))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(f"`{arg}`" for arg in args)
    if origin in (list, tuple):
        return f"list of {_type_text(args[0])}"
    if origin is dict:
        return "mapping of text to text"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    sections = {Source: "source", Compat: "section", Template: "section"}
    text = names.get(kind) or sections.get(kind) or str(kind)
    limits = [_limit_text(item) for item in metadata or []]
    return " ".join([text, *filter(None, limits)])


def _limit_text(item: Any) -> str:
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    return " ".join(f"{sign} {getattr(item, name):g}" for name, sign in signs if hasattr(item, name))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, str) and ("\n" in value or "|" in value):
        return f"`{json.dumps(value)}`".replace("|", "\\|")
    return f"`{list(value) if isinstance(value, tuple) else value}`"
