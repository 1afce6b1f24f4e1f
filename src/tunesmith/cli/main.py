"""The command table, and the one place where errors become text and exit codes.

A command's module is imported only when that command is called, so that `tunesmith --help` stays fast
and never loads torch.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from tunesmith import __version__
from tunesmith.core.errors import Interrupted, MissingExtra, TunesmithError, UserError
from tunesmith.core.optional import postpone

# name: (module with a typer app named `app`, one line of help)
COMMANDS = {
    "doctor": ("tunesmith.cli.doctor", "Look this host over: GPU, docker, mirrors, disk; with every fix."),
    "setup": ("tunesmith.cli.setup", "Install what this host still needs: docker, NVIDIA toolkit, mirrors."),
    "image": ("tunesmith.cli.image", "Show, build, check, save and load the locked container image."),
    "up": ("tunesmith.cli.up", "Start the containers: lab, train, serve."),
    "down": ("tunesmith.cli.down", "Stop and remove the containers."),
    "ps": ("tunesmith.cli.ps", "What runs in the containers, and how it is."),
    "logs": ("tunesmith.cli.logs", "What the containers printed."),
    "shell": ("tunesmith.cli.shell", "A shell, or one command, in a container."),
    "lab": ("tunesmith.cli.lab", "JupyterLab behind a token, in a container or in this environment."),
    "bundle": (
        "tunesmith.cli.bundle",
        "Collect all that a machine without network needs, and install it there.",
    ),
    "quickstart": (
        "tunesmith.cli.quickstart",
        "Fine-tune, prove, export and serve a small real model in minutes.",
    ),
    "fetch": (
        "tunesmith.cli.fetch",
        "Bring a model or data set to this machine, checked, and write its lock.",
    ),
    "data": ("tunesmith.cli.data", "Show and check the rows of a recipe as the model will see them."),
    "plan": (
        "tunesmith.cli.plan",
        "Know tokens, memory, time and disk of a training before it runs; refuse what cannot work.",
    ),
    "train": ("tunesmith.cli.train", "Train a recipe, or resume its unfinished run."),
    "jobs": ("tunesmith.cli.jobs", "Train in a Ray cluster by jobs that outlive this terminal."),
    "import": ("tunesmith.cli.import_", "Turn another tool's training file into a recipe: xtuner 0.1."),
    "verify": ("tunesmith.cli.verify", "Prove on your own recipe that a killed run goes on exactly."),
    "bench": ("tunesmith.cli.bench", "Measure training on this machine, beside other tools."),
    "eval": ("tunesmith.cli.evaluate", "Loss, perplexity and exact match of a model or run on a file."),
    "export": ("tunesmith.cli.export", "Turn a run into an adapter folder or a merged model folder."),
    "chat": ("tunesmith.cli.chat", "Talk to a model or run in the terminal."),
    "serve": ("tunesmith.cli.serve", "Answer over an OpenAI-compatible API."),
    "keys": ("tunesmith.cli.keys", "Keys of the endpoint, each with its limits: add, list, revoke."),
    "schema": ("tunesmith.cli.schema", "Print the JSON Schema of the recipe."),
}

# The extra that brings a package which is missing.
EXTRA_OF = {
    "torch": "train", "transformers": "train", "peft": "train", "datasets": "train", "safetensors": "train",
    "pyarrow": "train", "numpy": "train", "tokenizers": "train", "tensorboard": "train",
    "bitsandbytes": "qlora", "deepspeed": "deepspeed", "liger_kernel": "kernels",
    "jupyterlab": "host", "fastapi": "serve", "uvicorn": "serve", "openai": "serve",
    "llguidance": "serve", "msgpack": "serve", "prometheus_client": "serve",
    "xllamacpp": "llamacpp", "ray": "cluster", "s3fs": "s3",
}  # fmt: skip

USAGE = """\
Usage: tunesmith COMMAND [OPTIONS]

From a bare Linux server to your own fine-tuned model behind an OpenAI-compatible API.

Commands:
{commands}

Options:
  --help       This text; 'tunesmith COMMAND --help' tells a command's options, with examples.
  --version    The version.

Example:
  tunesmith train recipe.yaml
"""


def usage() -> str:
    width = max(map(len, COMMANDS)) + 3
    return USAGE.format(
        commands="\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    )


def print_json(value: Any) -> None:
    """The one object that `--json` puts on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    if argv is None:  # this process is the program's own
        postpone("bitsandbytes", "deepspeed")
    try:
        code = dispatch(args)
    except TunesmithError as error:
        code = report(error, as_json="--json" in args)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA_OF:
            raise
        code = report(MissingExtra(package, EXTRA_OF[package]), as_json="--json" in args)
    except KeyboardInterrupt:
        code = report(Interrupted(signal.SIGINT, "interrupted"), as_json="--json" in args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        failure = TunesmithError(f"{place}{error.strerror or error}", hint=_os_hint(error))
        if os.environ.get("TUNESMITH_DEBUG"):
            traceback.print_exc()
        code = report(failure, as_json="--json" in args)
    if argv is None and os.environ.get("WORLD_SIZE", "1") != "1":
        # Native threads of a process group can abort an interpreter that takes its time to end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def dispatch(args: list[str]) -> int:
    """Run one command; its exit code."""
    if not args or args[0] in ("--help", "-h", "help"):
        print(usage(), end="")
        return 0
    if args[0] == "--version":
        print(f"tunesmith {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'tunesmith --help' lists the commands"
        raise UserError(f"tunesmith: '{name}' is not a command", hint=hint)
    app = importlib.import_module(COMMANDS[name][0]).app
    try:
        code = app(args=args[1:], prog_name=f"tunesmith {name}", standalone_mode=False)
    except Exception as error:
        # Typer keeps its exception classes private: a usage error is known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        raise UserError(
            f"tunesmith {name}: {error.format_message()}", hint=f"'tunesmith {name} --help' lists its options"
        ) from None
    if code == 128 + signal.SIGINT:  # Typer turns Ctrl-C into this return value
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def report(error: TunesmithError, *, as_json: bool) -> int:
    """Show an error: text on stderr, and with `--json` one object on stdout. Returns the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if as_json:
        print_json({"error": error.as_dict()})
    return error.exit_code


def _os_hint(error: OSError) -> str | None:
    return {
        errno.ENOSPC: "the disk is full: free space, or set $TUNESMITH_CACHE or output_dir to another disk",
        errno.EACCES: "this user may not do that: check the owner and the mode of the path",
        errno.ENOENT: "check the path",
    }.get(error.errno or 0)
