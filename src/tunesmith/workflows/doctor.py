"""Look a host over: its facts, every check of them, and the fixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.checks import Check
from tunesmith.core.errors import UserError
from tunesmith.host.checks import run_checks
from tunesmith.host.distro import read_distro
from tunesmith.host.facts import Facts, load_facts
from tunesmith.host.inventory import parse_target
from tunesmith.host.probe import gather, gather_remote
from tunesmith.host.steps import NEEDED_COMMANDS, NEEDED_FILES


@dataclass(frozen=True)
class Diagnosis:
    """The checks of one host; `host`: its distribution, for people."""

    host: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether no check fails; warnings do not count."""
        return all(check.status != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [check.as_dict() for check in self.checks]}


def doctor(
    *,
    facts: Path | None = None,
    target: str | None = None,
    ssh_key: Path | None = None,
    record: Path | None = None,
) -> Diagnosis:
    """Judge this host, the host of `target` (`user@host[:port]`), or the one recorded in `facts`.

    `record`: a file to keep the facts in, secrets masked, together with those that `setup` reads. Raises
    UserError for a bad facts file or target, TunesmithError for a host that cannot be reached.
    """
    if facts is not None and (target is not None or record is not None):
        raise UserError(
            f"--facts {facts}: a recorded host is not looked at again",
            hint="leave --target and --record out, or leave --facts out",
        )
    found = _look(facts, target, ssh_key, whole=record is not None)
    if record is not None:
        found.save(record)
    return Diagnosis(read_distro(found).name, run_checks(found))


def _look(facts: Path | None, target: str | None, ssh_key: Path | None, *, whole: bool) -> Facts:
    if facts is not None:
        return load_facts(facts)
    also, files = (NEEDED_COMMANDS, NEEDED_FILES) if whole else ((), ())
    if target is None:
        return gather(also=also, files=files)
    return gather_remote(parse_target(target, ssh_key), also=also, files=files)
