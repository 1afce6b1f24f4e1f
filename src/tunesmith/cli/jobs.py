"""tunesmith jobs: trainings that run in a Ray cluster when this machine is closed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.cli.main import print_json
from tunesmith.core.progress import say
from tunesmith.core.units import duration_text

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train in a Ray cluster by jobs that outlive this terminal: submit, list, logs, stop.",
    epilog="Example: tunesmith jobs submit recipe.yaml --cluster http://10.0.0.5:8265",
)

ID = typer.Argument(metavar="ID", help="The job's id, or the beginning of it.")
CLUSTER = typer.Option(
    None,
    "--cluster",
    metavar="URL",
    help="The cluster's dashboard. Default: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS if it is a URL, "
    "else http://127.0.0.1:8265.",
)
JSON = typer.Option(False, "--json", help="Print one JSON object.")


@app.command(
    epilog="Example: tunesmith jobs submit recipe.yaml --cluster http://10.0.0.5:8265 --workers 2:8 --follow"
)
def submit(
    recipe: Path = typer.Argument(metavar="RECIPE", help="The recipe file, or an xtuner 0.1 config (.py)."),
    cluster: str | None = CLUSTER,
    workers: str | None = typer.Option(
        None, "--workers", metavar="N|N:M", help="Processes; N:M for as many as the cluster has room for."
    ),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Move an earlier run of this name aside and start anew."
    ),
    name: str | None = typer.Option(
        None, "--name", help="What the job's id begins with. Default: the run's name."
    ),
    follow: bool = typer.Option(
        False, "--follow", help="Show the log on stderr till the end. Ctrl-C leaves the job running."
    ),
    json: bool = JSON,
) -> None:
    """Send a recipe to the cluster, which trains it; print the job's id.

    The same submit goes on with a run that was stopped. Its paths have to mean the same on the cluster.
    """
    from tunesmith.workflows import jobs
    from tunesmith.workflows.import_xtuner import recipe_for

    address = jobs.cluster_address(cluster, os.environ)
    sent = jobs.prepare(recipe_for(recipe), set_ or [], workers=workers, fresh=fresh, name=name)
    job = jobs.submit(sent, address)
    if not json:
        typer.echo(job.id)
    if follow:
        job = jobs.follow(job.id, address, _on_stderr)
        jobs.check_succeeded(job, address)
    if json:
        print_json(jobs.as_dict(job))


@app.command("list", epilog="Example: tunesmith jobs list --json")
def list_(cluster: str | None = CLUSTER, json: bool = JSON) -> None:
    """Show the trainings that were submitted to the cluster, the newest first."""
    from tunesmith.workflows import jobs

    address = jobs.cluster_address(cluster, os.environ)
    found = [jobs.as_dict(job) for job in jobs.list_jobs(address)]
    if json:
        print_json({"cluster": address, "jobs": found})
        return
    if not found:
        say(f"{address} has no jobs of tunesmith")
        return
    table = Table("id", "state", "recipe", "started (UTC)", "duration", box=None)
    for job in found:
        table.add_row(*_row(job))
    Console(highlight=False, soft_wrap=True).print(table)


def _row(job: dict[str, Any]) -> list[str]:
    started = job["started"][:19].replace("T", " ")
    return [job["id"], job["state"], job["recipe"], started, duration_text(job["duration_s"])]


@app.command(epilog="Example: tunesmith jobs logs orders-3f21 --follow")
def logs(
    id_: str = ID,
    cluster: str | None = CLUSTER,
    follow: bool = typer.Option(
        False, "--follow", help="Till the end; exit code 1 if the job fails. Ctrl-C leaves it running."
    ),
    json: bool = JSON,
) -> None:
    """Print what a job has printed, and with --follow all that it will."""
    from tunesmith.workflows import jobs

    address = jobs.cluster_address(cluster, os.environ)
    if not follow:
        job, text = jobs.log_of(id_, address)
        if json:
            print_json(jobs.as_dict(job) | {"log": text})
        else:
            _on_stdout(text)
        return
    pieces: list[str] = []
    job = jobs.follow(id_, address, pieces.append if json else _on_stdout)
    jobs.check_succeeded(job, address)
    if json:
        print_json(jobs.as_dict(job) | {"log": "".join(pieces)})


@app.command(epilog="Example: tunesmith jobs stop orders-3f21")
def stop(id_: str = ID, cluster: str | None = CLUSTER, json: bool = JSON) -> None:
    """Stop a job, and wait till it has ended; the same submit goes on from its last checkpoint."""
    from tunesmith.workflows import jobs

    job, ran = jobs.stop(id_, jobs.cluster_address(cluster, os.environ))
    if json:
        print_json(jobs.as_dict(job) | {"ran": ran})
    else:
        say(f"{job.id} {job.state}" if ran else f"{job.id} had ended already: {job.state}")


def _on_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _on_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
