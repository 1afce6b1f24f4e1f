"""Read a recipe: YAML, then `--set` overrides, then checks. All faults are reported at once."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tunesmith.core.errors import RecipeErrors, TunesmithError, UserError
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.section import Section
from tunesmith.recipe.serving import Serve, option_of

SomeSection = TypeVar("SomeSection", bound=Section)
PLAIN = re.compile(r"(\w+:/)?/[\w/.@+-]+")  # a path or URL that YAML reads as text
EXAMPLE = "model: {path: smollm2-135m-instruct}\ndata: {sources: [{path: my_rows.jsonl}]}"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `section.key=value` overrides laid over it.

    Raises RecipeErrors with every fault (file, key path, value, remedy), or UserError when the file cannot
    be read as YAML.
    """
    values = read_yaml(path)
    places = _apply(values, overrides or [])
    return check(values, str(path), places)


def check(
    values: dict[str, Any], file: str, places: dict[tuple[str | int, ...], str] | None = None
) -> Recipe:
    """Validate plain values. `places` names the origin of keys that did not come from `file`."""
    return checked(Recipe, values, file, places)


def check_serve(base: Serve, given: Mapping[str, Any]) -> Serve:
    """`base` with the settings `given` on the command line in place of its own.

    Raises RecipeErrors with every fault.
    """
    values = {"serve": base.model_dump() | dict(given)}
    places: dict[tuple[str | int, ...], str] = {("serve", name): option_of(name) for name in given}
    return checked(_ServeAlone, values, "the recipe", places).serve


class _ServeAlone(Section):
    serve: Serve


def checked(
    kind: type[SomeSection],
    values: dict[str, Any],
    file: str,
    places: dict[tuple[str | int, ...], str] | None = None,
) -> SomeSection:
    """`values` as a `kind`: a recipe, or another file of ours. Raises RecipeErrors with every fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [_fault(dict(entry), kind, file, places or {}) for entry in error.errors()]
        raise RecipeErrors(_without_repeats(faults)) from None


def read_yaml(path: Path, noun: str = "recipe", example: str = EXAMPLE) -> dict[str, Any]:
    """The mapping in a YAML file; `noun` and `example` say in errors what it should hold."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {noun}", hint=f"write one, at least:\n{example}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a {noun}", hint="give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from None
    return parse_yaml(text, str(path), noun, example)


