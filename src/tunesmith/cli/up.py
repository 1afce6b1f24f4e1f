"""tunesmith up: start the containers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.progress import say

if TYPE_CHECKING:
    from tunesmith.workflows.containers import Up

app = typer.Typer(add_completion=False)


class Gpus(StrEnum):
    auto = "auto"
    cdi = "cdi"
    nvidia = "nvidia"
    none = "none"


class Ipc(StrEnum):
    private = "private"
    host = "host"


EXAMPLES = """Examples:

tunesmith up

tunesmith up lab --image my/image:1 --lab-port 9000

tunesmith up train --recipe recipe.yaml

tunesmith up serve --run runs/orders
"""


@app.command(epilog=EXAMPLES)
def up(
    services: list[str] | None = typer.Argument(
        None, metavar="[lab|train|serve]...", help="Default: those of the compose file, or lab."
    ),
    recipe: Path | None = typer.Option(None, help="What the service train trains."),
    run: str | None = typer.Option(None, help="What serve serves: a run folder, or what model.path takes."),
    image: str | None = typer.Option(None, help="Image in place of the one 'tunesmith image build' makes."),
    serve_image: str | None = typer.Option(None, help="The same for the service serve alone."),
    models: Path | None = typer.Option(
        None, help="Folder for models. Default: $TUNESMITH_CACHE, else ~/.cache/tunesmith."
    ),
    data: Path | None = typer.Option(None, help="Folder with data. Default: data."),
    runs: Path | None = typer.Option(None, help="Folder for runs. Default: runs."),
    notebooks: Path | None = typer.Option(None, help="Folder for notebooks. Default: notebooks."),
    user: str | None = typer.Option(
        None, metavar="UID:GID", help="Whom the containers run as. Default: you (behind sudo: its caller)."
    ),
    bind: str | None = typer.Option(
        None, help="Address that the ports are published on. Default: 127.0.0.1, this machine only."
    ),
    lab_port: int | None = typer.Option(None, min=0, max=65535, help="0 takes a free one. Default: 8888."),
    serve_port: int | None = typer.Option(None, min=0, max=65535, help="0 takes a free one. Default: 8000."),
    token: str | None = typer.Option(
        None, help="JupyterLab's token in place of a generated one; others see it in the process list."
    ),
    password_file: Path | None = typer.Option(
        None, help="File with JupyterLab's password; needed for a --bind that other machines reach."
    ),
    gpus: Gpus | None = typer.Option(None, help="How GPUs are given. Default: auto, as this host can."),
    host_network: bool | None = typer.Option(
        None, "--host-network", help="The host's network in place of one of their own."
    ),
    ipc: Ipc | None = typer.Option(None, help="Shared memory of their own, or the host's. Default: private."),
    shm_size: int | None = typer.Option(
        None, min=1, metavar="GIB", help="Shared memory. Default: a quarter of the host's memory, at most 64."
    ),
    project: Path | None = typer.Option(
        None, help="Folder of the compose file and the secrets. Default: .tunesmith."
    ),
    render: bool = typer.Option(
        False, "--render", help="Write services anew that the compose file has; the old file is kept."
    ),
    timeout: float = typer.Option(600.0, min=1, help="Seconds until every service must be healthy."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Start containers and wait until they are healthy.

    The first call writes a compose file. Later ones use it as it is, with your changes, and add a service
    that it lacks. 'train' runs a recipe in the background ('tunesmith logs -f train' follows it), and
    resumes it when called again.
    """
    from tunesmith.workflows.compose_project import Wanted
    from tunesmith.workflows.containers import up as start
    from tunesmith.workflows.lab_files import check_token, read_password

    check_token(token)
    wanted = Wanted(
        image=image,
        serve_image=serve_image,
        models=models,
        data=data,
        runs=runs,
        notebooks=notebooks,
        recipe=recipe,
        run=run,
        user=user,
        bind=bind,
        lab_port=lab_port,
        serve_port=serve_port,
        gpus=gpus.value if gpus else None,
        host_network=host_network,
        ipc=ipc.value if ipc else None,
        shm_gib=shm_size,
        password=read_password(bind if not services or "lab" in services else None, password_file),
    )
    found = start(services or [], wanted, project=project, anew=render, token=token, timeout_s=timeout)
    if json:
        print_json(found.as_dict())
    else:
        show(found)


def show(found: Up) -> None:
    """Where each service answers; JupyterLab's URL with its token, once."""
    from tunesmith.workflows.lab_files import say_tunnel

    for one in found.containers:
        url = found.lab_url if one.service == "lab" and found.lab_url else one.url
        url = f"{url}/v1" if one.service == "serve" and url else url
        typer.echo(f"{one.service:<8}  {url or one.status}")
        port = one.url.rpartition(":")[2]
        if port.isdigit():
            say_tunnel(int(port))
    for path in found.secrets:
        say(f"secret    {path}")
