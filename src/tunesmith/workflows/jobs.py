"""Trainings as jobs of a Ray cluster: submitted, looked at and stopped from a machine that may be closed."""

from __future__ import annotations

import difflib
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGINT
from typing import Any

from tunesmith.cluster.jobs import GRACE_S, Job, Jobs
from tunesmith.cluster.launch import COMMAND
from tunesmith.cluster.ray_train import workers_of
from tunesmith.core.errors import Interrupted, RecipeErrors, TunesmithError, UserError
from tunesmith.core.progress import say
from tunesmith.core.store import is_url, join
from tunesmith.hub.builtin import BUILTIN
from tunesmith.hub.datasets import is_hub_dataset
from tunesmith.hub.sources import is_hub_model
from tunesmith.recipe.load import dump_yaml, load_recipe, override
from tunesmith.recipe.resolve import without_secrets
from tunesmith.recipe.schema import Recipe

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
RECIPE, RUN = "tunesmith_recipe", "tunesmith_run"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
POLL_S = 0.5
NOT_FOUND = 127  # exit code of a shell that finds no such program


@dataclass(frozen=True)
class Submission:
    """What goes to the cluster: a recipe's file, and the command that trains it there.

    again: what a person types to go on with the run.
    """

    id: str
    file: str
    text: str
    command: str
    run: str
    again: str


def cluster_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL of the cluster's dashboard: `given`, else of the environment, else of this machine."""
    named = [(name, environment.get(name, "")) for name in ADDRESSES]
    found = next(((name, url) for name, url in named if re.match("https?://", url)), ("", DEFAULT_ADDRESS))
    name, address = ("--cluster", given) if given is not None else found
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", address):
        raise UserError(
            f"{name}: '{address}' is not the address of a cluster's dashboard", hint="http://HEAD:8265"
        )
    return address.rstrip("/")


# -- submit ------------------------------------------------------------------------------------------------


def submit(submission: Submission, address: str) -> Job:
    """Send it. Raises UserError when no cluster is there."""
    jobs = Jobs(address)
    with tempfile.TemporaryDirectory(prefix="tunesmith-job-") as name:
        folder = Path(name)
        (folder / submission.file).write_text(submission.text, encoding="utf-8")
        labels = {RECIPE: submission.file, RUN: submission.run}
        again = f"{submission.again} --cluster {shlex.quote(address)}"
        jobs.submit(submission.id, submission.command, folder, labels, {COMMAND: again})
    return jobs.get(submission.id)


def prepare(
    recipe_path: Path,
    overrides: list[str],
    *,
    workers: str | None = None,
    fresh: bool = False,
    name: str | None = None,
) -> Submission:
    """The submission of a recipe: its paths in full, so that they mean the same on the cluster.

    Raises RecipeErrors with every fault of the recipe, UserError for a wrong name or number of workers.
    """
    recipe = load_recipe(recipe_path, overrides)
    if workers is not None:
        workers_of(workers)
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"--name: '{name}' is not a name", hint="letters, digits, '.', '_' and '-', a letter first"
        )
    text = recipe_path.read_text(encoding="utf-8")
    if recipe.serve.api_key is not None:  # whoever may look at the cluster's jobs would read it
        text, overrides = dump_yaml(without_secrets(recipe)), []
    full = full_paths(recipe, str(recipe_path))
    sets = [given for given in overrides if given.partition("=")[0].strip() not in full]
    sets += [override(key, path) for key, path in full.items()]
    command = ["tunesmith", "train", recipe_path.name, "--cluster", "auto"]
    command += ["--workers", workers] if workers else []
    command += ["--fresh"] if fresh else []
    command += [part for override in sets for part in ("--set", override)]
    again = ["tunesmith", "jobs", "submit", str(recipe_path.absolute())]
    again += ["--workers", workers] if workers else []
    again += [part for given in overrides for part in ("--set", given)]
    title = recipe.name or recipe_path.stem
    return Submission(
        id=job_id(name or title),
        file=recipe_path.name,
        text=text,
        command=shlex.join(command),
        run=join(output_of(recipe), title),
        again=shlex.join(again),
    )


