"""What is known of a host: what commands answered, what files hold, and its environment.

`Facts` are plain data. They come from a host that is looked at (`probe.py`), or from a file that was recorded
on another one, so that every judgement and every plan can be tested without the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_text

UNKNOWN = 127
TIMED_OUT = 124
SHAPE = 'expected {"commands": {COMMAND: {"rc", "stdout", "stderr"}}, "files": {PATH: TEXT}, "env": {…}}'


@dataclass(frozen=True)
class Answer:
    """How a command ended. rc 127: there is no such command; 124: it did not end in time."""

    rc: int
    stdout: str = ""
    stderr: str = ""

    @property
    def ok(self) -> bool:
        return self.rc == 0

    @property
    def text(self) -> str:
        """Both outputs, stdout first."""
        return f"{self.stdout}\n{self.stderr}".strip()


@dataclass(frozen=True)
class Facts:
    """A command that is not here was not found on the host; a file that is not here does not exist."""

    commands: Mapping[str, Answer] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def answer(self, command: str) -> Answer:
        """What the command answered; spaces around a pipe and the kind of quotes make no difference."""
        found = self.commands.get(command)
        return found if found is not None else self._by_plain.get(plain(command), Answer(UNKNOWN))

    def has(self, command: str) -> bool:
        return command in self.commands or plain(command) in self._by_plain

    def file(self, path: str) -> str | None:
        return self.files.get(path)

    def matching(self, pattern: str) -> dict[str, Answer]:
        """The commands, in their plain spelling, in which the regular expression is found."""
        return {command: answer for command, answer in self._by_plain.items() if re.search(pattern, command)}

    @cached_property
    def _by_plain(self) -> dict[str, Answer]:
        return {plain(command): answer for command, answer in self.commands.items()}

    def as_dict(self) -> dict[str, Any]:
        """The object of a facts file."""
        return {
            "commands": {
                command: {"rc": answer.rc, "stdout": answer.stdout, "stderr": answer.stderr}
                for command, answer in sorted(self.commands.items())
            },
            "files": dict(sorted(self.files.items())),
            "env": dict(sorted(self.env.items())),
        }

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")


def plain(command: str) -> str:
    """One spelling of a command: no space around pipes, single quotes, `-f` for docker's `--format`."""
    text = re.sub(r"\s*\\?\|\s*", "|", " ".join(command.split())).replace('"', "'")
    text = re.sub(r"^sudo (?:-n )?", "", text)
    return re.sub(r" --format[ =]", " -f ", text) if text.startswith("docker ") else text


def load_facts(path: Path) -> Facts:
    """Read a facts file. Raises UserError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="check the path of the facts file") from None
    except ValueError as error:
        raise UserError(f"{path}: this is not JSON: {error}", hint=SHAPE) from None
    return facts_from(value, str(path))


def facts_from(value: Any, name: str) -> Facts:
    """Facts from the object of a facts file; keys that are not known are left out.

    Raises UserError that names the place in the file `name`.
    """
    parts = _object(value, name)
    if parts and not parts.keys() & {"commands", "files", "env"}:
        raise UserError(f"{name}: none of 'commands', 'files', 'env' is in it", hint=SHAPE)
    commands = _object(parts.get("commands", {}), f"{name}: commands")
    return Facts(
        commands={key: _answer(item, f"{name}: commands: {key!r}") for key, item in commands.items()},
        files=_texts(parts.get("files", {}), f"{name}: files"),
        env=_texts(parts.get("env", {}), f"{name}: env"),
    )


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: {value!r:.60} is not an object", hint=SHAPE)
    return value


def _texts(value: Any, place: str) -> dict[str, str]:
    found = _object(value, place)
    for key, item in found.items():
        if not isinstance(item, str):
            raise UserError(f"{place}: {key!r}: {item!r:.60} is not text", hint=SHAPE)
    return found


def _answer(value: Any, place: str) -> Answer:
    parts = _object(value, place)
    rc = parts.get("rc")
    if not isinstance(rc, int) or isinstance(rc, bool):
        raise UserError(f"{place}: rc: {rc!r:.60} is not a whole number", hint=SHAPE)
    outputs = _texts({key: parts.get(key, "") for key in ("stdout", "stderr")}, place)
    return Answer(rc, outputs["stdout"], outputs["stderr"])
