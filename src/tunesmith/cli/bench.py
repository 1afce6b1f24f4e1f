"""tunesmith bench: measure training and serving, beside other tools."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load


class Endpoint(StrEnum):
    completions = "completions"
    chat = "chat"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure training and serving, beside other tools.",
    epilog="Examples: tunesmith bench train --peer plain | tunesmith bench serve http://127.0.0.1:8000",
)

SERVE_EXAMPLES = """Examples:

tunesmith bench serve runs/orders

tunesmith bench serve http://127.0.0.1:8000 --api-key "$KEY" --concurrency 1,16 --rate 0.5,2

tunesmith bench serve smollm2-135m-instruct --serve-arg=--precision=bf16 --output bf16
"""

EXAMPLES = """Examples:

tunesmith bench train --peer plain

tunesmith bench train --peer trl-packed --peer llamafactory --install --repeat 3

tunesmith bench train --data my_rows.json --method full --set train.gradient_checkpointing=full
"""


@app.callback()
def bench() -> None:
    """Measure training and serving, beside other tools."""


@app.command(epilog=EXAMPLES)
def train(
    model: str = typer.Option("smollm2-135m-instruct", help="The model: a folder, hub id or built-in name."),
    data: Path | None = typer.Option(None, help="A file of rows; default: made-up rows of Alpaca's shape."),
    method: list[str] | None = typer.Option(None, help="lora or full; repeat it for both. Default: both."),
    peer: list[str] | None = typer.Option(
        None, help="Whom to compare with: plain, trl, trl-packed, llamafactory, …; repeatable."
    ),
    envs: Path | None = typer.Option(None, help="Folder of the peers' environments; default: in the cache."),
    install: bool = typer.Option(
        False, "--install", help="Make the environments that are missing, with pip."
    ),
    rows: int = typer.Option(72, min=2, help="Rows to train on."),
    rows_per_step: int = typer.Option(8, min=1, help="Rows of an optimizer step."),
    max_length: int = typer.Option(512, min=8, help="Longer rows are left out, in tokens."),
    rank: int = typer.Option(8, min=1, help="Rank of the adapters."),
    lr: float = typer.Option(1e-4, help="Learning rate, constant."),
    precision: str = typer.Option("auto", help="fp32 or bf16; auto: bf16 where the hardware multiplies it."),
    device: str = typer.Option("auto", help="cpu or cuda; auto: a GPU when there is one."),
    threads: int | None = typer.Option(
        None, min=1, help="CPU threads of every contender; default: all cores."
    ),
    repeat: int = typer.Option(3, min=1, help="Runs of every contender, in turns."),
    reference: bool = typer.Option(True, help="Also run the plain loop once in fp32 and compare the losses."),
    seed: int = typer.Option(0, help="Seed of rows, order and adapters."),
    output: Path = typer.Option(
        Path("bench-train"), help="Folder for results.json, curves.svg and the logs."
    ),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of our recipe; repeatable."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train the same rows with tunesmith and its peers, in turns; tokens/s, memory, start-up and losses."""
    with first_load("torch"):
        from tunesmith.workflows.bench import BenchOptions, bench_train

    values: dict[str, Any] = {
        "model": model, "data": data, "methods": tuple(method or ("lora", "full")),
        "peers": tuple(peer or ()),
        "envs": envs, "install": install, "rows": rows, "rows_per_step": rows_per_step,
        "max_length": max_length, "rank": rank, "lr": lr, "precision": precision, "device": device,
        "threads": threads, "repeat": repeat, "reference": reference, "seed": seed, "output": output,
        "overrides": tuple(set_ or ()),
    }  # fmt: skip
    found = bench_train(BenchOptions(**values))
    if json:
        print_json(found)
    else:
        typer.echo(found["table"])


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    target: str = typer.Argument(
        metavar="URL|RUN|MODEL", help="A server's address, or whatever tunesmith serve takes."
    ),
    model: str | None = typer.Option(None, help="Name of the model; default: the server's first."),
    api_key: str | None = typer.Option(
        None, envvar="TUNESMITH_API_KEY", show_envvar=True, help="Key of the server at URL."
    ),
    endpoint: Endpoint = typer.Option(Endpoint.completions, help="Which of the two is asked."),
    concurrency: str = typer.Option("1,8,32", help="Closed loop: clients with one request each at a time."),
    rate: str = typer.Option("", help="Open loop: requests a second at random times, such as 0.5,2."),
    requests: str = typer.Option(
        "8", help="Requests of every level, at least two for each client; or a number for each, as 6,16,64."
    ),
    limit: float | None = typer.Option(
        None, min=1, help="Most seconds of a level: answers under way then are cut, the rest is not sent."
    ),
    new_tokens: int = typer.Option(128, min=1, help="Tokens of every answer."),
    prompt_tokens: str = typer.Option("60-300", help="Fewest and most tokens of a prompt, about."),
    ignore_eos: bool = typer.Option(
        True, help="Ask for answers of full length; not every other server knows the field."
    ),
    seed: int = typer.Option(0, help="Seed of prompts and times."),
    output: Path = typer.Option(Path("bench-serve"), help="Folder for results.json and latency.svg."),
    serve_arg: list[str] | None = typer.Option(
        None, help="One more argument for the tunesmith serve that is started; repeatable."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Load on an endpoint: tokens/s, time to the first token and between tokens, by number of clients."""
    from tunesmith.workflows.bench_serve import LoadOptions, bench_serve

    values: dict[str, Any] = {
        "target": target, "model": model, "api_key": api_key, "endpoint": endpoint.value,
        "concurrency": tuple(numbers("--concurrency", concurrency, int)),
        "rates": tuple(numbers("--rate", rate, float)),
        "requests": tuple(numbers("--requests", requests, int)) or (8,), "limit_s": limit,
        "new_tokens": new_tokens,
        "prompt_tokens": between("--prompt-tokens", prompt_tokens), "ignore_eos": ignore_eos, "seed": seed,
        "output": output, "serve_args": tuple(serve_arg or ()),
    }  # fmt: skip
    found = bench_serve(LoadOptions(**values))
    if json:
        print_json(found)
    else:
        typer.echo(found["table"])


def numbers(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """Raises UserError for anything but numbers above 0 with commas between them."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(not 0 < number < math.inf for number in found):
        raise UserError(f"{option} {text}: is not a list of numbers above 0", hint="such as 1,8,32")
    return list(found)


def between(option: str, text: str) -> tuple[int, int]:
    """Raises UserError for anything but two whole numbers, the smaller first."""
    fewest, _, most = text.partition("-")
    if not (fewest.isdigit() and most.isdigit() and 0 < int(fewest) <= int(most)):
        raise UserError(f"{option} {text}: is not a range", hint="such as 60-300")
    return int(fewest), int(most)
