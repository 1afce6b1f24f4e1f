"""tunesmith serve: answer over an OpenAI-compatible API."""

from __future__ import annotations

import signal
import sys
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


class EngineName(StrEnum):
    auto = "auto"
    local = "local"
    vllm = "vllm"
    llamacpp = "llamacpp"


class Weights(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    nf4 = "nf4"


EXAMPLES = """Examples:

tunesmith serve runs/orders

tunesmith serve smollm2-135m-instruct --port 8001

tunesmith serve runs/orders --adapter letters=runs/letters --adapter mails=runs/mails

tunesmith serve runs/orders --host 0.0.0.0 --keys-file keys.json --max-length 2048
"""
MODEL, ENGINE, ACCESS, LIMITS = "The model", "The engine", "Who may ask", "Limits and logs"


@app.command(epilog=EXAMPLES)
def serve(
    model: str = typer.Argument(
        metavar="MODEL|RUN", help="A run folder, or whatever model.path of a recipe takes."
    ),
    adapter: list[str] = typer.Option(
        [],
        metavar="[NAME=]FOLDER",
        rich_help_panel=MODEL,
        help="One more adapter folder or run on the same base, as model NAME; without NAME: in place of the "
        "run's own adapter. May be given again.",
    ),
    merge: bool = typer.Option(
        False, "--merge", rich_help_panel=MODEL, help="Fold the adapter into the weights: one model, faster."
    ),
    model_name: str | None = typer.Option(
        None, rich_help_panel=MODEL, help="Name in /v1/models. Default: the run's or folder's name."
    ),
    max_length: int | None = typer.Option(
        None,
        min=8,
        rich_help_panel=MODEL,
        help="Most tokens of prompt and answer together. Default: the model's limit, at most 4096.",
    ),
    weights: Weights | None = typer.Option(
        None, rich_help_panel=MODEL, help="Format of the weights; int8 and nf4 take the least memory."
    ),
    precision: Precision | None = typer.Option(
        None, rich_help_panel=MODEL, help="Of the computation. Default: fp32 on CPU, bf16 on GPU."
    ),
    engine: EngineName = typer.Option(
        EngineName.auto,
        rich_help_panel=ENGINE,
        help="auto: vLLM where it is installed beside a GPU, else our own; llamacpp serves a GGUF file.",
    ),
    device: Device = typer.Option(Device.auto, rich_help_panel=ENGINE, help="Where to compute."),
    threads: int | None = typer.Option(
        None, min=1, rich_help_panel=ENGINE, help="CPU threads of an engine. Default: the physical cores."
    ),
    max_concurrent: int | None = typer.Option(
        None,
        min=1,
        rich_help_panel=ENGINE,
        help="Requests computed at the same time; more wait in line. Default: 32.",
    ),
    cache_tokens: int | None = typer.Option(
        None,
        min=16,
        rich_help_panel=ENGINE,
        help="Tokens of all requests that an engine keeps. Default: by max length and max concurrent.",
    ),
    replicas: int = typer.Option(
        1, min=1, max=64, rich_help_panel=ENGINE, help="Engines, each a process with the whole model."
    ),
    in_process: bool = typer.Option(
        False,
        "--in-process",
        rich_help_panel=ENGINE,
        help="Compute in this process, not in one of its own that is started again when it dies.",
    ),
    host: str | None = typer.Option(
        None, rich_help_panel=ACCESS, help="Address to listen on. Default: 127.0.0.1, this machine only."
    ),
    port: int | None = typer.Option(
        None, min=0, max=65535, rich_help_panel=ACCESS, help="TCP port; 0 takes a free one. Default: 8000."
    ),
    api_key: str | None = typer.Option(
        None,
        envvar="TUNESMITH_API_KEY",
        show_envvar=True,
        rich_help_panel=ACCESS,
        help="Key that clients must send; it may do everything.",
    ),
    api_key_file: Path | None = typer.Option(
        None,
        rich_help_panel=ACCESS,
        help="File that holds the key: unlike a command line, only its owner can read it.",
    ),
    keys_file: Path | None = typer.Option(
        None, rich_help_panel=ACCESS, help="Keys with names, limits and rights: of 'tunesmith keys'."
    ),
    allow_open: bool = typer.Option(
        False,
        "--allow-open",
        rich_help_panel=ACCESS,
        help="Allow an address that other machines reach without an API key.",
    ),
    cors_origin: list[str] = typer.Option(
        [],
        metavar="ORIGIN",
        rich_help_panel=ACCESS,
        help="Web pages that may ask, such as https://chat.example.org; '*': all. May be given again.",
    ),
    metrics_open: bool = typer.Option(
        False,
        "--metrics-open",
        rich_help_panel=ACCESS,
        help="Let other machines read /metrics without a key.",
    ),
    tls_cert: Path | None = typer.Option(
        None, rich_help_panel=ACCESS, help="Certificate chain (PEM): answer over https."
    ),
    tls_key: Path | None = typer.Option(
        None, rich_help_panel=ACCESS, help="Its key (PEM), where the certificate's file does not hold it."
    ),
    max_waiting: int = typer.Option(
        1024, min=1, rich_help_panel=LIMITS, help="Requests in line; one more is refused with 429."
    ),
    max_requests: int = typer.Option(
        1024, min=1, rich_help_panel=LIMITS, help="Requests under way altogether, in line or computed."
    ),
    max_body_mib: float = typer.Option(
        8.0, min=0.001, rich_help_panel=LIMITS, help="Largest body of a request."
    ),
    request_timeout: float = typer.Option(
        3600.0, min=0.1, rich_help_panel=LIMITS, help="Seconds that a request may take, waiting included."
    ),
    grace: float = typer.Option(
        8.0, min=0.0, rich_help_panel=LIMITS, help="Seconds for running requests when asked to end."
    ),
    log_requests: str | None = typer.Option(
        None,
        metavar="FILE|-",
        rich_help_panel=LIMITS,
        help="One JSON line a request, without its text; '-': on stderr.",
    ),
    log_prompts: bool = typer.Option(
        False, "--log-prompts", rich_help_panel=LIMITS, help="Prompts and answers too, in --log-requests."
    ),
    systemd_unit: bool = typer.Option(
        False, "--systemd-unit", help="Print a systemd unit that serves with these options, and end."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object when ready, then keep serving."),
) -> None:
    """Answer over an OpenAI-compatible API until stopped.

    SIGTERM or Ctrl-C lets running requests end first; a second one ends at once.
    """
    if systemd_unit:
        from tunesmith.workflows.systemd_unit import unit_for_command

        written = [keys_file] + ([Path(log_requests)] if log_requests not in (None, "-") else [])
        key_is_bare = api_key is not None and api_key_file is None
        typer.echo(unit_for_command(sys.argv[1:], grace, written, key_is_bare=key_is_bare), nl=False)
        return
    with first_load("torch"):
        from tunesmith.workflows.serve import ServeOptions, bounds
        from tunesmith.workflows.serve import serve as run

    options = ServeOptions(
        adapters=tuple(adapter),
        merge=merge,
        host=host,
        port=port,
        api_key=_key_of(api_key_file) if api_key_file else api_key,
        max_length=max_length,
        max_concurrent=max_concurrent,
        precision=precision.value if precision else None,
        weights=weights.value if weights else None,
        model_name=model_name,
        device=device.value,
        threads=threads or "auto",
        engine=engine.value,
        in_process=in_process,
        replicas=replicas,
        cache_tokens=cache_tokens,
        max_waiting=max_waiting,
        grace_s=grace,
        allow_open=allow_open,
        keys_file=keys_file,
        cors_origins=tuple(cors_origin),
        access_log=log_requests,
        log_prompts=log_prompts,
        metrics_open=metrics_open,
        bounds=bounds(max_body_mib, request_timeout, max_requests),
        tls_cert=tls_cert,
        tls_key=tls_key,
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
