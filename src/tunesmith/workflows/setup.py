"""Bring hosts to what docker and GPUs in containers need: plan, ask, apply, look again."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.cluster.inventory import read_cluster
from tunesmith.core.checks import Check
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.progress import say
from tunesmith.host.apply import Outcome, Session
from tunesmith.host.checks import run_checks
from tunesmith.host.distro import Distro, read_distro
from tunesmith.host.facts import Answer, Facts, load_facts
from tunesmith.host.inventory import LOCAL, Target, check_unique, parse_target, read_inventory
from tunesmith.host.probe import REMOTE_AT_ONCE, gather, here
from tunesmith.host.script import script_of
from tunesmith.host.steps import NEEDED_COMMANDS, NEEDED_FILES, plan_setup
from tunesmith.host.steps_types import Plan
from tunesmith.host.steps_types import SetupOptions as SetupOptions  # the command line builds it
from tunesmith.workflows.cluster_targets import target_of

# What setup does not change; their numbers move by themselves.
UNTOUCHED = ("disk", "memory", "cpu")


@dataclass(frozen=True)
class Where:
    """Which hosts: `targets`, those of an `inventory` and of a `cluster` file; this host when none is given.

    `facts`: a recorded facts file in place of a host. `ssh_key`: private key for the targets.
    """

    targets: tuple[str, ...] = ()
    inventory: Path | None = None
    ssh_key: Path | None = None
    facts: Path | None = None
    cluster: Path | None = None


@dataclass
class HostSetup:
    """One host: its plan, and what came of it. `driver_fix`: commands that bring the GPU driver back."""

    name: str
    distro: Distro | None = None
    plan: Plan | None = None
    options: SetupOptions = field(default_factory=SetupOptions)
    before: list[Check] = field(default_factory=list)
    outcome: Outcome | None = None
    changed: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and (self.outcome is None or self.outcome.failed is None) and not self.left

    @property
    def driver_fix(self) -> list[str]:
        return [
            line
            for check in self.before
            if check.id == "driver" and check.status == "fail"
            for line in check.fix
        ]

    def as_dict(self) -> dict[str, Any]:
        plan = self.plan or Plan(())
        return {
            "host": self.name,
            "distro": self.distro.name if self.distro else None,
            "steps": _hide(plan, [step.as_dict() for step in plan.steps]),
            "warnings": list(plan.warnings),
            "driver_fix": self.driver_fix,
            "applied": self.outcome.done if self.outcome else [],
            "failed": self._failed(plan),
            "changed": self.changed,
            "left": self.left,
            "error": self.error,
        }

    def _failed(self, plan: Plan) -> dict[str, Any] | None:
        outcome = self.outcome
        if outcome is None or outcome.failed is None:
            return None
        return _hide(
            plan,
            {"step": outcome.failed.id, "command": list(outcome.command or ()), "output": outcome.output},
        )


def _hide(plan: Plan, value: Any) -> Any:
    """A JSON value with the plan's secrets blotted out."""
    if isinstance(value, str):
        return plan.hide(value)
    if isinstance(value, list):
        return [_hide(plan, item) for item in value]
    return {key: _hide(plan, item) for key, item in value.items()} if isinstance(value, dict) else value


def setup(
    where: Where,
    options: SetupOptions,
    *,
    show: Callable[[list[HostSetup]], None],
    confirm: Callable[[], bool],
    dry_run: bool = False,
    script: Path | None = None,
    sudo_password: str | None = None,
) -> list[HostSetup]:
    """Plan every host, show the plans, ask, apply, look again. Returns the hosts in the order given.

    `dry_run` stops after showing; `script` writes the plan of the one host to a file and stops. Raises
    UserError for bad input, TunesmithError when the only host cannot be reached or the answer was no.
    """
    if options.bundle is not None and not options.bundle.is_dir():
        raise UserError(
            f"--bundle {options.bundle}: there is no such folder", hint="give the bundle's folder"
        )
    targets = targets_of(where)
    if where.facts is not None:
        if not (dry_run or script):
            raise UserError(
                f"--facts {where.facts}: recorded facts can be planned for, not set up",
                hint="add --dry-run, or --script FILE",
            )
        hosts = [_planned(str(where.facts), load_facts(where.facts), options)]
        return _finish_plan(hosts, show, script)
    if (dry_run or script) and targets == [LOCAL]:
        facts = _unmasked(gather(also=NEEDED_COMMANDS), lambda args: here(args))
        return _finish_plan([_planned("@local", facts, _for_user(options, _local_user(facts)))], show, script)
    with Session(targets, sudo_password=sudo_password) as session:
        hosts = [_look(session, target, options, root=not (dry_run or script)) for target in targets]
        if dry_run or script:
            return _finish_plan(hosts, show, script)
        show(hosts)
        _carry_out(session, hosts, confirm)
    return hosts


