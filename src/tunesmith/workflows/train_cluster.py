"""tunesmith train --cluster cluster.yaml: torchrun on every host over ssh, watched from here.

What the hosts print is merged, each line behind its host's name. The first host that fails, or cannot be
reached any more, ends the training on all.
"""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.cluster.inventory import read_cluster
from tunesmith.cluster.launch import Launch, make_launch
from tunesmith.cluster.ray_train import is_ray
from tunesmith.cluster.ssh import ALIVE_S, LOST, Reply, run_each, ssh_command
from tunesmith.cluster.torchrun import BEAT, END
from tunesmith.cluster.torchrun import GRACE_S as KILLED_AFTER_S
from tunesmith.core.errors import Interrupted, RunFailed, TunesmithError, UserError
from tunesmith.core.proc import Process, start_piped
from tunesmith.core.progress import say
from tunesmith.recipe.load import load_recipe
from tunesmith.workflows.launch import GRACE_S, SHOWN_LINES, STOPPED, as_error, how_it_ended

BEAT_S = 5.0
POLL_S = 0.05
ARRIVE_S = 120.0
HINT = "the same command goes on from the last checkpoint, on the hosts that the cluster file then names"
# Lays the recipe down, and says what is installed.
ARRIVE = (
    "import json, sys, pathlib; from tunesmith.core.paths import write_text; "
    "from tunesmith.hub.lock import versions; "
    "write_text(pathlib.Path(sys.argv[1]), sys.stdin.read(), mode=0o600); print(json.dumps(versions()))"
)


def hosts_file(cluster: str) -> Path | None:
    """The file of hosts that `--cluster` names; None for a Ray cluster."""
    return None if is_ray(cluster) else Path(cluster)


def open_launch(recipe_path: Path, overrides: Sequence[str], cluster_path: Path, *, fresh: bool) -> Launch:
    """What would be trained where. Raises UserError for whatever is wrong with the two files."""
    command = ["tunesmith", "train", str(recipe_path), "--cluster", str(cluster_path)]
    command += [part for override in overrides for part in ("--set", override)]
    return make_launch(
        load_recipe(recipe_path, list(overrides)),
        recipe_path,
        overrides,
        read_cluster(cluster_path),
        fresh=fresh,
        command=shlex.join(command),
        here=Path.cwd(),
    )


def command_lines(launch: Launch) -> dict[str, list[str]]:
    """Host: the arguments of the program that trains there."""
    hosts = launch.cluster.hosts
    return {host.name: ssh_command(host, launch.on_host(number)) for number, host in enumerate(hosts)}


def train_on_hosts(launch: Launch) -> dict[str, Any]:
    """Train on all hosts, and wait for their end. Returns what rank 0 printed for `--json`, and "hosts".

    Raises UserError for a host that cannot be reached or has other versions than the first; the error of the
    host that failed first; RunFailed when one was lost; Interrupted.
    """
    prepare(launch)
    names = ", ".join(host.name for host in launch.cluster.hosts)
    say(f"training on {len(launch.cluster.hosts)} hosts: {names}")
    with HostCrew(command_lines(launch)) as crew:
        value = crew.wait()
    return value | {"hosts": [host.name for host in launch.cluster.hosts]}


# -- before it begins ----------------------------------------------------------------------------------------


def prepare(launch: Launch) -> None:
    """Carry the recipe to every host. Raises UserError with every host that is not ready."""
    arrive = ["-c", ARRIVE, launch.carried_to]
    commands = [(host, launch.python(number, arrive)) for number, host in enumerate(launch.cluster.hosts)]
    replies = run_each(commands, input=launch.recipe, timeout_s=ARRIVE_S)
    faults = [UserError(*_explain(launch, reply)) for reply in replies if not reply.ok]
    faults = faults or _differing([(reply.host.name, _versions(reply)) for reply in replies])
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise UserError("\n".join(f"{fault.what} hint: {fault.hint}" for fault in faults))


def _versions(reply: Reply) -> dict[str, str]:
    return dict(json.loads(reply.stdout.splitlines()[-1]))


def _explain(launch: Launch, reply: Reply) -> tuple[str, str]:
    """What is wrong with a host, and the remedy, by the last line that it (or ssh) said."""
    host, last = reply.host, reply.reason.strip()
    python, file = launch.cluster.python_on(host), "the cluster file"
    named = f"name its interpreter in {file}: python: /opt/tunesmith/bin/python"
    if reply.code == LOST and "Permission denied" in last:
        return f"{host.name}: ssh is refused: {last}", f"check 'user' and 'key' of the host in {file}"
    if reply.code == LOST and "verification failed" in last:
        return f"{host.name}: ssh: {last}", f"if it was installed anew: ssh-keygen -R {host.host}"
    if reply.code == LOST:
        return f"{host.name}: ssh cannot reach it: {last}", f"check 'host' and 'port' in {file}"
    if "No module named" in last:
        hint = f"'tunesmith setup --cluster' installs it; or {named}"
        return f"{host.name}: {python} there has no tunesmith, or another version of it: {last}", hint
    if "cd: " in last:
        hint = f"mount it on every host, or name another in {file}: shared: /mnt/shared"
        return f"{host.name}: the folder {launch.folder} is not there", hint
    if reply.code in (126, 127):
        return f"{host.name}: {python} is not there: {last}", named
    return f"{host.name}: it cannot take the recipe: {last}", "'tunesmith doctor --cluster' tells more"


