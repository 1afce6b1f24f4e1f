"""tunesmith serve: answer over an OpenAI-compatible API."""

from __future__ import annotations

import signal
from enum import StrEnum

import typer

from tunesmith.cli.main import print_json

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
    from tunesmith.workflows.serve import ServeOptions
    from tunesmith.workflows.serve import serve as run

    options = ServeOptions(
        adapter=adapter,
        host=host,
        port=port,
        api_key=api_key,
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
