"""Look at a host: run the probes, here or over ssh, and bring back facts: nothing is changed, no root needed.

Probes are constant texts for `sh -c`. A name that an earlier probe brought (an image, a container, a folder)
is handed over as `$1`, never pasted into the text. `timeout` ends each probe with all that it started; one
that cannot be ended (a process stuck in the kernel) is left behind.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.host import checks_host as commands
from tunesmith.host.apply import Session
from tunesmith.host.facts import TIMED_OUT, UNKNOWN, Answer, Facts
from tunesmith.host.inventory import Target

PROBE_S = 3.0
# All probes of one wave together; two waves stay under ten seconds. Over ssh they take turns: sshd opens no
# more than ten channels on one connection (MaxSessions).
WAVE_S = 4.5
REMOTE_WAVE_S = 20.0
REMOTE_AT_ONCE = 6
MOST_SUBJECTS = 8
MOST_CHARS = 60_000

# Looked for, not imported: hf_xet writes a log into the user's home when it is loaded.
XET_IMPORT = "python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec(\"hf_xet\") is None)'"
XET_REACHED = "curl -sS -o /dev/null --max-time 2.5 https://cas-server.xethub.hf.co"

PROBES = (
    commands.SMI,
    commands.SMI_PLAIN,
    commands.NOUVEAU,
    commands.NVIDIA_MODULE,
    commands.SECURE_BOOT,
    commands.PCI,
    commands.DOCKER_CLIENT,
    commands.DOCKER_VERSION,
    commands.DOCKER_ROOT,
    commands.DOCKER_CGROUP,
    commands.DOCKER_NETWORK,
    commands.DOCKER_STARTED,
    commands.DOCKER_ENVIRONMENT,
    commands.HOOKS,
    "stat -L -c '%Z %n' $(command -v nvidia-container-runtime-hook nvidia-cdi-hook)",
    commands.CDI_LIST,
    commands.SNAP,
    commands.GETENFORCE,
    commands.CONTAINERS,
    "docker ps --format '{{.Image}}'",
    "docker image ls --format '{{.Repository}}:{{.Tag}}'",
    XET_IMPORT,
    # Reads the sources as `apt-get update` does, and says what is wrong with them; needs no root.
    "apt-cache policy > /dev/null",
    "grep -l nvidia.github.io /etc/apt/sources.list.d/* | grep -vE '/nvidia-container-toolkit.list$'",
    "grep -lE '^mirrorlist=.*mirrorlist.centos.org' /etc/yum.repos.d/*.repo",
    "ip route",
    "ps -eo args | grep -E '[j]upyter' | grep -v 'sh -c cat'",
    "lscpu",
    # Without --all it would obey OMP_NUM_THREADS.
    "nproc --all",
    "uname -m",
    "id -u",
)
PER_IMAGE = (commands.IMAGE_ENV, commands.IMAGE_LABELS, commands.IMAGE_DIGESTS, commands.IMAGE_SIZE)
PER_CONTAINER = (commands.CONTAINER_SHM, commands.CONTAINER_GPUS, commands.CONTAINER_START)
LOGS = "docker logs --tail 400 "
SYMPTOMS = (
    r"bus error|shared memory|undefined symbol|can't start new thread|pthread_create failed|Error 804|"
    r"forward compatibility|Failed to initialize NVML|unsatisfied condition|permission denied"
)
FILES = (
    "/etc/os-release",
    commands.DRIVER_FILE,
    "/proc/meminfo",
    "/etc/docker/daemon.json",
    "~/.jupyter/jupyter_server_config.py",
    "~/.jupyter/jupyter_server_config.json",
    "~/.jupyter/jupyter_lab_config.py",
    "~/.jupyter/jupyter_notebook_config.py",
    "~/.jupyter/jupyter_notebook_config.json",
)
ENVIRONMENT = (
    "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HOME", "HF_HUB_OFFLINE", "TUNESMITH_CACHE", "DOCKER_HOST",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "no_proxy",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "PIP_INDEX_URL", "USER", "SUDO_USER",
)  # fmt: skip

Run = Callable[[Sequence[str]], Answer]


@dataclass(frozen=True)
class Probe:
    """`key`: the command as facts name it; `text`: the same for `sh -c`, with `$1` for `argument`."""

    key: str
    text: str
    argument: str = ""

    @property
    def args(self) -> list[str]:
        # In the language and time zone that the checks read, and with the programs of administrators.
        text = f'PATH="$PATH:/usr/sbin:/sbin"; {self.text}'
        # KILL and not TERM: timeout does not wait for what the program started and left behind.
        limit = ["env", "LC_ALL=C", "TZ=UTC", "timeout", "-s", "KILL", f"{PROBE_S:g}"]
        return [*limit, "sh", "-c", text, "sh", *([self.argument] if self.argument else [])]


def constant(command: str) -> Probe:
    return Probe(command, command)


def about(command: str, name: str) -> Probe:
    """The probe of one image, container or folder; `command` ends with a space where its name stands."""
    return Probe(f"{command}{shlex.quote(name)}", f'{command}"$1"', name)


def gather(
    run: Run | None = None, *, also: Iterable[str] = (), files: Iterable[str] = (), at_once: int = 0
) -> Facts:
    """The facts of this host, or of the one that `run` reaches; secrets in them are masked.

    `also`, `files`: further commands (constants, no user input) and paths to look at. `at_once`: how many
    probes `run` bears at a time, 0 for all. On this host it takes less than ten seconds.
    """
    ask = run or here
    wave_s = REMOTE_WAVE_S if at_once else WAVE_S
    env = _environment(ask, local=run is None)
    first = [constant(command) for command in dict.fromkeys((*PROBES, *also))]
    if env.get("HF_ENDPOINT"):
        first.append(constant(XET_REACHED))
    reads = [_read(path) for path in dict.fromkeys((*FILES, *files))]
    answers = _ask_all(ask, [*first, *reads], at_once, wave_s)
    texts = {probe.key: answers.pop(probe.key) for probe in reads}
    later = _ask_all(ask, _second_wave(answers, env), at_once, wave_s)
    found = answers | {key: _only_symptoms(key, answer) for key, answer in later.items()}
    return masked(
        Facts(
            commands={key: answer for key, answer in found.items() if answer.rc != UNKNOWN},
            files={path: answer.stdout for path, answer in texts.items() if answer.ok},
            env=env,
        )
    )


def gather_remote(target: Target, *, also: Iterable[str] = (), files: Iterable[str] = ()) -> Facts:
    """The facts of another host, over ssh. Raises TunesmithError when it cannot be reached."""
    with Session([target]) as session:
        if target.name in session.unreachable:
            raise TunesmithError(
                f"{target.name}: {session.unreachable[target.name]}",
                hint=f"does 'ssh {target.name}' work without a password?",
            )
        return gather(
            lambda args: session.answer(target, shlex.join(args), timeout_s=int(PROBE_S) + 2),
            also=also,
            files=files,
            at_once=REMOTE_AT_ONCE,
        )


def here(args: Sequence[str]) -> Answer:
    """Run one probe on this machine."""
    # The interpreter that runs tunesmith is the one whose packages count.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        # A last resort: it would kill `timeout` alone, so it comes well after timeout's own limit.
        done = proc.run(args, env=os.environ | {"PATH": path}, check=False, timeout_s=3 * PROBE_S)
    except TunesmithError as error:
        return Answer(TIMED_OUT, "", str(error))
    return Answer(done.returncode, done.stdout, done.stderr)


def _read(path: str) -> Probe:
    """The probe that reads a file; `~/` is the home of the user who is asked."""
    if path.startswith("~/"):
        return Probe(path, 'cat -- "$HOME/$1"', path.removeprefix("~/"))
    return Probe(path, 'cat -- "$1"', path)


def _ask_all(ask: Run, probes: Sequence[Probe], at_once: int, wave_s: float) -> dict[str, Answer]:
    """All probes in threads. One that is not back in time counts as timed out, and is not waited for."""
    answers: dict[str, Answer] = {}
    gate = threading.Semaphore(at_once or len(probes))

    def one(probe: Probe) -> None:
        with gate:
            answer = ask(probe.args)
        # timeout ends itself, too, with the signal that it sends.
        rc = TIMED_OUT if answer.rc in (-9, 137) else answer.rc
        answers[probe.key] = Answer(rc, answer.stdout[:MOST_CHARS], answer.stderr[:MOST_CHARS])

    threads = [threading.Thread(target=one, args=(probe,), daemon=True) for probe in probes]
    for thread in threads:
        thread.start()
    end = time.monotonic() + wave_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = Answer(TIMED_OUT, "", f"no answer within {PROBE_S:g} s")
    return {probe.key: answers.get(probe.key, late) for probe in probes}


def _second_wave(answers: dict[str, Answer], env: dict[str, str]) -> list[Probe]:
    """The probes of what the first ones found: docker's disk, its containers, their images, this folder."""
    found = [about("df -PB1 ", _docker_root(answers))]
    work = env.get("PWD", "")
    if work and work not in ("/", "/root", "/home", "/tmp"):
        # Only in a folder of this user's: elsewhere it is no wonder that root owns files.
        find = 'test -O "$1" && find "$1" -maxdepth 2 -uid 0 -print -quit'
        key = f"find {shlex.quote(work)} -maxdepth 2 -uid 0 -print -quit"
        found.append(Probe(key, find, work))
    if not answers[commands.DOCKER_VERSION].ok:
        return found
    running = _names(answers[commands.CONTAINERS])
    images = [*_names(answers["docker ps --format '{{.Image}}'"])]
    images += _names(answers["docker image ls --format '{{.Repository}}:{{.Tag}}'"])
    images = [image for image in dict.fromkeys(images) if "<none>" not in image][:MOST_SUBJECTS]
    for container in running[:MOST_SUBJECTS]:
        found += [about(command, container) for command in PER_CONTAINER]
        found.append(Probe(f"{LOGS}{container}", f'{LOGS}"$1" 2>&1', container))
    for image in images:
        found += [about(command, image) for command in PER_IMAGE]
        # Its first line tells what the newest layer was made by.
        found.append(
            Probe(f"{commands.IMAGE_HISTORY}{image}", f'{commands.IMAGE_HISTORY}"$1" | head -n 1', image)
        )
    return found


