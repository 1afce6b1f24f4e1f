"""tunesmith lab: JupyterLab behind a token, in a container or in this environment."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.progress import say

if TYPE_CHECKING:
    from tunesmith.workflows.lab import Lab

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith lab

tunesmith lab --here --port 0

tunesmith lab --container --image my/image:1

tunesmith lab --bind 0.0.0.0 --password-file password.txt
"""


@app.command(epilog=EXAMPLES)
def lab(
    container: bool = typer.Option(
        False, "--container", help="In a container, which goes on until 'tunesmith down'."
    ),
    here: bool = typer.Option(False, "--here", help="In this Python environment, until Ctrl-C."),
    port: int = typer.Option(8888, min=0, max=65535, help="TCP port; 0 takes a free one."),
    bind: str = typer.Option(
        "127.0.0.1", help="Address to listen on; others than this machine's need a password."
    ),
    token: str | None = typer.Option(
        None, help="Token in place of a generated one; others see it in the process list."
    ),
    password_file: Path | None = typer.Option(
        None, help="File with a password, besides the token; asked for on a terminal when --bind needs one."
    ),
    notebooks: Path = typer.Option(
        Path("notebooks"), help="Work folder; the quickstart notebook is put there."
    ),
    image: str | None = typer.Option(None, help="Image in place of the one 'tunesmith image build' makes."),
    project: Path | None = typer.Option(
        None, help="Folder of the compose file, the token and the log. Default: .tunesmith."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object when it answers."),
) -> None:
    """Start JupyterLab with the quickstart notebook, and print its URL once.

    In a container where its image is on this machine, else in this environment; or as you choose.
    """
    from tunesmith.workflows.lab import LabOptions, image_is_here, lab_here
    from tunesmith.workflows.lab_files import check_token, read_password

    if container and here:
        raise UserError("--container and --here exclude each other", hint="give one of them")
    check_token(token)
    password = read_password(bind, password_file)
    if container or (not here and image_is_here(image)):
        _in_container(image, notebooks, bind, port, token, password, project, json)
        return
    options = LabOptions(
        notebooks=notebooks.expanduser(),
        project=project,
        bind=bind,
        port=port,
        token=token,
        password=password,
    )
    if lab_here(options, lambda found: _show(found, json)) == signal.SIGINT:
        raise SystemExit(128 + signal.SIGINT)


def _in_container(
    image: str | None,
    notebooks: Path,
    bind: str,
    port: int,
    token: str | None,
    password: str | None,
    project: Path | None,
    json: bool,
) -> None:
    from tunesmith.cli.up import show
    from tunesmith.workflows.compose_project import Wanted
    from tunesmith.workflows.containers import up

    wanted = Wanted(
        image=image,
        notebooks=None if notebooks == Path("notebooks") else notebooks,
        bind=None if bind == "127.0.0.1" else bind,
        lab_port=None if port == 8888 else port,
        password=password,
    )
    found = up(["lab"], wanted, project=project, token=token)
    if json:
        print_json(found.as_dict())
    else:
        show(found)


def _show(found: Lab, json: bool) -> None:
    from tunesmith.workflows.lab_files import say_tunnel

    if json:
        print_json(found.as_dict())
    else:
        typer.echo(found.url)
    say(f"token     {found.token_file} (only you can read it)")
    say(f"notebook  {found.notebook}")
    say_tunnel(found.port)
    say("Ctrl-C ends it")
