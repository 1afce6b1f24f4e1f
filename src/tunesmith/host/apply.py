"""Carry plans out with pyinfra: on this host, over ssh, or in a folder that holds a root file system.

pyinfra is imported only when a session opens: it takes longer to load than all the rest of the command.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.host.facts import UNKNOWN, Answer
from tunesmith.host.inventory import Target
from tunesmith.host.steps_types import Command, Copy, Plan, Step, Write

CONNECT_TIMEOUT_S = 15
TAIL_LINES = 30
RC_MARK = "tunesmith-rc="


@dataclass
class Outcome:
    """How a plan went on a host. `done`: ids of the steps that were carried out, in order.

    `failed`: the step that stopped it, `command`: the one that failed, `output`: its last lines.
    `reports`: what pyinfra tells of each step.
    """

    done: list[str] = field(default_factory=list)
    failed: Step | None = None
    command: Command | None = None
    output: str = ""
    reports: dict[str, Any] = field(default_factory=dict)


class Session:
    """Open connections to hosts. `unreachable`: the hosts that could not be reached, each with the reason.

    Raises UserError from `become_root` when a host needs a sudo password that was not given.
    """

    def __init__(self, targets: list[Target], *, sudo_password: str | None = None) -> None:
        self.targets = targets
        self.unreachable: dict[str, str] = {}
        self._password = sudo_password
        self._sudo: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Session:
        from pyinfra.api import Config, Inventory, State
        from pyinfra.api.exceptions import ConnectError, PyinfraError

        log = logging.getLogger("pyinfra")
        log.addHandler(logging.NullHandler())
        log.propagate = False  # its own report would stand beside ours
        if any(target.host for target in self.targets):
            # Where keys of new hosts are kept; pyinfra fails to connect when the folder is not there.
            (Path.home() / ".ssh").mkdir(mode=0o700, exist_ok=True)
        names = [(target.name, _ssh_data(target)) for target in self.targets]
        config = Config(CONNECT_TIMEOUT=CONNECT_TIMEOUT_S)
        self._state = State(Inventory((names, {})), config, check_for_changes=False)
        for target in self.targets:
            host = self._state.inventory.get_host(target.name)
            try:
                host.connect(show_errors=False, raise_exceptions=True)
                self._state.activate_host(host)
            except (ConnectError, PyinfraError, OSError) as error:
                self.unreachable[target.name] = str(error) or type(error).__name__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from pyinfra.api.connect import disconnect_all

        disconnect_all(self._state)

    @property
    def reached(self) -> list[Target]:
        return [target for target in self.targets if target.name not in self.unreachable]

    def become_root(self, target: Target) -> None:
        """Use sudo on this host from now on, unless the login there is root already."""
        self._sudo.pop(target.name, None)
        if self.answer(target, "id -u").stdout.strip() == "0":
            return
        if self._password is None and not self.answer(target, "sudo -n true").ok:
            raise _no_sudo(target, self.answer(target, "command -v sudo").ok)
        self._sudo[target.name] = {"_sudo": True, "_sudo_password": self._password or ""}
        if self.answer(target, "id -u").stdout.strip() != "0":
            raise UserError(
                f"{target.name}: sudo does not take this password", hint="or this user may not use sudo there"
            )

    def prefix(self, target: Target) -> list[str]:
        """What stands before a command of this machine that is to answer as the session would."""
        if target.is_chroot:
            return ["chroot", f"/{target.name.removeprefix('@chroot/')}"]
        return ["sudo", "-n"] if self._sudo.get(target.name) and not self._password else []

    def answer(self, target: Target, command: str, *, timeout_s: int = 20) -> Answer:
        """How a command of ours (never text of a user) answers on a host; rc 124 when it takes too long."""
        from pyinfra.api import StringCommand

        host = self._state.inventory.get_host(target.name)
        marked = StringCommand(f"{{ {command}\n}}; printf '\\n%s%s' {RC_MARK} $?")
        try:
            _, output = host.run_shell_command(marked, _timeout=timeout_s, **self._sudo.get(target.name, {}))
        except TimeoutError:
            return Answer(124, "", f"no answer within {timeout_s} s")
        lines = list(output.stdout_lines)
        if not lines or not lines[-1].startswith(RC_MARK):
            return Answer(UNKNOWN, output.stdout, output.stderr)
        text = "\n".join(lines[:-1])
        return Answer(int(lines[-1].removeprefix(RC_MARK)), text, output.stderr)

    def apply(self, plans: dict[str, Plan], say: Callable[[str, Step], None]) -> dict[str, Outcome]:
        """Carry out the plan of each host; hosts work at the same time, and one that fails stops alone.

        `say(host, step)` is called before each step.
        """
        from pyinfra.api.exceptions import PyinfraError
        from pyinfra.api.operations import run_ops

        outcomes = {name: Outcome() for name in plans}
        for name, plan in plans.items():
            for step in plan.steps:
                self._add(name, plan, step, outcomes[name], say)
        with suppress(PyinfraError):  # no host is left: what failed is in the outcomes
            run_ops(self._state)
        for name in plans:
            _note_failure(outcomes[name])
        return outcomes

    def _add(
        self, name: str, plan: Plan, step: Step, outcome: Outcome, say: Callable[[str, Step], None]
    ) -> None:
        from pyinfra.api.operation import add_op
        from pyinfra.operations import server

        host = self._state.inventory.get_host(name)

        def commands() -> Iterator[Any]:
            # pyinfra asks for the next command only after one that succeeded.
            say(name, step)
            outcome.failed = step
            for action in step.actions:
                yield from _pyinfra_commands(action, outcome)
            outcome.failed = outcome.command = None
            outcome.done.append(step.id)

        options = {"_env": plan.env, **self._sudo.get(name, {})}
        found = add_op(self._state, server.shell, commands=commands(), name=step.id, host=[host], **options)
        outcome.reports[step.id] = found[host]


def _pyinfra_commands(action: Command | Write | Copy, outcome: Outcome) -> Iterator[Any]:
    """One action as pyinfra runs it; the only place where argument lists become shell text."""
    from pyinfra.api import FileUploadCommand, StringCommand

    if isinstance(action, Copy):
        outcome.command = ("cp", str(action.source), action.target)
        yield FileUploadCommand(str(action.source), action.target)
        return
    text = action.text if isinstance(action, Write) else None
    for command in action.commands if isinstance(action, Write) else (action,):
        outcome.command = command
        stdin = {"_stdin": text} if command[0] == "dd" and text is not None else {}
        yield StringCommand(shlex.join(command), **stdin)


def _note_failure(outcome: Outcome) -> None:
    if outcome.failed is None:
        return
    report = outcome.reports[outcome.failed.id]
    lines = (report.stderr_lines or report.stdout_lines) if report.is_complete() else []
    outcome.output = "\n".join(lines[-TAIL_LINES:])


def _no_sudo(target: Target, has_sudo: bool) -> UserError:
    if not has_sudo:
        return UserError(
            f"{target.name}: setup has to be root, and sudo is not installed there", hint="log in as root"
        )
    return UserError(
        f"{target.name}: sudo asks for a password there",
        hint="add --ask-sudo-password, or run 'sudo tunesmith setup' on that host",
    )


def _ssh_data(target: Target) -> dict[str, Any]:
    """What pyinfra's ssh connector needs; the rest comes from ~/.ssh/config and the ssh agent."""
    if target.host is None:
        return {}
    given = {"ssh_hostname": target.host, "ssh_user": target.user, "ssh_port": target.port}
    key = {"ssh_key": str(target.key)} if target.key else {}
    return {name: value for name, value in given.items() if value is not None} | key
