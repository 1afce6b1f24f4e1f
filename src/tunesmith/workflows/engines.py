"""Which engine answers, and how the programs of others are found and described."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.serve import llamacpp_launch

EngineName = Literal["local", "vllm", "llamacpp"]
LLAMA_SERVER = "TUNESMITH_LLAMA_SERVER"
VLLM = "TUNESMITH_VLLM"
VLLM_ARGS = "TUNESMITH_VLLM_ARGS"
OUR_VLLM_OPTIONS = ("--host", "--port", "--uds", "--api-key", "--served-model-name", "--max-logprobs")


@dataclass(frozen=True)
class Choice:
    """An engine, and why it was taken, for people."""

    engine: EngineName
    why: str


def choose_engine(
    wanted: EngineName | Literal["auto"], path: str, *, device: str, vllm: str | None = None
) -> Choice:
    """The engine for the model `path` on `device` ("cpu" or "cuda"), and why.

    auto: vLLM where there is a GPU and vLLM is installed (`vllm`, $TUNESMITH_VLLM, or the command on PATH);
    else our own. llamacpp is taken only when it is asked for. Raises UserError for an engine that is not
    installed here.
    """
    if wanted == "llamacpp":
        return Choice("llamacpp", f"asked for; by {llama_server()[0]}")
    if wanted == "vllm":
        return Choice("vllm", f"asked for; by {vllm_program(vllm)[0]}")
    if wanted == "local":
        return Choice("local", "asked for")
    if device != "cuda":
        return Choice("local", "there is no GPU")
    try:
        program = vllm_program(vllm)
    except UserError:
        return Choice("local", "vLLM is not installed beside this GPU")
    return Choice("vllm", f"there is a GPU, and vLLM: {program[0]}")


def llama_server(given: str | None = None) -> list[str]:
    """How llama.cpp's server is started, without its options.

    `given` or $TUNESMITH_LLAMA_SERVER: the program, or a Python that has the package xllamacpp; else
    llama-server on PATH, else our own Python where it has xllamacpp. Raises UserError when there is none.
    """
    named = given or os.environ.get(LLAMA_SERVER)
    if named:
        return _launched_by(_program(named, LLAMA_SERVER))
    found = shutil.which("llama-server")
    if found is not None:
        return [found]
    if importlib.util.find_spec("xllamacpp") is not None:
        return _launched_by(sys.executable)
    raise UserError(
        "llama.cpp's server is not installed: no llama-server on PATH, no package xllamacpp",
        hint=f"install llama.cpp or 'pip install xllamacpp', or name the program in ${LLAMA_SERVER}",
    )


def _launched_by(program: str) -> list[str]:
    """A Python starts the server out of xllamacpp; any other program is llama-server itself."""
    if Path(program).name.startswith("python"):
        return [program, str(llamacpp_launch.__file__)]
    return [program]


def vllm_program(given: str | None = None) -> list[str]:
    """How vLLM is started, without the word 'serve'.

    `given` or $TUNESMITH_VLLM: the program 'vllm', or the Python of the environment that has it; else vllm
    on PATH. Raises UserError when there is none.
    """
    named = given or os.environ.get(VLLM)
    if not named:
        found = shutil.which("vllm")
        if found is None:
            raise UserError(
                "vLLM is not installed: no program 'vllm' on PATH",
                hint=f"install it into an environment of its own and name its 'vllm' in ${VLLM}",
            )
        return [found]
    program = _program(named, VLLM)
    if Path(program).name.startswith("python"):
        return [program, "-m", "vllm.entrypoints.cli.main"]
    return [program]


def vllm_args() -> list[str]:
    """More options of `vllm serve`, such as --tensor-parallel-size 2, from $TUNESMITH_VLLM_ARGS.

    Raises UserError for one that is ours to set: where it listens, its key, and what it answers to.
    """
    try:
        args = shlex.split(os.environ.get(VLLM_ARGS, ""))
    except ValueError as error:
        raise UserError(f"${VLLM_ARGS}: {error}", hint="write it as in a shell") from None
    for option in args:
        if option.split("=")[0].replace("_", "-") in OUR_VLLM_OPTIONS:
            raise UserError(f"${VLLM_ARGS}: {option} is set from here", hint="leave it out")
    return args


def _program(named: str, variable: str) -> str:
    found = shutil.which(str(Path(named).expanduser()))
    if found is None:
        raise UserError(f"{named}: no program that can be started", hint=f"correct ${variable} or the option")
    return found