def _names(answer: Answer) -> list[str]:
    return answer.stdout.split() if answer.ok else []


def _docker_root(answers: dict[str, Answer]) -> str:
    said = answers[commands.DOCKER_ROOT]
    root = said.stdout.strip() if said.ok else ""
    return root if root.startswith("/") else "/var/lib"


def _only_symptoms(key: str, answer: Answer) -> Answer:
    """Of a container's log only the lines that a check reads: the rest may be anybody's words."""
    if not key.startswith(LOGS):
        return answer
    lines = [line for line in answer.stdout.splitlines() if re.search(SYMPTOMS, line, re.IGNORECASE)]
    return Answer(answer.rc, "".join(f"{line}\n" for line in lines[-20:]), "")


def _environment(ask: Run, local: bool) -> dict[str, str]:
    if local:
        given = dict(os.environ) | {"PWD": str(Path.cwd())}
    else:
        lines = ask(["timeout", "-s", "KILL", f"{PROBE_S:g}", "sh", "-lc", "env"]).stdout.splitlines()
        given = dict(line.split("=", 1) for line in lines if "=" in line)
    return {name: given[name] for name in (*ENVIRONMENT, "PWD") if given.get(name)}


# What a secret looks like: a password in a URL, a variable or option named so, well-known tokens.
NAMED = r"(?:\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?|PRIVATE_?KEY)(?:_\w*)?)"
SECRETS = (
    (re.compile(r"(\w://)[^/\s@\"']+@"), r"\1***@"),
    (re.compile(r"(?im)(^|proxy[\"']?\s*[=:]\s*[\"']?)[^\s\"'/@:]+:[^\s\"'/@]+@(?=[\w.-]+:\d)"), r"\1***@"),
    (
        re.compile(rf"(?i)(\b(?:[\w.-]+\.)?{NAMED}[\"']?\s*[=:]\s*[\"']?)(?![\"'\s]|\*\*\*)[^\s\"',\]}}]+"),
        r"\1***",
    ),
    (re.compile(rf"(?i)(--(?:[\w.-]+\.)?{NAMED}\s+)(?!-)[^\s\"']+"), r"\1***"),
    (re.compile(r"(?i)([?&](?:token|key|api_key)=)[^\s&\"']+"), r"\1***"),
    (re.compile(r"(?i)(\bBearer\s+)[\w.~+/-]+=*"), r"\1***"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|nvapi-|glpat-|AKIA)[\w-]{8,}"), "***"),
)


def mask(text: str) -> str:
    """The text with `***` in place of everything that looks like a secret."""
    for pattern, into in SECRETS:
        text = pattern.sub(into, text)
    return text


def masked(facts: Facts) -> Facts:
    """The same facts without secrets; the checks judge both alike."""
    return Facts(
        commands={
            mask(key): Answer(a.rc, mask(a.stdout), mask(a.stderr)) for key, a in facts.commands.items()
        },
        files={path: mask(text) for path, text in facts.files.items()},
        env={name: mask(value) for name, value in facts.env.items()},
    )
