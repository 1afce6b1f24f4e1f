"""tunesmith eval: loss, perplexity and exact match on a file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load
from tunesmith.core.units import duration_text

if TYPE_CHECKING:
    from tunesmith.workflows.evaluate import EvalResult

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith eval runs/orders --data held_out.jsonl

tunesmith eval smollm2-135m-instruct --data held_out.jsonl --adapter runs/orders --max-rows 200 --json
"""


@app.command("eval", epilog=EXAMPLES)
def evaluate(
    model: str = typer.Argument(
        metavar="RUN|MODEL",
        help="A run, model or adapter folder, a hub id, a GGUF file or the built-in name.",
    ),
    data: str = typer.Option(help="A file or folder of rows with answers, or the hub id of a data set."),
    adapter: str | None = typer.Option(None, help="An adapter or run folder to put on the model."),
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = typer.Option(
        "auto", help="How the rows are written."
    ),
    system: str | None = typer.Option(
        None, help="System message for rows that have none; default: the run's, else the template's."
    ),
    max_rows: int | None = typer.Option(None, min=1, help="Only the first rows."),
    max_new_tokens: int = typer.Option(256, min=1, help="Most tokens of an answer."),
    exact_match: bool = typer.Option(
        True, "--exact-match/--no-exact-match", help="Generate greedy answers and compare them."
    ),
    show: int = typer.Option(3, min=0, help="How many wrong answers to show."),
    output: Path | None = typer.Option(None, help="Write one JSON object a row to this file (jsonl)."),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto", help="Where to compute."),
    precision: Literal["auto", "fp32", "bf16", "fp16"] = typer.Option("auto", help="Of the weights."),
    offline: bool = typer.Option(False, "--offline", help="Use only what is in the cache."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Measure a model or run on rows: loss, perplexity, and exact match of its greedy answers.

    The loss is the mean over all supervised tokens (answers and their stop tokens). An answer matches when
    it equals the row's last answer, blanks at both ends aside.
    """
    with first_load("torch"):
        from tunesmith.workflows.evaluate import evaluate_model

    result = evaluate_model(
        model,
        data=data,
        adapter=adapter,
        data_format=format,
        system=system,
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        exact_match=exact_match,
        output=output,
        device=device,
        precision=precision,
        offline=offline,
    )
    if json:
        print_json(result.as_dict(show=show))
        return
    _tell(result, show)
    typer.echo(f"\n{duration_text(result.seconds)}" + (f"; rows in {output}" if output else ""))


def _tell(result: EvalResult, show: int) -> None:
    """The result as text on stdout."""
    skipped = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in result.skipped.items() if count
    )
    left_out = f"; left out: {skipped}" if skipped else ""
    typer.echo(f"model        {result.model} ({result.dtype} on {result.device})")
    typer.echo(f"rows         {result.rows:,} of {result.data}, format {result.format}{left_out}")
    typer.echo(
        f"loss         {result.loss:.4f} over {result.supervised_tokens:,} of {result.tokens:,} tokens"
    )
    typer.echo(f"perplexity   {result.perplexity:.4g}")
    if result.exact_match is not None:
        typer.echo(f"exact match  {result.exact_match:.1%} ({result.correct} of {result.compared})")
        if result.finish_length:
            typer.echo(f"             {result.finish_length} answers reached the limit without a stop token")
    for wrong in result.mismatches[:show]:
        typer.echo(f"\n{wrong.place}\n  asked     {_line(wrong.question)}")
        typer.echo(f"  expected  {_line(wrong.expected)}\n  answered  {_line(wrong.answer)}")


def _line(text: str | None) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= 160 else flat[:157] + "..."
