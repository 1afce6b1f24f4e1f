"""tunesmith keys: who may use an endpoint, and how much."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.core.errors import UserError
from tunesmith.recipe.serving import NO_KEYS_FILE
from tunesmith.serve.keys import (
    Key,
    Rate,
    add_key,
    default_keys_file,
    exposure,
    hashed,
    new_secret,
    read_keys,
    remove_key,
)
from tunesmith.serve.quota import used_today

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """What a new key may do; None: no limit."""

    rate: str | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    expires: str | None = None
    admin: bool = False
    models: str | None = None


def add(name: str, options: KeyOptions, file: Path | None = None) -> dict[str, Any]:
    """Make a key; the result has the key itself, which is stored nowhere. Raises UserError."""
    file = _file(file)
    secret = new_secret()
    key = _key(name, options, secret)
    add_key(file, key)
    return {"key": secret, "file": str(file)} | _shown(key)


def list_all(file: Path | None = None) -> dict[str, Any]:
    """`file`, `keys` (without their hashes; with the tokens used today), `warnings`. Raises UserError."""
    file = _file(file)
    keys, used = read_keys(file), used_today(file)
    warning = exposure(file)
    return {
        "file": str(file),
        "keys": [_shown(key) | {"tokens_today": used.get(key.name, 0)} for key in keys],
        "warnings": [] if warning is None else [warning],
    }


def revoke(name: str, file: Path | None = None) -> dict[str, Any]:
    """Take a key away; servers that use the file refuse it from now on. Raises UserError."""
    file = _file(file)
    return {"revoked": remove_key(file, name).name, "file": str(file)}


def _file(given: Path | None) -> Path:
    file = given or default_keys_file()
    if str(file) == NO_KEYS_FILE:
        hint = (
            "give --file FILE, or take the variable TUNESMITH_KEYS_FILE away; a file of this name is ./none"
        )
        raise UserError(f"'{file}' stands for no file of keys", hint=hint)
    return file


def _key(name: str, options: KeyOptions, secret: str) -> Key:
    now = datetime.now(UTC).replace(microsecond=0)
    if options.rate is not None:
        _asked("--rate", options.rate, Rate.parse)
    try:
        return Key(
            name=name,
            sha256=hashed(secret.encode()),
            created=now,
            expires=None if options.expires is None else expiry(options.expires, now),
            rate=options.rate,
            concurrency=options.concurrency,
            tokens_per_day=options.tokens_per_day,
            admin=options.admin,
            models=None if options.models is None else _models(options.models),
        )
    except ValidationError as error:
        where = error.errors()[0]
        given = "" if where["loc"] == ("name",) else f" ({where['msg']})"
        raise UserError(
            f"key {where['loc'][0]} '{where['input']}': is not possible{given}",
            hint="a name has letters, digits, '.', '_' and '-', at most 64; limits are at least 1",
        ) from None


def _asked(option: str, text: str, parse: Any) -> None:
    try:
        parse(text)
    except UserError as error:
        raise UserError(f"{option} {text}: is not a rate", hint=error.hint) from None


def _models(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UserError(f"--models '{text}': has an empty name", hint="try --models orders,base")
    return names


def expiry(text: str, now: datetime) -> datetime:
    """When `30d`, `12h`, `90m`, `2w` from now is, or the first moment of a date (UTC). Raises UserError."""
    if found := re.fullmatch(r"([1-9]\d{0,4})([mhdw])", text):
        return now + timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--expires {text}: is neither a span nor a date", hint="try 30d, 12h or 2027-01-01"
        ) from None
    moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
    if moment <= now:
        raise UserError(f"--expires {text}: has passed already", hint="give a day to come")
    return moment


def _shown(key: Key) -> dict[str, Any]:
    """A key without its hash, and whether it has expired."""
    return key.model_dump(mode="json", exclude={"sha256"}) | {"expired": key.expired()}
