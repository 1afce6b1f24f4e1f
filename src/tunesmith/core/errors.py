"""The error tree. Every error a user can cause is one of these; anything else is a bug.

TunesmithError            exit code 1
  UserError               exit code 2: an input is wrong (file, option, recipe, data)
    RecipeErrors          all errors of one recipe at once
  PlanRefused             exit code 3: the run cannot work; the hint is a recipe that can
  RunFailed               exit code 4: the run stopped (a loss that is not finite, a full disk)
  Interrupted             exit code 128 + signal: stopped on request, state saved
  MissingExtra            exit code 2: an optional part of tunesmith is not installed
"""

from __future__ import annotations

from typing import Any


class TunesmithError(Exception):
    """What went wrong, and what to do about it.

    `what` names the place, the value and the fault in one sentence; `hint` is the remedy.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\n\nhint: {self.hint}"

    def as_dict(self) -> dict[str, Any]:
        """The error as `--json` prints it."""
        return {"type": type(self).__name__, "what": self.what, "hint": self.hint}


class UserError(TunesmithError):
    exit_code = 2


class RecipeErrors(UserError):
    """Every fault of a recipe, each as `file: key.path: 'value' fault. hint: remedy`."""

    def __init__(self, faults: list[TunesmithError]) -> None:
        self.faults = faults
        lines = [f.what + (f" hint: {f.hint}" if f.hint else "") for f in faults]
        super().__init__("\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"errors": [f.as_dict() for f in self.faults]}


class MissingExtra(UserError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package '{package}' is not installed",
            hint=f"pip install 'tunesmith[{extra}]'",
        )


class PlanRefused(TunesmithError):
    exit_code = 3


class RunFailed(TunesmithError):
    exit_code = 4


class Interrupted(TunesmithError):
    """A signal asked the program to stop; what was running has been saved."""

    def __init__(self, signal_number: int, what: str, hint: str | None = None) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number