def _differing(found: Sequence[tuple[str, dict[str, str]]]) -> list[UserError]:
    """An error for each host that has other versions than the first."""
    (head, wanted), *others = found
    faults = []
    for name, versions in others:
        differ = [
            f"{package} {versions.get(package, 'missing')}, not {wanted.get(package, 'missing')}"
            for package in sorted(wanted.keys() | versions.keys())
            if versions.get(package) != wanted.get(package)
        ]
        if differ:
            what = f"{name}: has other versions than {head}: {', '.join(differ)}"
            faults.append(UserError(what, hint="install the same on all hosts"))
    return faults


# -- while it runs -------------------------------------------------------------------------------------------


@dataclass
class OnHost:
    """torchrun on a host. told: the objects it printed; lines: the last that it said; own_words: of these, an
    error's, which are shown once, by this program."""

    name: str
    process: Process
    told: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    own_words: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for read in (self._read_values, self._read_lines):
            self.threads.append(threading.Thread(target=read, name=self.name, daemon=True))
            self.threads[-1].start()

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def failed(self, asked: bool) -> bool:
        """Whether it has ended otherwise than it was `asked` to."""
        return self.code not in (None, 0) and not (asked and self.code in STOPPED)

    def send(self, data: bytes) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            with suppress(OSError):
                self.process.stdin.write(data)

    def let_go(self) -> None:
        """Close its stdin: torchrun there ends, in a moment by force."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def value(self, key: str) -> Any:
        """Of the first object with this key that it printed."""
        return next((told[key] for told in self.told if key in told), None)

    def _read_values(self) -> None:
        for line in self.process.stdout or ():
            try:
                value = json.loads(line)
            except ValueError:
                self._show(line.decode(errors="replace").rstrip())
                continue
            self.told += [value] if isinstance(value, dict) else []

    def _read_lines(self) -> None:
        for line in self.process.stderr or ():
            self._show(line.decode(errors="replace").rstrip())

    def _show(self, line: str) -> None:
        self.lines = [*self.lines, line][-SHOWN_LINES:]
        if self.own_words or line.startswith("error: "):
            self.own_words.append(line)
        elif line:
            say(f"{self.name} | {line}")

    def fault(self) -> TunesmithError:
        """Why it ended."""
        error, ended = self.value("error"), self.value("ended") or {}
        if isinstance(error, dict):
            return as_error(error, self.name)
        lines = "; its last lines:\n" + "\n".join(self.lines) if self.lines else ""
        if "rank" in ended:
            what, hint = how_it_ended(int(ended["code"]), HINT)
            return RunFailed(
                f"{self.name}: rank {ended['rank']} (process {ended['pid']}) {what}; the others were "
                f"ended{lines}",
                hint,
            )
        if "what" in ended:
            return RunFailed(f"{self.name}: torchrun could not begin: {ended['what']}", HINT)
        if self.code == LOST:
            how = f"broke, or gave no answer for {ALIVE_S * 3} s"
            what = f"{self.name}: its connection {how}; the others were ended"
            return RunFailed(what, hint=f"is the machine up, and its network? {HINT}")
        return RunFailed(f"{self.name}: torchrun ended with code {self.code}{lines}", HINT)


@dataclass
class HostCrew:
    """torchrun on every host, alive as long as the `with` block."""

    commands: dict[str, list[str]]
    hosts: list[OnHost] = field(default_factory=list)
    asked: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> HostCrew:
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for name, args in self.commands.items():
                self.hosts.append(OnHost(name, start_piped(args)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.let_go()
        end = time.monotonic() + KILLED_AFTER_S + GRACE_S
        for host in self.hosts:
            while host.code is None and time.monotonic() < end:
                time.sleep(POLL_S)
            host.process.kill()  # of the ssh client; the other side ends by itself when it hears nothing
            host.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = self.asked or number
        for host in self.hosts:
            host.let_go() if again else host.send(END)

    def wait(self) -> dict[str, Any]:
        """Until all have ended: by themselves, or let go a moment after the first that failed."""
        first: OnHost | None = None
        next_beat = deadline = 0.0
        while any(host.code is None for host in self.hosts):
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                for host in self.hosts:
                    host.send(BEAT)
            failed = self._failed()
            if first is None and failed is not None:
                first, deadline = failed, time.monotonic() + GRACE_S
            if first is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return self._outcome(first or self._failed())

    def _outcome(self, first: OnHost | None) -> dict[str, Any]:
        for host in self.hosts if first is None else [first]:
            for thread in host.threads:
                thread.join(GRACE_S)
        if self.asked and (first is None or first.value("error") is None):
            stopped = next((host.value("error") for host in self.hosts if host.value("error")), None)
            told = stopped or {"what": "stopped before a step was done; nothing new was saved", "hint": None}
            raise Interrupted(self.asked, told["what"], told["hint"])
        if first is not None:
            raise first.fault()
        return next((told for host in self.hosts for told in host.told if "run" in told), {})

    def _failed(self) -> OnHost | None:
        return next((host for host in self.hosts if host.failed(self.asked is not None)), None)