def job_id(name: str) -> str:
    """A new id that begins with `name`, of characters that any URL and file name may have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "job"
    return f"{plain}-{secrets.token_hex(3)}"


def output_of(recipe: Recipe) -> str:
    given = recipe.output_dir
    return given if is_url(given) else str(Path(given).expanduser().absolute())


def full_paths(recipe: Recipe, file: str) -> dict[str, str]:
    """Key and full path of every local path of the recipe that is not written in full.

    Raises RecipeErrors with those that lead to nothing.
    """
    named = [("model.path", recipe.model.path, _is_model)]
    for key in ("sources", "eval_sources"):
        sources = getattr(recipe.data, key)
        named += [
            (f"data.{key}.{number}.path", source.path, is_hub_dataset)
            for number, source in enumerate(sources)
        ]
    if recipe.model.chat_template is not None:
        named.append(("model.chat_template", recipe.model.chat_template, _is_none))
    found, faults = {"output_dir": output_of(recipe)}, []
    for key, path, on_hub in named:
        full = _in_full(path, on_hub)
        if full is None:
            faults.append(_nowhere(file, key, path))
        else:
            found[key] = full
    if faults:
        raise RecipeErrors(faults)
    before = {key: path for key, path, _ in named} | {"output_dir": recipe.output_dir}
    return {key: full for key, full in found.items() if full != before[key]}


def _in_full(path: str, on_hub: Callable[[str], bool]) -> str | None:
    """A path of this machine in full; a URL, a hub id, and what only the cluster may have, as it is."""
    local = Path(path).expanduser()
    if not is_url(path) and local.exists():
        return str(local.absolute())
    return path if is_url(path) or path.startswith(("/", "~")) or on_hub(path) else None


def _nowhere(file: str, key: str, path: str) -> TunesmithError:
    return UserError(
        f"{file}: {key}: '{path}' does not exist (looked in {Path.cwd()})",
        hint="what only the cluster has is named in full: /FOLDER/NAME, or a URL",
    )


def _is_model(path: str) -> bool:
    return path.lower() == BUILTIN or is_hub_model(path)


def _is_none(path: str) -> bool:
    return False


# -- look and stop -----------------------------------------------------------------------------------------


def list_jobs(address: str) -> list[Job]:
    """The trainings that were submitted to the cluster, the newest first."""
    return [job for job in Jobs(address).all() if RECIPE in job.metadata]


def find(known: Sequence[Job], wanted: str) -> Job:
    """The job of an id, or of the beginning of only one. Raises UserError with the nearest ids."""
    ids = [job.id for job in known]
    found = [job for job in known if job.id == wanted] or [
        job for job in known if wanted and job.id.startswith(wanted)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"'{wanted}' is the beginning of {len(found)} jobs", hint=_some([job.id for job in found])
        )
    if not ids:
        raise UserError(
            f"there is no job '{wanted}': none was submitted", hint="tunesmith jobs submit RECIPE"
        )
    near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.4)
    hint = f"did you mean {_some(near)}?" if near else f"there are {_some(ids)}"
    raise UserError(f"there is no job '{wanted}'", hint=hint)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def log_of(wanted: str, address: str) -> tuple[Job, str]:
    """(job, all that it has printed so far)"""
    jobs = Jobs(address)
    job = _find(jobs, wanted)
    return job, jobs.log(job.id)


def follow(wanted: str, address: str, show: Callable[[str], None]) -> Job:
    """Give `show` what the job prints until it has ended; returns it then, whatever became of it.

    Raises Interrupted by Ctrl-C, which leaves the job alone.
    """
    jobs = Jobs(address)
    job = _find(jobs, wanted)
    try:
        return jobs.follow(job.id, show)
    except KeyboardInterrupt:
        again = f"{_command('logs', job.id, address)} --follow"
        raise Interrupted(SIGINT, f"{job.id} goes on in the cluster", hint=f"look again: {again}") from None


def check_succeeded(job: Job, address: str) -> None:
    """Raise TunesmithError when a job that has ended did not succeed."""
    again = "the same submit goes on from the last checkpoint"
    if job.state == "stopped":
        raise TunesmithError(f"{job.id} was stopped", hint=again)
    if job.state != "failed":
        return
    if job.exit_code == NOT_FOUND:
        raise TunesmithError(
            f"{job.id} failed: the shell of the cluster's head finds no 'tunesmith'",
            hint="install tunesmith[cluster] on every machine of the cluster, and call 'ray start' with its "
            "environment active",
        )
    why = f"exit code {job.exit_code}" if job.exit_code is not None else _first_line(job.message)
    raise TunesmithError(
        f"{job.id} failed: {why}", hint=f"its log tells: {_command('logs', job.id, address)}; {again}"
    )


def stop(wanted: str, address: str) -> tuple[Job, bool]:
    """(the job when it has ended, whether it ran before). Raises TunesmithError when it will not end."""
    jobs = Jobs(address)
    before = _find(jobs, wanted)
    job, deadline = before, time.monotonic() + 2 * GRACE_S
    if not before.ended:
        say(f"{before.id}: asked to stop; killed after {GRACE_S} s")
    while not job.ended:
        if time.monotonic() > deadline:
            raise TunesmithError(
                f"{job.id} has not ended in {2 * GRACE_S} s", hint="'ray status' on the head tells how it is"
            )
        jobs.stop(job.id)  # again and again: a job that is still pending may not hear it
        time.sleep(POLL_S)
        job = jobs.get(job.id)
    return job, not before.ended


def _find(jobs: Jobs, wanted: str) -> Job:
    return find([job for job in jobs.all() if RECIPE in job.metadata], wanted)


def _command(verb: str, name: str, address: str) -> str:
    return shlex.join(["tunesmith", "jobs", verb, name, "--cluster", address])


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "Ray tells no reason"


# -- show --------------------------------------------------------------------------------------------------


def as_dict(job: Job) -> dict[str, Any]:
    """The job as `--json` prints it. Times are UTC, by the cluster's clock."""
    return {
        "id": job.id,
        "state": job.state,
        "recipe": job.metadata.get(RECIPE),
        "run": job.metadata.get(RUN),
        "started": _when(job.started_s),
        "ended": _when(job.ended_s),
        "duration_s": round(duration_s(job), 1),
        "exit_code": job.exit_code,
        "command": job.command,
    }


def duration_s(job: Job) -> float:
    """Seconds since it was submitted, up to its end or now; never negative, whatever the clocks say."""
    return max(0.0, (time.time() if job.ended_s is None else job.ended_s) - job.started_s)


def _when(epoch_s: float | None) -> str | None:
    return None if epoch_s is None else datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds")
