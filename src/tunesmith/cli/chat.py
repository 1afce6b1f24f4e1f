"""tunesmith chat: talk to a model or run in the terminal."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load
from tunesmith.core.progress import say

if TYPE_CHECKING:
    from tunesmith.workflows.chat import Chat

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith chat runs/orders

tunesmith chat smollm2-135m-instruct --message "What is the capital of France?" --temperature 0

echo "two pizzas at eight" | tunesmith chat runs/orders --json --message -
"""

HELP = (
    "/reset forgets the conversation, /exit ends (so does Ctrl-D), Ctrl-C stops an answer, /help shows this"
)


@app.command(epilog=EXAMPLES)
def chat(
    model: str = typer.Argument(
        metavar="MODEL|RUN", help="A run folder, or whatever model.path of a recipe takes."
    ),
    adapter: str | None = typer.Option(
        None, help="An adapter folder or run in place of the run's own adapter."
    ),
    system: str | None = typer.Option(
        None, help="System message. Default: what the chat template puts there."
    ),
    message: str | None = typer.Option(
        None, help="Answer this one message and end; '-' reads it from stdin."
    ),
    temperature: float = typer.Option(0.7, min=0, max=2, help="0: always the likeliest token."),
    top_p: float = typer.Option(
        1.0, help="Share of the likeliest tokens to draw from, above 0 and at most 1."
    ),
    max_tokens: int | None = typer.Option(
        None, min=1, help="Most tokens of an answer. Default: the context."
    ),
    seed: int | None = typer.Option(None, help="The same seed gives the same answer."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object (with --message)."),
) -> None:
    """Talk to a model or run; the answers stream."""
    if json and message is None:
        raise UserError("--json: needs --message", hint='add --message "TEXT", or --message - for stdin')
    with first_load("torch"):
        from tunesmith.workflows.chat import open_chat

    talk = open_chat(
        model,
        adapter=adapter,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
    )
    if message is None:
        _converse(talk)
        return
    _answer(talk, sys.stdin.read().strip() if message == "-" else message, show=not json)
    if json:
        assert talk.last is not None
        print_json({"model": talk.opened.name} | asdict(talk.last))


def _converse(talk: Chat) -> None:
    """Read messages until the end of the input or Ctrl-C; commands begin with a slash."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        say(f"{talk.opened.name}: {HELP}")
    while True:
        try:
            text = input("> " if on_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            talk.reset()
        elif text == "/help":
            say(HELP)
        elif text.startswith("/"):
            say(f"'{text}' is not a command. {HELP}")
        elif text:
            _turn(talk, text, on_terminal=on_terminal)


def _turn(talk: Chat, text: str, *, on_terminal: bool) -> None:
    try:
        _answer(talk, text, show=True)
    except UserError as error:
        if not on_terminal:
            raise
        say(f"error: {error}")


def _answer(talk: Chat, text: str, *, show: bool) -> None:
    for piece in talk.say(text):
        if show:
            print(piece, end="", flush=True)
    if show:
        print(flush=True)
