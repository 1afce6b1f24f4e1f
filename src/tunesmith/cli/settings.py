"""A command's options out of the fields of a recipe's section: no name, sentence or default stands twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import typer
from pydantic.fields import FieldInfo

from tunesmith.recipe.section import Section

KEYWORD = inspect.Parameter.KEYWORD_ONLY
Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Settings:
    """How the fields of `section` look on a command line.

    panels: the fields under each heading of the help. option_of: the option of a field. metavars: where a
    type does not tell what is expected. envvars: variables that stand for an option that is not given.
    notes: what is to be said of an option alone.
    """

    section: type[Section]
    panels: Mapping[str, Sequence[str]]
    option_of: Callable[[str], str]
    metavars: Mapping[str, str] = field(default_factory=dict)
    envvars: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def options(self, command: Command) -> Command:
        """`command` with an option for every field before its own; its ** argument gets all of them, None for
        those that are not given.

        Values come as texts, lists of texts, True or False: the section's own checks read them, so that a
        fault reads the same wherever a value comes from.
        """
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [one.replace(kind=KEYWORD) for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [self._parameter(name, panel) for panel, names in self.panels.items() for name in names]
        command.__signature__ = inspect.Signature([*made, *kept])  # type: ignore[attr-defined]
        return command

    def _parameter(self, name: str, panel: str) -> inspect.Parameter:
        described = self.section.model_fields[name]
        option, kinds = self.option_of(name), _kinds(described.annotation)
        kind: Any = str | None
        if bool in kinds:
            kind, option = bool | None, f"{option}/--no-{option.removeprefix('--')}"
        elif _is_many(described):
            kind = list[str] | None
        made = typer.Option(
            None,
            option,
            help=" ".join(filter(None, (self._help(described), self.notes.get(name)))),
            rich_help_panel=panel,
            metavar=None if bool in kinds else self.metavars.get(name) or "|".join(map(_word, kinds)),
            envvar=self.envvars.get(name),
            show_envvar=name in self.envvars,
        )
        return inspect.Parameter(name, KEYWORD, annotation=kind, default=made)

    def _help(self, described: FieldInfo) -> str:
        text = described.description or ""
        for name in self.section.model_fields:
            text = text.replace(name, self.option_of(name)) if "_" in name else text
        if _is_many(described):
            return f"{text} May be given again."
        default = described.default
        if default in (None, "auto", False) or "default" in text:
            return text
        return (
            f"{text} Default: {default:g}." if isinstance(default, float) else f"{text} Default: {default}."
        )


def _is_many(described: FieldInfo) -> bool:
    return described.default_factory is not None


def _kinds(annotation: Any) -> list[Any]:
    """The types and literal values that a field takes, without None."""
    inner = get_args(annotation)
    if not inner:
        return [] if annotation is type(None) else [annotation]
    return [kind for one in inner for kind in _kinds(one) if isinstance(kind, (type, str))]


def _word(kind: Any) -> str:
    return kind if isinstance(kind, str) else {int: "N", float: "NUMBER"}.get(kind, "TEXT")