def parse_yaml(text: str, file: str, noun: str = "recipe", example: str = EXAMPLE) -> dict[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{file}: {line}{error.problem}", hint="the file is not valid YAML here") from None
    except YAMLError as error:
        raise UserError(f"{file}: {error}", hint="the file is not valid YAML") from None
    if values is None:
        raise UserError(f"{file}: the {noun} is empty", hint=f"write at least:\n{example}")
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(
            f"{file}: a {noun} is a mapping of sections, not a {kind}", hint=f"start with:\n{example}"
        )
    return values


def override(key: str, text: str) -> str:
    """A `KEY=VALUE` of `--set` whose value is this text, whatever YAML would make of it."""
    return f"{key}={text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)}"


def dump_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that reads back as the same recipe."""
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def _apply(values: dict[str, Any], overrides: list[str]) -> dict[tuple[str | int, ...], str]:
    """Lay `section.key=value` over `values`; returns where each key came from."""
    places: dict[tuple[str | int, ...], str] = {}
    faults: list[TunesmithError] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            faults.append(UserError(f"--set '{text}': there is no '='", hint="write --set section.key=value"))
            continue
        try:
            place = _put(values, key.strip().split("."), _scalar(raw))
            places[place] = f"--set {key.strip()}"
        except ValueError as error:
            faults.append(UserError(f"--set '{text}': {error}", hint="write --set section.key=value"))
    if faults:
        raise RecipeErrors(faults)
    return places


def _scalar(raw: str) -> Any:
    """A value as YAML reads it: numbers, true, null, [lists], {maps}; else text."""
    try:
        return YAML(typ="safe", pure=True).load(raw) if raw.strip() else raw
    except YAMLError:
        return raw


def _put(values: dict[str, Any], keys: list[str], value: Any) -> tuple[str | int, ...]:
    spot: Any = values
    place: list[str | int] = []
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        step: str | int = key
        if isinstance(spot, list):
            if not key.isdigit() or int(key) > len(spot):
                raise ValueError(f"'{key}' is not one of the {len(spot)} entries, nor the next one")
            step = int(key)
            if step == len(spot):
                spot.append(None)
        elif not isinstance(spot, dict):
            raise ValueError(f"'{'.'.join(map(str, place))}' has no keys")
        place.append(step)
        if following is None:
            spot[step] = value
        else:
            held = spot[step] if isinstance(step, int) else spot.get(step)
            if held is None:
                held = [] if following == "0" else {}
                spot[step] = held
            spot = held
    return tuple(place)


def _fault(
    entry: dict[str, Any], root: type[BaseModel], file: str, places: dict[tuple[str | int, ...], str]
) -> TunesmithError:
    where = tuple(part for part in entry["loc"] if not _is_branch(part))
    path = ".".join(str(part) for part in where) or "the file"
    origin = next((name for place, name in places.items() if where[: len(place)] == place), file)
    if entry["type"] == "extra_forbidden":
        hint = _near(str(where[-1]), _section(where[:-1], root), root)
        return UserError(f"{origin}: {path}: there is no such key", hint=hint)
    if entry["type"] == "missing":
        return UserError(f"{origin}: {path}: is missing", hint=_describe(where, root))
    given = entry["input"]
    shown = f"{given!r}" if not isinstance(given, (dict, list)) else f"a {type(given).__name__}"
    return UserError(f"{origin}: {path}: {shown} {_reason(entry)}", hint=_describe(where, root))


def _reason(entry: dict[str, Any]) -> str:
    context = entry.get("ctx", {})
    kinds = {
        "float_parsing": "is not a number",
        "float_type": "is not a number",
        "int_parsing": "is not a whole number",
        "int_type": "is not a whole number",
        "int_from_float": "is not a whole number",
        "bool_parsing": "is neither true nor false",
        "bool_type": "is neither true nor false",
        "string_type": "is not text",
        "list_type": "is not a list",
        "model_type": "is not a section with keys",
        "literal_error": f"is not one of {context.get('expected')}",
        "greater_than": f"is not greater than {context.get('gt')}",
        "greater_than_equal": f"is less than {context.get('ge')}",
        "less_than": f"is not less than {context.get('lt')}",
        "less_than_equal": f"is greater than {context.get('le')}",
        "too_short": f"has fewer than {context.get('min_length')} entries",
        "dict_type": "is not a mapping",
        "finite_number": "is not a finite number",
        "string_too_short": "is empty",
        "value_error": str(context.get("error")),
        "string_pattern_mismatch": "may hold only letters, digits, '.', '_' and '-'",
    }
    return kinds.get(entry["type"], f"does not fit: {entry['msg']}")


def _is_branch(part: str | int) -> bool:
    """Pydantic puts the tried member of a union into the path; it is not a key of the recipe."""
    if not isinstance(part, str):
        return False
    return part.startswith(("literal[", "constrained-", "list[")) or part in ("int", "float")


def _section(where: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The model class that `where` leads to, from `root` on."""
    model = root
    for part in where:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        inner = [field.annotation, *get_args(field.annotation)]
        model = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return model


def _near(key: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    names = list(section.model_fields)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    elsewhere = [
        f"{name}.{key}"
        for name, field in root.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, BaseModel)
        and key in field.annotation.model_fields
    ]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else f"known here: {', '.join(names)}"


def _describe(where: tuple[str | int, ...], root: type[BaseModel]) -> str | None:
    for end in range(len(where), 0, -1):  # an entry of a list is described where the list is
        field = _section(where[: end - 1], root).model_fields.get(str(where[end - 1]))
        if field is not None:
            return field.description
    return None


def _without_repeats(faults: list[TunesmithError]) -> list[TunesmithError]:
    """A value that fits no member of a union is reported once a member: keep the first of each place."""
    seen: dict[str, TunesmithError] = {}
    for fault in faults:
        place = ": ".join(fault.what.split(": ")[:2])
        seen.setdefault(place, fault)
    return list(seen.values())