def targets_of(where: Where) -> list[Target]:
    """The hosts that are asked for; this one when none is. Raises UserError for a bad name or file."""
    targets = [parse_target(text, where.ssh_key) for text in where.targets]
    if where.inventory is not None:
        targets += read_inventory(where.inventory)
    if where.cluster is not None:
        targets += [target_of(host) for host in read_cluster(where.cluster).hosts]
    if where.facts is not None and targets:
        raise UserError("--facts stands for one host: leave --target, --inventory and --cluster out")
    check_unique(targets, "--target")
    return targets or [LOCAL]


def _finish_plan(
    hosts: list[HostSetup], show: Callable[[list[HostSetup]], None], script: Path | None
) -> list[HostSetup]:
    show(hosts)
    if script is None:
        return hosts
    if len(hosts) != 1 or hosts[0].plan is None:
        raise UserError("--script writes the plan of one host", hint="name one --target")
    plan, distro = hosts[0].plan, hosts[0].distro
    text = script_of(plan, f"Set up {distro.name if distro else hosts[0].name} for tunesmith")
    # Nobody else may read a proxy's password, at no instant.
    script.unlink(missing_ok=True)
    mode = 0o700 if plan.secrets else 0o755
    with open(os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    return hosts


def _planned(name: str, facts: Facts, options: SetupOptions) -> HostSetup:
    return HostSetup(name, read_distro(facts), plan_setup(facts, options), options, run_checks(facts))


def _for_user(options: SetupOptions, user: str | None) -> SetupOptions:
    return options if options.user or not user else dataclasses.replace(options, user=user)


def _local_user(facts: Facts) -> str | None:
    return os.environ.get("SUDO_USER") or facts.answer("id -un").stdout.strip() or None


def _look(session: Session, target: Target, options: SetupOptions, *, root: bool) -> HostSetup:
    """Plan one host. With several, a fault of one is noted there and the others go on."""
    alone = len(session.targets) == 1
    try:
        if target.name in session.unreachable:
            raise TunesmithError(f"{target.name}: {session.unreachable[target.name]}", hint=_ssh_hint(target))
        caller = os.environ.get("SUDO_USER") if target.is_local else None
        login = session.answer(target, "id -un").stdout.strip()
        if root:
            session.become_root(target)
        facts = _facts_of(session, target)
        wanted = dataclasses.replace(
            _for_user(options, caller or login), upload=not target.is_local, running=not target.is_chroot
        )
        return _planned(target.name, facts, wanted)
    except TunesmithError as error:
        if alone:
            raise
        return HostSetup(target.name, error=str(error))


def _facts_of(session: Session, target: Target) -> Facts:
    """The facts of a host, asked as root where the session has become root there."""
    if target.host is None:
        prefix = session.prefix(target)
        facts = gather(lambda args: here([*prefix, *args]), also=NEEDED_COMMANDS)
    else:
        facts = gather(
            lambda args: session.answer(target, shlex.join(args)),
            also=NEEDED_COMMANDS,
            at_once=REMOTE_AT_ONCE,
        )
    return _unmasked(facts, lambda args: session.answer(target, shlex.join(args)))


def _unmasked(facts: Facts, ask: Callable[[list[str]], Answer]) -> Facts:
    """The same facts with the settings files as they are: a masked secret must never be written back."""
    answers = {path: ask(["cat", path]) for path in NEEDED_FILES}
    others = {path: text for path, text in facts.files.items() if path not in answers}
    return dataclasses.replace(facts, files=others | {p: a.stdout for p, a in answers.items() if a.ok})


def _ssh_hint(target: Target) -> str:
    return f"try 'ssh {target.name}' by hand; --ssh-key names the key" if target.host else "it needs root"


def _carry_out(session: Session, hosts: list[HostSetup], confirm: Callable[[], bool]) -> None:
    """Ask, apply the plans, and look at every host again. Raises TunesmithError when the answer is no."""
    plans = {host.name: host.plan for host in hosts if host.plan and host.plan.steps}
    if not plans:
        return
    if not confirm():
        raise TunesmithError("nothing was changed: the plan was not agreed to")
    outcomes = session.apply(plans, lambda name, step: say(f"{name}: {step.title} ..."))
    for host in hosts:
        if host.name in plans:
            host.outcome = outcomes[host.name]
            _look_again(session, host)


def _look_again(session: Session, host: HostSetup) -> None:
    """Note what the checks say otherwise than before, and which steps are needed still."""
    target = next(t for t in session.targets if t.name == host.name)
    facts = _facts_of(session, target)
    before = {check.id: check for check in host.before}
    for check in run_checks(facts):
        old = before.get(check.id)
        if (
            check.id not in UNTOUCHED
            and old is not None
            and (old.status, old.found) != (check.status, check.found)
        ):
            host.changed.append(
                {
                    "id": check.id,
                    "title": check.title,
                    "before": {"status": old.status, "found": old.found},
                    "after": {"status": check.status, "found": check.found},
                }
            )
    if host.outcome is not None and host.outcome.failed is None and host.plan is not None:
        asked = {step.id for step in host.plan.steps}
        host.left = [step.id for step in plan_setup(facts, host.options).steps if step.id in asked]
