"""Prove on a recipe that a killed run goes on exactly: a short run of it, once through and once killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tunesmith.core.errors import RunFailed, TunesmithError, UserError
from tunesmith.core.events import read_events
from tunesmith.core.paths import cache_dir
from tunesmith.core.proc import Process, start
from tunesmith.core.progress import say
from tunesmith.core.run_folder import STATE, RunFolder, read_manifest
from tunesmith.core.store import is_url
from tunesmith.recipe.load import load_recipe
from tunesmith.train.metrics import final_events, loss_curve

PREFIX = ".verify-"
POLL_S = 0.005
SHOWN_LINES = 8


@dataclass(frozen=True)
class Kill:
    """after_step: the last step that the killed process had logged; resumed_from: the step of the checkpoint
    from which the next one went on."""

    after_step: int
    resumed_from: int


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: training losses by step, the other events that must be the same again, and the
    hash of every file of the last checkpoint (but for the one that has times in it)."""

    losses: dict[int, float]
    others: list[dict[str, Any]]
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verified:
    steps: int
    kills: list[Kill]
    once: Outcome
    killed: Outcome

    @property
    def equal(self) -> bool:
        return self.once == self.killed

    @property
    def first_difference(self) -> str | None:
        """Where the two runs part, for people; None where they do not."""
        steps = sorted(self.once.losses.keys() | self.killed.losses.keys())
        for step in steps:
            if self.once.losses.get(step) != self.killed.losses.get(step):
                return f"the losses part at step {step}"
        if self.once.others != self.killed.others:
            return "held-out losses or answers are not the same"
        names = sorted(self.once.files.keys() | self.killed.files.keys())
        parted = (name for name in names if self.once.files.get(name) != self.killed.files.get(name))
        name = next(parted, None)
        return None if name is None else f"{name} of the last checkpoint is not the same"

    def as_dict(self) -> dict[str, Any]:
        curve = [
            {"step": step, "once": loss, "killed": self.killed.losses.get(step)}
            for step, loss in sorted(self.once.losses.items())
        ]
        return {
            "equal": self.equal,
            "first_difference": self.first_difference,
            "steps": self.steps,
            "kills": [asdict(kill) for kill in self.kills],
            "curve": curve,
            "files": self.once.files,
        }


def verify_resume(
    recipe_path: Path, overrides: list[str], *, steps: int, kills: int, seed: int | None = None
) -> Verified:
    """Train the recipe's first `steps` steps twice in a folder of its own: once through, once killed with
    SIGKILL `kills` times at random and resumed by the same command.

    seed: of the instants. Raises UserError for a bad recipe, and for a run that ended before it could be
    killed; RunFailed when a run fails by itself.
    """
    save_every = max(1, steps // 4)
    recipe = load_recipe(recipe_path, overrides)
    place = cache_dir() / "verify" if is_url(recipe.output_dir) else Path(recipe.output_dir)
    with _folder_in(place.expanduser().absolute()) as folder:
        short = [f"output_dir={folder}", f"train.max_steps={steps}", "train.log_every=1"]
        short += [f"train.save_every={save_every}"]
        once, killed = RunFolder(folder / "once"), RunFolder(folder / "killed")
        say(f"once through: {steps} steps")
        _finish(_train(recipe_path, [*overrides, *short, "name=once"], once), once)
        say(f"once killed: {kills} times")
        again: Callable[[], Process] = lambda: _train(  # noqa: E731
            recipe_path, [*overrides, *short, "name=killed"], killed
        )
        draw = random.Random(seed)
        # After the first save: to begin anew from step 0 would prove nothing.
        instants = [draw.uniform(save_every + 1, steps) for _ in range(kills)]
        fallen = kill_and_resume(again, killed, sorted(instants))
        if not fallen:
            raise UserError(f"the run of {steps} steps ended before it could be killed", hint="--steps 100")
        return Verified(steps=steps, kills=fallen, once=outcome(once), killed=outcome(killed))


def kill_and_resume(begin: Callable[[], Process], run: RunFolder, instants: list[float]) -> list[Kill]:
    """Kill what `begin` starts at each instant (in steps), as far as it gets there, then let it end."""
    after: list[int] = []
    for instant in instants:
        process = begin()
        try:
            reached = _wait_for(process, run, instant)
        finally:
            kill_all(process)
        if not reached:
            break
        after.append(_last_step(run))
        say(f"killed after step {after[-1]}")
    _finish(begin(), run)
    resumes = [int(event["step"]) for event in read_events(run.events, "resume")]
    return [Kill(step, resumed) for step, resumed in zip(after, resumes, strict=False)]


def _wait_for(process: Process, run: RunFolder, instant: float) -> bool:
    """Wait until so many steps (and that part of the next one) are done. False if the run ended before."""
    begun = len(list(read_events(run.events, "start")))
    while process.poll() is None:
        if len(list(read_events(run.events, "start"))) > begun and _last_step(run) >= int(instant):
            time.sleep(_step_s(run) * (instant % 1))
            return process.poll() is None
        time.sleep(POLL_S)
    if process.returncode:
        raise _failure(process, run)
    return False


def _last_step(run: RunFolder) -> int:
    return max((int(event["step"]) for event in read_events(run.events, "step")), default=0)


def _step_s(run: RunFolder) -> float:
    """Seconds of a step, with its share of evaluations and saves."""
    times = [float(event["time"]) for event in read_events(run.events, "step")]
    return median([after - before for before, after in pairwise(times)] or [0.0])


def kill_all(process: Process) -> None:
    """SIGKILL a process and all that it started, and wait until none is left."""
    if process.poll() is not None:
        return
    family = descendants(process.pid)
    process.kill()
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in family):
        time.sleep(POLL_S)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, last = [], [pid]
    while last:
        last = [child for child, parent in parents.items() if parent in last]
        found += last
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is only listed until its parent looks does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- runs --------------------------------------------------------------------------------------------------


def _train(recipe_path: Path, overrides: list[str], run: RunFolder) -> Process:
    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "tunesmith", "train", str(recipe_path), "--json", *settings]
    return start(command, log=_log(run))


def _log(run: RunFolder) -> Path:
    return run.path.with_suffix(".log")


def _finish(process: Process, run: RunFolder) -> None:
    try:
        if process.wait():
            raise _failure(process, run)
    finally:
        kill_all(process)


def _failure(process: Process, run: RunFolder) -> TunesmithError:
    """The error that a training ended with, as it told it itself."""
    lines = _log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        told = json.loads(lines[-1])["error"]
    except (ValueError, KeyError, IndexError, TypeError):
        tail = "\n".join(lines[-SHOWN_LINES:])
        return RunFailed(f"the training ended with code {process.returncode}:\n{tail}")
    kind = UserError if process.returncode == UserError.exit_code else RunFailed
    return kind(told["what"], told["hint"])


def outcome(run: RunFolder) -> Outcome:
    """What the finished run came to, without anything that has to do with time."""
    others = [
        {key: value for key, value in event.items() if key not in ("time", "seconds")}
        for kind in ("eval", "sample")
        for event in final_events(run.events, kind)
    ]
    last = run.latest_checkpoint()
    manifest = (read_manifest(last) if last else None) or {"files": {}}
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != STATE}
    return Outcome(loss_curve(run.events), others, files)


@contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    """A new folder on the disk of the user's own runs, removed at the end; those of killed calls go too."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{PREFIX}*"):
        if not is_alive(int(left.name.removeprefix(PREFIX).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{PREFIX}{os.getpid()}-") as name:
        yield Path(name)
