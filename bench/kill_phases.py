"""What a run is doing, by its files: its last event, and the folders that are half-written.

loading      imports, model, plan, the engine; for an export also what comes before its folder
tokenising   the cache's folder of the rows is being written
reference    a preference run computes what the untrained model finds of every answer
training     a step, or the trial of the longest micro-batch
evaluating, sampling, saving
ending       after the last save: the report, the event `end`, the process's end
exporting    the export's folder is being written and checked, or just has been
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PHASES = (
    "loading", "tokenising", "reference", "training", "evaluating", "sampling", "saving", "ending",
    "exporting",
)  # fmt: skip
# Events that tell where a run is, in their order after a step.
AFTER_STEP = ("step", "eval", "sample", "checkpoint")
BEFORE_STEPS = ("start", "data", "plan", "resume")
POLL_S = 0.003


class Running(Protocol):
    """A started process, as subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(frozen=True)
class Duties:
    """After how many steps a run evaluates, samples and saves, and how many it has."""

    evals: int
    samples: int
    saves: int
    steps: int

    def after(self, event: str, step: int) -> str:
        """The phase that follows an event of a step. At the first and the last step everything is due."""
        due = (("evaluating", self.evals), ("sampling", self.samples), ("saving", self.saves))
        for phase, every in due[AFTER_STEP.index(event) :]:
            if step in (0, self.steps) or step % every == 0:
                return phase
        return "ending" if step == self.steps else "training"


class Look:
    """Watches one process that trains or exports `run`, from its start on."""

    def __init__(self, run: Path, cache: Path, duties: Duties, *, exports: bool, preference: bool) -> None:
        self.run, self.cache, self.duties = run, cache, duties
        self.exports, self.preference = exports, preference
        self.events = run / "events.jsonl"
        self.offset = self.events.stat().st_size if self.events.exists() else 0
        self.last: dict[str, Any] | None = None
        # What an earlier process left is no sign of this one.
        self.old = {path for folder in self._folders() for path in _written(folder)}

    def phase(self) -> str:
        """Of this moment."""
        if self.exports:
            return "exporting" if self._new_in(self.run / "export") else "loading"
        self._read()
        if self.last is None:
            return "tokenising" if self._new_in(self.cache / "data") else "loading"
        if self._new_in(self.run / "checkpoints"):
            return "saving"
        kind = self.last["event"]
        if kind in AFTER_STEP:
            return self.duties.after(kind, int(self.last["step"]))
        if kind == "speed":
            missing = self.preference and not (self.run / "reference").exists()
            return "reference" if missing else "training"
        return "loading" if kind in BEFORE_STEPS else "ending"

    def _read(self) -> None:
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if event["event"] in (*BEFORE_STEPS, "speed", *AFTER_STEP, "end"):
                self.last = event

    def _new_in(self, folder: Path) -> bool:
        return any(path not in self.old for path in _written(folder))

    def _folders(self) -> tuple[Path, ...]:
        return self.run / "export", self.run / "checkpoints", self.cache / "data"


def _written(folder: Path) -> list[Path]:
    """What is half-written in a folder, and whole exports."""
    return [*folder.glob(".*.partial-*"), *folder.glob("merged")]


def stays(process: Running, look: Look) -> dict[str, list[float]]:
    """Seconds of every stay of a process in every phase, until it ends."""
    found: dict[str, list[float]] = {}
    now, since = look.phase(), time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_S)
        if (next_one := look.phase()) != now:
            moment = time.monotonic()
            found.setdefault(now, []).append(moment - since)
            now, since = next_one, moment
    found.setdefault(now, []).append(time.monotonic() - since)
    return found


def arrive(process: Running, look: Look, phase: str, nth: int) -> bool:
    """Wait until a process enters a phase for the nth time. False if it ended before."""
    before = None
    while process.poll() is None:
        now = look.phase()
        if now == phase and now != before:
            nth -= 1
            if nth <= 0:
                return True
        before = now
        time.sleep(POLL_S)
    return False
