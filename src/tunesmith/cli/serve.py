"""tunesmith serve: answer over an OpenAI-compatible API."""

from __future__ import annotations

import signal
from enum import StrEnum
from pathlib import Path

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load

app = typer.Typer(add_completion=False)


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


EXAMPLES = """Examples:

tunesmith serve runs/orders

tunesmith serve smollm2-135m-instruct --port 8001

tunesmith serve runs/orders --host 0.0.0.0 --api-key "$KEY" --max-length 2048
"""


@app.command(epilog=EXAMPLES)
def serve(
    model: str = typer.Argument(
        metavar="MODEL|RUN", help="A run folder, or whatever model.path of a recipe takes."
    ),
    adapter: str | None = typer.Option(
        None, help="An adapter folder or run in place of the run's own adapter."
    ),
    host: str | None = typer.Option(
        None, help="Address to listen on. Default: 127.0.0.1, this machine only."
    ),
    port: int | None = typer.Option(
        None, min=0, max=65535, help="TCP port; 0 takes a free one. Default: 8000."
    ),
    api_key: str | None = typer.Option(
        None, envvar="TUNESMITH_API_KEY", show_envvar=True, help="Key that clients must send."
    ),
    api_key_file: Path | None = typer.Option(
        None, help="File that holds the key: unlike a command line, only its owner can read it."
    ),
    max_length: int | None = typer.Option(
        None,
        min=8,
        help="Most tokens of prompt and answer together. Default: the model's limit, at most 4096.",
    ),
    max_concurrent: int | None = typer.Option(
        None, min=1, help="Requests computed at the same time; more wait in line. Default: 32."
    ),
    precision: Precision | None = typer.Option(
        None, help="Of the weights. Default: fp32 on CPU, bf16 on GPU."
    ),
    model_name: str | None = typer.Option(
        None, help="Name in /v1/models. Default: the run's or folder's name."
    ),
    device: Device = typer.Option(Device.auto, help="Where to compute."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads. Default: the physical cores."),
    allow_open: bool = typer.Option(
        False, "--allow-open", help="Allow an address that other machines reach without an API key."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object when ready, then keep serving."),
) -> None:
    """Answer over an OpenAI-compatible API until stopped."""
    with first_load("torch"):
        from tunesmith.workflows.serve import ServeOptions
        from tunesmith.workflows.serve import serve as run

    options = ServeOptions(
        adapter=adapter,
        host=host,
        port=port,
        api_key=_key_of(api_key_file) if api_key_file else api_key,
        max_length=max_length,
        max_concurrent=max_concurrent,
        precision=precision.value if precision else None,
        model_name=model_name,
        device=device.value,
        threads=threads or "auto",
        allow_open=allow_open,
    )
    if run(model, options, on_ready=print_json if json else None) == signal.SIGINT:
        raise SystemExit(128 + signal.SIGINT)


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
