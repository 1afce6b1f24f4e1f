"""tunesmith shell: a shell, or one command, in a container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith shell

tunesmith shell lab -- nvidia-smi -L

tunesmith shell -- python3 -c 'import torch; print(torch.cuda.is_available())'
"""


class WithCommand(TyperCommand):
    """All behind the first `--` is a command for the container, none of it ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            args, ctx.obj = args[:place], args[place + 1 :]
        return super().parse_args(ctx, args)


@app.command(cls=WithCommand, epilog=EXAMPLES)
def shell(
    context: typer.Context,
    service: str | None = typer.Argument(
        None, metavar="[SERVICE] [-- COMMAND...]", help="Default: lab, or the only one that runs."
    ),
    project: Path | None = typer.Option(
        None, help="Folder of the compose file and the secrets. Default: .tunesmith."
    ),
) -> None:
    """Open a shell in a running container, or run one command there; its exit code is handed on."""
    from tunesmith.workflows.containers import shell as run

    code = run(service, context.obj or [], project=project)
    if code:
        raise SystemExit(code)
