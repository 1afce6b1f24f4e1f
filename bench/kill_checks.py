"""What must hold after a kill, of the processes, the files and the run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kill_cases import DUTIES, begin, session_of
from bench.kill_phases import AFTER_STEP, Look, Running

# After a kill everything must be gone within a minute.
GONE_S = 60.0
LOST_WORKER_CODE = 4
# Files with times or paths in them: they must be there, whatever they say.
UNLIKE = (
    "events.jsonl", "report.md", "plan.json", "resolved.yaml", "lock.json", "state.json", "manifest.json",
    "README.md", "export.json",
)  # fmt: skip
TIMES = ("time", "seconds", "tokens_per_s", "step_s", "peak_gib")


@dataclass(frozen=True)
class Trace:
    """What is on the disk of a run whose processes have ended. newest: step of its newest whole checkpoint;
    export: its files, as `hashes` gives them, None if there is no such folder."""

    events: bytes
    newest: int | None
    temporary: frozenset[Path]
    export: dict[str, str] | None

    def told(self, begin: int = 0) -> list[dict[str, Any]]:
        """The whole events from a byte on."""
        found = []
        for text in self.events[begin:].splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:  # torn by a kill
                continue
        return found

    @property
    def step(self) -> int:
        steps = [event["step"] for event in self.told() if event["event"] in ("step", "resume")]
        return int(steps[-1]) if steps else 0


@dataclass(frozen=True)
class Run:
    """One run of a recipe in the folder of its case; it has a cache and a folder for temporary files of its
    own."""

    folder: Path
    name: str
    preference: bool = False

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def cache(self) -> Path:
        return self.folder / f"cache-{self.name}"

    @property
    def temporary(self) -> Path:
        return self.folder / f"tmp-{self.name}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @contextmanager
    def started(self, command: str, *, cold: bool = False) -> Iterator[tuple[Running, Look]]:
        """`tunesmith train` or `export` on the run; nothing of it is left at the end."""
        args = {
            "train": ["train", str(self.folder / "recipe.yaml"), "--set", f"name={self.name}"],
            "export": ["export", str(self.path), "--to", "merged"],
        }[command]
        self.temporary.mkdir(exist_ok=True)
        env = os.environ | {"TUNESMITH_CACHE": str(self.cache), "TMPDIR": str(self.temporary)}
        exports = command == "export"
        look = Look(self.path, self.cache, DUTIES, exports=exports, preference=self.preference)
        process = begin(args, self.log, env, cold=cold)
        try:
            yield process, look
        finally:
            for pid in session_of(process.pid):
                os.kill(pid, signal.SIGKILL)

    def trace(self) -> Trace:
        from tunesmith.core.run_folder import RunFolder

        run = RunFolder(self.path)
        events, last, export = run.events, run.latest_checkpoint(), run.merged
        return Trace(
            events=events.read_bytes() if events.exists() else b"",
            newest=None if last is None else int(last.name.removeprefix("step-")),
            temporary=frozenset(self.half_written()),
            export=hashes(export) if export.exists() else None,
        )

    def half_written(self) -> Iterator[Path]:
        yield from self.temporary.rglob("*")
        for place in (self.path.parent, self.cache):
            yield from (path for path in place.rglob(".*") if path.suffix != ".lock")

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])

    def remove(self) -> None:
        for path in (self.path, self.cache, self.temporary):
            shutil.rmtree(path, ignore_errors=True)


# -- what must hold ----------------------------------------------------------------------------------------


def code_of(process: Running, within_s: float) -> int:
    """The exit code of a process, which is killed if it does not end by then."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def still_there(leader: int) -> list[str]:
    """Wait until the processes of a session have ended; those that do not are killed, and a fault."""
    end = time.monotonic() + GONE_S
    while left := session_of(leader):
        if time.monotonic() > end:
            names = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120] for pid in left]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return [f"process {pid} was left: {name}" for pid, name in zip(left, names, strict=True)]
        time.sleep(0.01)
    return []


def wrong_end(run: Run, victim: str, code: int, log_at: int) -> list[str]:
    """How a killed command ended: its own error when one of its workers was killed."""
    if victim != "worker":
        return [] if code == -signal.SIGKILL else [f"{run.name}: code {code} after a kill\n{run.tail()}"]
    said = run.log.read_bytes()[log_at:].decode(errors="replace")
    if code == LOST_WORKER_CODE and "SIGKILL" in said:
        return []
    return [f"{run.name}: code {code} after a worker was killed, having said:\n{said[-2000:]}"]


def wrong_since(before: Trace, now: Trace, *, is_up: bool) -> list[str]:
    """What one more process did to a run that it must not do. is_up: it had started in full."""
    faults = []
    if not now.events.startswith(before.events):
        faults.append("events of an earlier process are gone")
    told = now.told(len(before.events))
    kinds = {event["event"] for event in told}
    resumes = [event["step"] for event in told if event["event"] == "resume"]
    if resumes not in ([], [before.newest or 0]):
        faults.append(f"it went on from steps {resumes}, the newest checkpoint was of step {before.newest}")
    if "speed" in kinds and before.newest is not None and not resumes:
        faults.append(f"it began anew, the newest checkpoint was of step {before.newest}")
    faults += [event["what"] for event in told if "damaged" in event.get("what", "")]
    if (now.newest or 0) < max(before.newest or 0, (now.step - 1) // DUTIES.saves * DUTIES.saves):
        faults.append(f"step {now.step} was done, and the newest checkpoint is of step {now.newest}")
    if is_up or kinds & {*AFTER_STEP, "end"}:
        faults += [f"left: {path}" for path in sorted(before.temporary & now.temporary)]
    return faults


def unlike(run: Run, wanted: dict[str, Any]) -> list[str]:
    """Where what a run came to is not what is wanted."""
    found = result_of(run)
    parted = {key: first(wanted[key], found[key]) for key in wanted if found[key] != wanted[key]}
    return [f"{run.name}: not as in the run left alone: {key}: {where}" for key, where in parted.items()]


def result_of(run: Run) -> dict[str, Any]:
    """All that the run came to, but for times."""
    from tunesmith.train.metrics import final_events

    told: dict[str, Any] = {
        kind: [
            {key: value for key, value in event.items() if key not in TIMES}
            for event in final_events(run.path / "events.jsonl", kind)
        ]
        for kind in ("step", "eval", "sample")
    }
    files = {"files": hashes(run.path), "cache": hashes(run.cache)}
    return told | files | {"temporary files": sorted(map(str, run.half_written()))}


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash unless it has times in it."""
    from tunesmith.core.paths import sha256_file

    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): "" if p.name in UNLIKE else sha256_file(p) for p in paths}


def first(wanted: Any, found: Any) -> str:
    """Where two results part."""
    if isinstance(wanted, dict):
        names = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
        return ", ".join(names[:5])
    parted = [pair for pair in zip(wanted, found, strict=False) if pair[0] != pair[1]]
    return f"{parted[0][1]} for {parted[0][0]}" if parted else f"{len(found)} for {len(wanted)}"
