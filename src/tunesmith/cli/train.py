"""tunesmith train: train a recipe, or resume its unfinished run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.cli.plan import end_with
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Examples: tunesmith train recipe.yaml | tunesmith train recipe.yaml --set train.lr=1e-4 "
    "--set name=second | tunesmith train recipe.yaml --dry-run | "
    "tunesmith train recipe.yaml --cluster cluster.yaml"
)
def train(
    recipe: Path = typer.Argument(metavar="RECIPE", help="The recipe file, or an xtuner 0.1 config (.py)."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Move an earlier run of this name aside and start anew."
    ),
    nnodes: int = typer.Option(1, "--nnodes", min=1, help="Machines that train together."),
    node_rank: int = typer.Option(0, "--node-rank", min=0, help="Number of this machine, from 0."),
    rendezvous: str | None = typer.Option(
        None, "--rendezvous", metavar="HOST:PORT", help="Where the machines meet: a free port of machine 0."
    ),
    cluster: str | None = typer.Option(
        None,
        "--cluster",
        metavar="FILE|RAY",
        help="Train on the hosts of a file, over ssh: cluster.yaml; or on a Ray cluster: auto, "
        "ray://HOST:10001.",
    ),
    workers: str | None = typer.Option(
        None,
        "--workers",
        metavar="N|N:M",
        help="Processes on a Ray cluster; N:M for as many as it has room for.",
    ),
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="As 'tunesmith plan', or with --cluster FILE one command for each host: train nothing.",
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train a recipe. The same command resumes a run that was stopped or killed, exactly where it was."""
    from tunesmith.workflows.import_xtuner import recipe_for
    from tunesmith.workflows.launch import Cluster, enter_worker, launch, processes_to_start

    enter_worker(os.environ)
    recipe, overrides = recipe_for(recipe), set_ or []
    if workers is not None and cluster is None:
        raise UserError(
            f"--workers {workers} without a Ray cluster", hint="--cluster auto, or ray://HOST:10001"
        )
    if cluster is not None:
        if (nnodes, node_rank, rendezvous) != (1, 0, None):
            raise UserError(
                "--cluster with --nnodes, --node-rank or --rendezvous",
                hint="leave them out: the cluster tells",
            )
        _on_cluster(recipe, overrides, cluster, workers, fresh=fresh, dry_run=dry_run, json=json)
        return
    machines = Cluster(nnodes, node_rank, rendezvous)
    processes = 0 if dry_run else processes_to_start(recipe, overrides, machines)
    if processes:
        outcome = launch(recipe, overrides, fresh=fresh, processes=processes, cluster=machines)
        _print(outcome.value, json)
        raise typer.Exit(outcome.code)
    with first_load("torch"):
        from tunesmith.workflows.plan_recipe import PlanOptions, plan_recipe
        from tunesmith.workflows.train import train_recipe

    if dry_run:
        end_with(plan_recipe(recipe, overrides, PlanOptions(rows=0)), json)
    _print(train_recipe(recipe, overrides, fresh=fresh).as_dict(), json)


def _on_cluster(
    recipe: Path,
    overrides: list[str],
    cluster: str,
    workers: str | None,
    *,
    fresh: bool,
    dry_run: bool,
    json: bool,
) -> None:
    from tunesmith.workflows.train_cluster import command_lines, hosts_file, open_launch, train_on_hosts

    file = hosts_file(cluster)
    if file is None:
        _print(_on_ray(recipe, overrides, cluster, workers, fresh=fresh, dry_run=dry_run), json)
        return
    if workers is not None:
        raise UserError(
            f"--workers {workers} with a file of hosts", hint=f"set 'processes' of a host in {file}"
        )
    launch = open_launch(recipe, overrides, file, fresh=fresh)
    if not dry_run:
        _print(train_on_hosts(launch), json)
    elif json:
        print_json({"commands": command_lines(launch)})
    else:
        print("\n".join(map(shlex.join, command_lines(launch).values())))


def _on_ray(
    recipe: Path, overrides: list[str], address: str, workers: str | None, *, fresh: bool, dry_run: bool
) -> dict[str, Any]:
    if dry_run:
        raise UserError("--dry-run with a Ray cluster: Ray finds the places", hint=f"tunesmith plan {recipe}")
    with first_load("torch"):
        from tunesmith.workflows.train_ray import train_on_ray

    return train_on_ray(recipe, overrides, address, fresh=fresh, workers=workers).as_dict()


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    elif "run" in result:
        print(result["run"])
