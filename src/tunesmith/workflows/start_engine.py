"""The engine that `serve` answers with: in processes of its own or in this one, and what it has loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.model.hardware import physical_cores, pick_device
from tunesmith.serve.engine import Engine, EngineStatus
from tunesmith.serve.pool import Pool
from tunesmith.workflows.engine_process import process_engine
from tunesmith.workflows.engines import Choice, EngineName, choose_engine
from tunesmith.workflows.open_engine import EngineWants, open_engine
from tunesmith.workflows.open_program import open_program
from tunesmith.workflows.served_models import Facts


class StartedEngine:
    """An engine on its way: `start` it in one thread, `stop` it from any.

    Raises UserError for an engine that is not installed here, or does not do what is asked.
    """

    def __init__(
        self, wants: EngineWants, *, engine: EngineName | Literal["auto"], in_process: bool, replicas: int
    ) -> None:
        self._wants, self._replicas = wants, replicas
        self._choice = _choice(wants, engine, in_process=in_process, replicas=replicas)
        alone = in_process or self._choice.engine != "local"
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
            if self._choice.engine != "local":
                say(f"{self._choice.engine} answers: {self._choice.why}")
                return self._start_program()
            self.engine, plain = open_engine(self._wants, stopped=lambda: self._stopped)
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
    choice = choose_engine(engine, wants.path, device=pick_device(wants.device).type)
    if choice.engine != "local" and asked and asked[0] != "--merge":
        raise UserError(f"{asked[0]}: is for our own engine", hint="give --engine local, or leave it out")
    return choice


def _pool(wants: EngineWants, replicas: int) -> Pool:
    shared = replace(wants, threads=_threads_each(wants.threads, replicas))
    return Pool(lambda: process_engine(shared), replicas)


def _threads_each(wanted: int | Literal["auto"], replicas: int) -> int | Literal["auto"]:
    """The cores of this machine are shared out among the engines, unless the user has said how many."""
    if wanted != "auto" or replicas == 1 or os.environ.get("OMP_NUM_THREADS"):
        return wanted
    return max(1, physical_cores() // replicas)
