"""Kill trainings at random instants, and compare what they come to with what was never killed.

    python -m bench.kills [--kills 200] [--seed 0] [--cases full,lora,ddp-lora] [--model FOLDER] [--json]

Every case trains and exports one recipe once through. Then runs of it are killed with SIGKILL, again and
again on their way: half of the kills at any instant from the first moment of the process on, half aimed at
the phase (`bench.kill_phases`) that fewest kills fell into, at any instant of it. In a case of several
processes all of them are killed, or the one that started them, or one of its workers. The phase counted is
the one that the files show at the moment of death.

After every kill no process may be left within a minute, and a run that lost a worker must have said so. The
next process must go on from the newest checkpoint there was, with every event still there, and once it
has started, nothing half-written of the last one. A run that has got to its end must have the same losses,
held-out losses, answers, learning rates, gradient norms, checkpoints (weights and optimizer state),
tokenised rows and export as the one that was left alone, bit for bit, and no other file. Ends with code 1,
and keeps the files, if anything was not so.

Most processes are forked from this one, which has loaded the libraries, workers too: the command without its
first seconds. One in ten is a program of its own. Every run has a cache of its own, so that it tokenises.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from bench.kill_cases import CASES, DUTIES, session_of, tiny_model, write_recipe
from bench.kill_checks import (
    GONE_S,
    Run,
    Trace,
    code_of,
    first,
    result_of,
    still_there,
    unlike,
    wrong_end,
    wrong_since,
)
from bench.kill_phases import PHASES, Look, Running, arrive, stays

COMMANDS = ("train", "export")
COLD, AIMED = 1 / 10, 1 / 2
HUNG_S = 600.0
# How many processes of a command are killed; an export has no checkpoints, and is begun anew each time.
STRUCK = {"train": 0.95, "export": 0.5}
# Phases that come often in a run: the kill falls into the first of them, or a later one.
ONCE = ("tokenising", "reference")
OFTEN = {"training": 4, "evaluating": 2, "saving": 3}


@dataclass(frozen=True)
class Kill:
    """phase: by the files at the moment of death; victim: all, first (the one that was started) or worker;
    step: the last that was done."""

    phase: str
    victim: str
    aimed_at: str | None
    cold: bool
    step: int


@dataclass
class Case:
    """One recipe, and what became of its kills. kills_due: how many are wanted; until: no kill after this
    moment; usual_s: seconds in each phase when nothing is killed; whole_s: of each command; export: its
    files."""

    name: str
    folder: Path
    draw: random.Random
    kills_due: int = 0
    until: float = inf
    usual_s: dict[str, float] = field(default_factory=dict)
    whole_s: dict[str, float] = field(default_factory=dict)
    export: dict[str, str] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    finished: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def preference(self) -> bool:
        return "objective" in CASES[self.name]

    @property
    def several(self) -> bool:
        return "parallel" in CASES[self.name]

    def run(self, name: str) -> Run:
        return Run(self.folder, name, preference=self.preference)

    def is_due(self) -> bool:
        return len(self.kills) < self.kills_due and time.monotonic() < self.until

    def fell_into(self) -> Counter[str]:
        return Counter(kill.phase for kill in self.kills)


def main() -> int:
    args = arguments()
    with redirect_stdout(sys.stderr):  # a library's warnings, which are no part of what --json prints
        import torch

        import tunesmith.workflows.export
        import tunesmith.workflows.train  # noqa: F401  # loaded once, for all forks
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    model = args.model or tiny_model(folder / "model")
    share, more = divmod(args.kills, len(args.cases))
    done = []
    for number, name in enumerate(args.cases):
        write_recipe(name, folder / name, model)
        case = Case(name, folder / name, random.Random(f"{args.seed} {name}"), share + (number < more))
        done.append(case)
        case.until = time.monotonic() + args.minutes * 60
        torment(case)
        print(row_of(case), file=sys.stderr, flush=True)
    faulty = any(case.faults for case in done)
    print(json.dumps(as_dict(done)) if args.json else table(done))
    if faulty:
        print(f"the files are kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return int(faulty)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--model", type=Path, help="folder; default: a random model of two layers")
    parser.add_argument("--minutes", type=float, default=inf, help="no kill of a case after so many")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    args.cases = args.cases.split(",") if args.cases else list(CASES)
    if unknown := set(args.cases) - CASES.keys():
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}")
    return args


# -- one case ----------------------------------------------------------------------------------------------


def torment(case: Case) -> None:
    """Kill runs of the case until all kills are used, and compare each with the one that was left alone."""
    began = time.perf_counter()
    wanted = through(case)
    told = wanted["train"]
    if len(told["step"]) != DUTIES.steps or not told["eval"] or not told["sample"]:
        case.faults.append(f"once through: {len(told['step'])} steps of {DUTIES.steps} were told")
    while case.is_due() and not case.faults:
        run = case.run(f"killed-{case.finished}")
        for command in COMMANDS:
            if outlive(case, run, command):
                case.faults += unlike(run, wanted[command])
        if not case.faults:
            case.finished += 1
            run.remove()
    case.seconds = time.perf_counter() - began


def through(case: Case) -> dict[str, dict[str, Any]]:
    """Train and export a run without a kill: what it came to after each command."""
    run, wanted = case.run("once"), {}
    for command in COMMANDS:
        began = time.monotonic()
        with run.started(command) as (process, look):
            for phase, seconds in stays(process, look).items():
                case.usual_s.setdefault(phase, median(seconds))
        case.whole_s[command] = time.monotonic() - began
        if code := process.wait():
            case.faults.append(f"{command}, once through: code {code}\n{run.tail()}")
        wanted[command] = result_of(run)
    case.export = run.trace().export or {}
    return wanted


def outlive(case: Case, run: Run, command: str) -> bool:
    """Give a command until it gets to its end, killed now and then on its way. False after a fault."""
    before = run.trace()
    while not case.faults:
        kill, before = attempt(case, run, command, before)
        if kill is None:
            return not case.faults
        case.kills.append(kill)
    return False


def attempt(case: Case, run: Run, command: str, before: Trace) -> tuple[Kill | None, Trace]:
    """One process, perhaps killed, and what is there after it. Without a kill it got to its end."""
    cold, log_at = case.draw.random() < COLD, run.log_size()
    aim = aim_of(case, run, command) if case.draw.random() < AIMED else None
    is_struck = case.is_due() and case.draw.random() < STRUCK[command]
    with run.started(command, cold=cold) as (process, look):
        killed = None
        if is_struck and moment(case, process, look, aim, before):
            killed = strike(case, process, look)
        code = code_of(process, HUNG_S if killed is None else GONE_S)
        case.faults += still_there(process.pid)
    now, ended = run.trace(), killed is None or code == 0
    case.faults += wrong_since(before, now, is_up=ended or look.phase() == "exporting")
    if now.export not in (None, case.export):
        case.faults.append(f"{run.name}: a half-written export: {first(case.export, now.export)}")
    if killed is None or code == 0:
        case.faults += [f"{run.name}: {command} ended with code {code}\n{run.tail()}"] if code else []
        return None, now
    case.faults += wrong_end(run, killed[1], code, log_at)
    return Kill(killed[0], killed[1], aim, cold, now.step), now


def aim_of(case: Case, run: Run, command: str) -> str:
    """The phase that fewest kills of the case fell into, of those that the command still has before it."""
    if command == "export":
        return "exporting"
    possible = set(PHASES) - {"exporting"}
    if list(run.cache.glob("data/[!.]*")):
        possible.discard("tokenising")
    if not case.preference or (run.path / "reference").exists():
        possible.discard("reference")
    fell = case.fell_into()
    # Of those that are even first what comes once in a run.
    return min(sorted(possible), key=lambda phase: (fell[phase], phase not in ONCE, case.draw.random()))


def moment(case: Case, process: Running, look: Look, aim: str | None, before: Trace) -> bool:
    """Wait for the instant of a kill. False if the process ended before."""
    if aim is None:
        loading_s = case.usual_s["loading"]
        share = 1.0 if look.exports else 1 - before.step / DUTIES.steps
        whole_s = case.whole_s["export" if look.exports else "train"]
        after_s = case.draw.uniform(0, loading_s + share * (whole_s - loading_s))
    else:
        after_s = case.draw.uniform(0, case.usual_s.get(aim, 0.01))
        if not arrive(process, look, aim, case.draw.randint(1, OFTEN.get(aim, 1))):
            return False
    try:
        process.wait(max(after_s, 1e-4))
    except subprocess.TimeoutExpired:
        return True
    return False


def strike(case: Case, process: Running, look: Look) -> tuple[str, str]:
    """Kill a process, or one that it started: (phase, victim)."""
    workers = [pid for pid in session_of(process.pid) if pid != process.pid]
    victims = ["all", "first", "worker"] if case.several else ["all", "first"]
    victim = case.draw.choice(victims) if workers else "all"
    if victim == "worker":
        phase = look.phase()
        with suppress(ProcessLookupError):
            os.kill(case.draw.choice(workers), signal.SIGKILL)
        return phase, victim
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait(GONE_S)
    return look.phase(), victim


# -- the table ---------------------------------------------------------------------------------------------

HEAD = ("case", "kills", *PHASES, "runs", "exact", "minutes")


def row_of(case: Case) -> str:
    fell = case.fell_into()
    cells = [case.name, len(case.kills), *(fell[phase] for phase in PHASES)]
    return line([*cells, case.finished, "NO" if case.faults else "yes", f"{case.seconds / 60:.1f}"])


def line(cells: list[Any] | tuple[str, ...]) -> str:
    return "| " + " | ".join(f"{cell!s:>10}" for cell in cells) + " |"


def table(cases: list[Case]) -> str:
    found = as_dict(cases)
    total = ["all", found["kills"], *(found["phases"][phase] for phase in PHASES), found["runs"]]
    total += ["NO" if found["faults"] else "yes", f"{found['seconds'] / 60:.1f}"]
    lines = [line(HEAD), "|" + (" " + "-" * 10 + " |") * len(HEAD), *map(row_of, cases), line(total)]
    victims = ", ".join(f"{count} {name}" for name, count in sorted(found["victims"].items()))
    lines += ["", f"{found['kills']} kills ({victims}; {found['cold']} of programs of their own) in"]
    lines[-1] += f" {found['runs']} runs; {len(found['faults']) or 'no'} faults"
    return "\n".join([*lines, *found["faults"]])


def as_dict(cases: list[Case]) -> dict[str, Any]:
    kills = [kill for case in cases for kill in case.kills]
    fell = Counter(kill.phase for kill in kills)
    return {
        "kills": len(kills),
        "runs": sum(case.finished for case in cases),
        "phases": {phase: fell[phase] for phase in PHASES},
        "victims": dict(Counter(kill.victim for kill in kills)),
        "cold": sum(kill.cold for kill in kills),
        "seconds": sum(case.seconds for case in cases),
        "faults": [f"{case.name}: {fault}" for case in cases for fault in case.faults],
        "cases": {
            case.name: {
                "runs": case.finished,
                "seconds": case.seconds,
                "kills": list(map(asdict, case.kills)),
            }
            for case in cases
        },
    }


if __name__ == "__main__":
    sys.exit(main())
