"""API keys: a file of hashed keys with names, limits and rights, and a server's live view of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from tunesmith.core.errors import UserError
from tunesmith.core.paths import locked, write_json
from tunesmith.core.progress import say

PREFIX = "ts-"
SINGLE_KEY_NAME = "api_key"
"""Name, in logs and metrics, of the one key given by --api-key."""
_PERIODS_S = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` requests in any `period_s` seconds, all of them at once if the client likes."""

    count: int
    period_s: int

    @classmethod
    def parse(cls, text: str) -> Rate:
        """`60/min` and the like. Raises UserError."""
        found = re.fullmatch(r"([1-9]\d{0,8})/([a-z]+)", text.strip())
        if found is None or found[2] not in _PERIODS_S:
            raise UserError(f"rate '{text}': is not a number of requests a period", hint="try 60/min or 10/s")
        return cls(int(found[1]), _PERIODS_S[found[2]])


class Key(BaseModel):
    """One key of a file. Limits: None, no limit. models: served names it may use; None: all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    rate: str | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1)] | None = None
    admin: bool = False
    models: tuple[str, ...] | None = None

    @field_validator("rate")
    @classmethod
    def _readable(cls, rate: str | None) -> str | None:
        try:
            return rate if rate is None or Rate.parse(rate) else None
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def request_rate(self) -> Rate | None:
        return None if self.rate is None else Rate.parse(self.rate)

    def expired(self, now: datetime | None = None) -> bool:
        return self.expires is not None and self.expires <= (now or datetime.now(UTC))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[int, Field(ge=1, le=1)]
    keys: list[Key]


def default_keys_file() -> Path:
    """$TUNESMITH_KEYS_FILE, else keys.json in the user's configuration folder."""
    if given := os.environ.get("TUNESMITH_KEYS_FILE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "tunesmith" / "keys.json"


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hashed(secret: bytes) -> str:
    """A key's SHA-256 as 64 hex digits.

    A slow hash is for what people choose: it makes guessing dear. These keys are 256 random bits, which
    nobody guesses however fast the hash is, and every request hashes one.
    """
    return hashlib.sha256(secret).hexdigest()


def read_keys(file: Path) -> list[Key]:
    """The keys of a file, oldest first. Raises UserError for one that is missing, unreadable or damaged."""
    try:
        return _File.model_validate(json.loads(file.read_bytes())).keys
    except FileNotFoundError:
        hint = "'tunesmith keys add NAME' makes it"
        raise UserError(f"{file}: there is no such file of keys", hint=hint) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", hint="give a file that this user can read") from None
    except ValidationError as error:
        raise UserError(f"{file}: {_first_fault(error)}", hint=_REPAIR) from None
    except ValueError as error:
        raise UserError(f"{file}: is not a file of keys: {error}", hint=_REPAIR) from None


_REPAIR = "restore it from a copy, or move it away and add the keys anew"


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{where}: {first['msg']}"


def add_key(file: Path, key: Key) -> None:
    """Put a key into a file, which is made if it is missing. Raises UserError for a name that is taken."""
    file = file.expanduser().resolve()
    if key.name == SINGLE_KEY_NAME:
        raise UserError(f"key name '{key.name}': stands for the key of --api-key", hint="take another name")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(file):
        keys = read_keys(file) if file.exists() else []
        if any(known.name == key.name for known in keys):
            hint = f"take another name, or first 'tunesmith keys revoke {key.name}'"
            raise UserError(f"{file}: a key '{key.name}' is there already", hint=hint)
        _write(file, [*keys, key])


def remove_key(file: Path, name: str) -> Key:
    """Take a key out of a file. Raises UserError for an unknown name."""
    file = file.expanduser().resolve()
    keys = read_keys(file)  # before the lock, which would leave a file beside a path that was mistyped
    with locked(file):
        keys = read_keys(file)
        found = next((key for key in keys if key.name == name), None)
        if found is None:
            raise UserError(f"{file}: there is no key '{name}'", hint=_near(name, [k.name for k in keys]))
        _write(file, [key for key in keys if key is not found])
    return found


def _near(name: str, known: list[str]) -> str:
    if near := get_close_matches(name, known, n=1):
        return f"did you mean '{near[0]}'?"
    return "'tunesmith keys list' shows the names"


def _write(file: Path, keys: list[Key]) -> None:
    write_json(file, _File(version=1, keys=keys).model_dump(mode="json", exclude_defaults=False), mode=0o600)


def exposure(file: Path) -> str | None:
    """A warning when others than its owner may read or change the file; None when it is private."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077 == 0:
        return None
    return f"{file}: others than its owner may use it (mode {mode:04o}): chmod 600 '{file}'"


class Keyring:
    """Which keys a server takes: those of a file, as it is now, and one single key, which is an admin's.

    The file is read again when it changes. One that cannot be understood changes nothing (a warning tells
    of it); one that is gone has no keys. Raises UserError at the start for a file that cannot be read.
    """

    def __init__(self, file: Path | None = None, api_key: str | None = None) -> None:
        self._file = None if file is None else file.expanduser()
        self._single = _single_key(api_key) if api_key else None
        self._keys: Sequence[Key] = ()
        self._seen: tuple[int, ...] | None = None
        if self._file is not None:
            self._keys, self._seen = read_keys(self._file), _state(self._file)
            self._warn_of_exposure()

    @property
    def asks(self) -> bool:
        """Whether a key is needed at all."""
        return self._file is not None or self._single is not None

    def find(self, secret: bytes) -> Key | None:
        """The key that this is, even when it has expired."""
        given = hashed(secret)
        # Without a break: how long it takes must not tell which key was close.
        found = None
        for key in self._current():
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found

    def _current(self) -> Sequence[Key]:
        if self._file is not None and (state := _state(self._file)) != self._seen:
            self._seen = state
            self._reread()
        return self._keys if self._single is None else (*self._keys, self._single)

    def _reread(self) -> None:
        assert self._file is not None
        try:
            self._keys = read_keys(self._file) if self._seen else ()
            self._warn_of_exposure()
        except UserError as error:
            say(f"warning: {error.what}; the keys read before stay valid")
        if not self._seen:
            say(f"warning: {self._file} is gone: its keys are refused")

    def _warn_of_exposure(self) -> None:
        assert self._file is not None
        if self._file.exists() and (warning := exposure(self._file)):
            say(f"warning: {warning}")


def _state(file: Path) -> tuple[int, ...] | None:
    """Changes whenever the file does; None when it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _single_key(secret: str) -> Key:
    digest = hashed(secret.encode())
    return Key(name=SINGLE_KEY_NAME, sha256=digest, created=datetime.now(UTC), admin=True)
