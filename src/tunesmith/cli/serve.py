"""tunesmith serve: answer over an OpenAI-compatible API."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.cli.settings import Settings
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load
from tunesmith.core.optional import postpone
from tunesmith.recipe.serving import Serve, option_of

app = typer.Typer(add_completion=False)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


EXAMPLES = """Examples:

tunesmith serve runs/orders

tunesmith serve smollm2-135m-instruct --port 8001

tunesmith serve runs/orders --adapter letters=runs/letters --adapter mails=runs/mails

tunesmith serve runs/orders --host 0.0.0.0 --keys-file keys.json --max-length 2048

tunesmith serve runs/orders --cluster auto --replicas 2 --max-replicas 8
"""
MODEL, ENGINE, ACCESS, LIMITS = "The model", "The engine", "Who may ask", "Limits and logs"
CLUSTER = "Several machines"
SETTINGS = Settings(
    Serve,
    panels={
        MODEL: ("model_name", "adapters", "merge", "max_length", "weights", "precision"),
        ENGINE: ("engine", "max_concurrent", "cache_tokens", "replicas"),
        ACCESS: (
            "host", "port", "api_key", "keys_file", "cors_origins", "metrics_open", "tls_cert", "tls_key",
        ),
        LIMITS: (
            "max_waiting", "max_requests", "max_body_mib", "request_timeout_s", "grace_s", "log_requests",
            "log_prompts",
        ),
    },
    option_of=option_of,
    metavars={
        "adapters": "[NAME=]FOLDER", "keys_file": "FILE|none", "cors_origins": "ORIGIN", "tls_cert": "FILE",
        "tls_key": "FILE", "log_requests": "FILE|-",
    },
    notes={"adapters": "Without NAME: in place of the run's own adapter."},
    envvars={"api_key": "TUNESMITH_API_KEY", "keys_file": "TUNESMITH_KEYS_FILE"},
)  # fmt: skip


@app.command(epilog=EXAMPLES)
@SETTINGS.options
def serve(
    model: str | None = typer.Argument(
        None,
        metavar="MODEL|RUN|RECIPE",
        help="A run folder, the recipe of a run, or whatever model.path of a recipe takes.",
    ),
    device: Device = typer.Option(Device.auto, rich_help_panel=ENGINE, help="Where to compute."),
    threads: int | None = typer.Option(
        None, min=1, rich_help_panel=ENGINE, help="CPU threads of an engine. Default: the physical cores."
    ),
    in_process: bool = typer.Option(
        False,
        "--in-process",
        rich_help_panel=ENGINE,
        help="Compute in this process, not in one of its own that is started again when it dies.",
    ),
    api_key_file: Path | None = typer.Option(
        None,
        rich_help_panel=ACCESS,
        help="File that holds the API key: unlike a command line, only its owner can read it.",
    ),
    allow_open: bool = typer.Option(
        False,
        "--allow-open",
        rich_help_panel=ACCESS,
        help="Allow an address that other machines reach without an API key.",
    ),
    cluster: str | None = typer.Option(
        None,
        metavar="RAY",
        rich_help_panel=CLUSTER,
        help="Serve on a Ray cluster, and return: auto, HOST:PORT or ray://HOST:10001. --replicas are then "
        "spread over its machines; asked again, they are replaced one after the other.",
    ),
    max_replicas: int | None = typer.Option(
        None,
        min=1,
        rich_help_panel=CLUSTER,
        help="With --cluster: as many replicas as this while requests pile up.",
    ),
    stop: bool = typer.Option(
        False, "--stop", rich_help_panel=CLUSTER, help="With --cluster: end the replicas."
    ),
    systemd_unit: bool = typer.Option(
        False, "--systemd-unit", help="Print a systemd unit that serves with these options, and end."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object when ready, then keep serving."),
    **settings: Any,
) -> None:
    """Answer over an OpenAI-compatible API until stopped.

    What the section serve of a run's recipe says holds where no option says otherwise.

    SIGTERM or Ctrl-C lets running requests end first; a second one ends at once.
    """
    open_here: Callable[..., Any] | None = None
    if stop:
        _stop(cluster, json)
        return
    if model is None:
        raise UserError(
            "nothing to serve: no model, run or recipe is named", hint="tunesmith serve runs/NAME"
        )
    if not in_process:
        postpone("torch")  # 260 MiB and three seconds that only the engine's process needs
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no torch
    with first_load("transformers"):
        if in_process:
            from tunesmith.workflows.open_engine import open_engine

            open_here = open_engine
        if cluster is not None:
            from tunesmith.workflows.serve_ray import serve_on_ray
        from tunesmith.workflows.serve import serve as run
        from tunesmith.workflows.serve_settings import ServeOptions, deployment

    adapters = settings.pop("adapters") or ()
    given = {name: value for name, value in settings.items() if value is not None and value != []}
    if api_key_file:
        given["api_key"] = _key_of(api_key_file)
    options = ServeOptions(
        settings=given,
        adapters=adapters,
        device=device.value,
        threads=threads or "auto",
        allow_open=allow_open,
    )
    if cluster is not None:
        for option, is_given in {"--in-process": in_process, "--systemd-unit": systemd_unit}.items():
            if is_given:
                raise UserError(f"{option} with --cluster: Ray starts the processes", hint="leave it out")
        found = serve_on_ray(model, options, cluster, most=max_replicas)
        if json:
            print_json(found)
        else:
            typer.echo(found["url"])
        return
    if max_replicas is not None:
        raise UserError(f"--max-replicas {max_replicas} without a Ray cluster", hint="--cluster auto")
    if systemd_unit:
        from tunesmith.workflows.systemd_unit import unit_for_command

        key_is_bare = "api_key" in given and api_key_file is None
        unit = unit_for_command(sys.argv[1:], deployment(model, options), key_is_bare=key_is_bare)
        typer.echo(unit, nl=False)
        return
    on_ready = print_json if json else None
    if run(model, options, on_ready=on_ready, open_here=open_here) == signal.SIGINT:
        raise SystemExit(128 + signal.SIGINT)


def _stop(cluster: str | None, as_json: bool) -> None:
    from tunesmith.workflows.serve_ray import stop_on_ray

    if cluster is None:
        raise UserError(
            "--stop without a Ray cluster", hint="--cluster auto; a server of this machine: Ctrl-C"
        )
    was = stop_on_ray(cluster)
    if as_json:
        print_json({"stopped": was})
    else:
        typer.echo("ended" if was else "nothing was served")


def _key_of(file: Path) -> str:
    """Raises UserError for a file that cannot be read, or that is empty: the server would be open."""
    try:
        key = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"--api-key-file {file}: {reason}", hint="give a text file of one line") from None
    if not key:
        raise UserError(f"--api-key-file {file}: is empty", hint="write the key into it")
    return key
