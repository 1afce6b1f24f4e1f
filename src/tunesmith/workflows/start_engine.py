"""The engine that `serve` answers with: in processes of its own or in this one, and what it has loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

from tunesmith.core.cpu import physical_cores
from tunesmith.core.errors import UserError
from tunesmith.core.gpu import gpus
from tunesmith.core.progress import say
from tunesmith.serve.engine import Engine, EngineStatus
from tunesmith.serve.pool import Pool
from tunesmith.serve.process_engine import ProcessEngine
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.engines import Choice, EngineName, choose_engine
from tunesmith.workflows.open_program import open_program
from tunesmith.workflows.served_models import Facts

OpenEngine = Callable[..., tuple[Engine, dict[str, Any]]]
"""`open_engine.open_engine`: who has it not loaded has no torch in the process that answers."""


class StartedEngine:
    """An engine on its way: `start` it in one thread, `stop` it from any.

    open_here: our own engine computes in this process, opened by this, and not in one of its own.
    Raises UserError for an engine that is not installed here, or does not do what is asked.
    """

    def __init__(
        self,
        wants: EngineWants,
        *,
        engine: EngineName | Literal["auto"],
        replicas: int,
        open_here: OpenEngine | None = None,
    ) -> None:
        self._wants, self._replicas, self._open_here = wants, replicas, open_here
        self._choice = _choice(wants, engine, in_process=open_here is not None, replicas=replicas)
        alone = open_here is not None or self._choice.engine != "local"
        self._pool = None if alone else _pool(wants, replicas)
        self._stopped = False
        self.engine: Engine | None = self._pool

    def start(self) -> Facts | None:
        """What it has loaded, once it has generated a token; None when it was stopped meanwhile.

        Raises the error that it met.
        """
        try:
            if self._pool is not None:
                return Facts.of(self._pool.start())
            if self._open_here is None:
                say(f"{self._choice.engine} answers: {self._choice.why}")
                return self._start_program()
            self.engine, plain = self._open_here(self._wants, stopped=lambda: self._stopped)
            return Facts.of(plain)
        except Exception:
            if self._stopped:
                return None
            raise

    def _start_program(self) -> Facts:
        program, plain = open_program(self._choice.engine, self._wants)
        self.engine = program
        program.start()
        return Facts.of(plain)

    def stop(self, grace_s: float) -> None:
        self._stopped = True
        if self.engine is not None:
            self.engine.close(grace_s=grace_s)

    def abort(self) -> None:
        """End it at once; what runs ends with an error."""
        self._stopped = True
        if self._pool is not None:
            self._pool.abandon()
        elif self.engine is not None:
            self.engine.close(grace_s=0.0)

    def statuses(self) -> dict[str, EngineStatus]:
        """Of every engine, by a name for it."""
        if self._pool is not None:
            return self._pool.statuses()
        return {} if self.engine is None else {"0": self.engine.status()}


def _choice(
    wants: EngineWants, engine: EngineName | Literal["auto"], *, in_process: bool, replicas: int
) -> Choice:
    """vLLM is not taken unasked where options are given that only our own engine has."""
    ours = {
        "--in-process": in_process,
        "--replicas": replicas > 1,
        "--weights": wants.weights is not None,
        "--merge": wants.merge,
        "--cache-tokens": wants.cache_tokens is not None,
    }
    asked = [option for option, is_given in ours.items() if is_given]
    if engine == "auto" and asked:
        return Choice("local", f"{asked[0]} is given")
    device = "cuda" if wants.device == "cuda" or (wants.device == "auto" and gpus()) else "cpu"
    choice = choose_engine(engine, wants.path, device=device)
    only_ours = [option for option in asked if option != "--merge"]
    if choice.engine != "local" and only_ours:
        raise UserError(f"{only_ours[0]}: is for our own engine", hint="give --engine local, or leave it out")
    return choice


def process_engine(wants: EngineWants) -> ProcessEngine:
    """An engine that will load `wants` in a process of its own."""
    command = [sys.executable, "-m", "tunesmith.cli.engine", str(os.getpid())]
    # Not the key that clients send: it is none of the engine's business.
    env = {name: value for name, value in os.environ.items() if name != "TUNESMITH_API_KEY"}
    return ProcessEngine(command, asdict(wants), max_waiting=wants.max_waiting, env=env)


def _pool(wants: EngineWants, replicas: int) -> Pool:
    shared = replace(wants, threads=_threads_each(wants.threads, replicas))
    return Pool(lambda: process_engine(shared), replicas)


def _threads_each(wanted: int | Literal["auto"], replicas: int) -> int | Literal["auto"]:
    """The cores of this machine are shared out among the engines, unless the user has said how many."""
    if wanted != "auto" or replicas == 1 or os.environ.get("OMP_NUM_THREADS"):
        return wanted
    return max(1, physical_cores() // replicas)
