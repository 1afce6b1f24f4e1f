"""What became of every value of a config: nothing of it is passed over in silence."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.convert.pyconfig import Config, Origin, Section, Symbol
from tunesmith.core.errors import UserError

MISSING = object()


@dataclass(frozen=True)
class Note:
    """A line of the config, as it stands there, and the recipe key it became; else why it became none."""

    line: int
    written: str
    became: str | None = None
    why: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ledger:
    """The values of a config by dotted place, such as train_dataloader.batch_size, and notes on each."""

    def __init__(self, config: Config, sections: Sequence[str]) -> None:
        self.config, self.sections = config, sections
        self._lines = config.path.read_text(encoding="utf-8", errors="replace").splitlines()
        self._notes: dict[tuple[int, str], Note] = {}
        self._taken: set[int] = set()

    def get(self, place: str, default: Any = None) -> Any:
        return self._look(place, default)[0]

    def line(self, place: str) -> int:
        """The line on which a value is written, else that of what holds it."""
        found: Origin | None = None
        while place and found is None:
            found = self._look(place, None)[1]
            place = place.rpartition(".")[0]
        return found.line if found else 1

    def error(self, place: str, what: str, hint: str | None = None) -> UserError:
        return UserError(f"{self.config.path}: line {self.line(place)}: {what}", hint=hint)

    def take(self, place: str, became: str | None, why: str | None = None) -> Any:
        """Note what a value became and return it; without a note when the config does not have it."""
        value, origin = self._look(place, MISSING)
        if value is MISSING:
            return None
        line = origin.line if origin else 1
        self._notes.setdefault((line, became or place), Note(line, self._text(line), became, why))
        self._taken.update(origin.line for _, origin in self._below(place, value, origin))
        return value

    def number(self, place: str, became: str, default: float, why: str | None = None) -> float:
        """`take` of a number. Raises UserError for anything else that stands there."""
        value = self.take(place, became, why)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(place, f"{place} is {value!r}, not a number")
        return value

    def sections_at(self, place: str) -> list[tuple[str, Section]]:
        """(place, section) of each dict in a list of them, or of a single one."""
        value = self.get(place)
        if isinstance(value, Section):
            return [(place, value)]
        items = value if isinstance(value, (list, tuple)) else []
        for number, item in enumerate(items):
            if not isinstance(item, Section):
                raise self.error(f"{place}.{number}", f"{place} holds {item!r}, which is not a dict")
        return [(f"{place}.{number}", item) for number, item in enumerate(items)]

    def notes(self, rules: Sequence[tuple[str, str | None]]) -> list[Note]:
        """All notes in the order of lines; values not taken get the reason of the first rule that matches.

        rules: (pattern of places, why nothing comes of it; None: it says nothing of its own).
        """
        taken = {note.line for note in self._notes.values()} | self._taken
        more: dict[int, Note] = {}
        for place, origin in self._leaves():
            why = next(
                (why for pattern, why in rules if fnmatch.fnmatchcase(place, pattern)), "no counterpart"
            )
            if why is not None and origin.line not in taken:
                more.setdefault(origin.line, Note(origin.line, self._text(origin.line), None, why))
        return sorted([*self._notes.values(), *more.values()], key=lambda note: note.line)

    def _text(self, line: int) -> str:
        return self._lines[line - 1].strip() if 0 < line <= len(self._lines) else ""

    def _look(self, place: str, default: Any) -> tuple[Any, Origin | None]:
        value: Any = self.config.values
        origin: Origin | None = None
        for key in place.split("."):
            if isinstance(value, Section) and key in value:
                inner = value.origins.get(key)
                # A variable's own line is where its dict begins; what it holds has lines of its own.
                value, origin = value[key], inner or origin
            elif isinstance(value, (list, tuple)) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            else:
                return default, None
        return value, origin

    def _leaves(self) -> Iterator[tuple[str, Origin]]:
        for name in self.sections:
            if name in self.config.values:
                yield from self._below(name, self.config.values[name], self.config.values.origins.get(name))

    def _below(self, place: str, value: Any, origin: Origin | None) -> Iterator[tuple[str, Origin]]:
        if isinstance(value, Section) and value:
            for key, item in value.items():
                yield from self._below(f"{place}.{key}", item, value.origins.get(key) or origin)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Section) for item in value):
            for number, item in enumerate(value):
                yield from self._below(f"{place}.{number}", item, origin)
        else:
            yield place, origin or Origin(1)


def last(value: Any) -> str:
    """The last part of a name: AdamW of torch.optim.AdamW, or of the text 'AdamW'."""
    return Symbol(value).last if isinstance(value, str) else str(value)
