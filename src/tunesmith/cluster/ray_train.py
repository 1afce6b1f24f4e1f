"""Ray Train: a function in several workers of a Ray cluster, placed, started again and resized by Ray."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGINT
from typing import Any

from tunesmith.core.errors import Interrupted, MissingExtra, RunFailed, UserError
from tunesmith.core.stop import StopRequest

RETRIES = 3
CONNECT_S = 10.0
LISTEN_S = 0.5
# Both are read by Ray while it is imported.
SETTINGS = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
ADDRESS = re.compile(r"auto|(ray://)?[^\s/:]+:\d+")


@dataclass(frozen=True)
class Workers:
    """At least `least` and at most `most` workers, each with a CPU and, if `gpu`, a GPU."""

    least: int
    most: int
    gpu: bool = False

    @property
    def text(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} worker{'s' * (self.most > 1)} with a {'GPU' if self.gpu else 'CPU'} each"


def workers_of(text: str) -> tuple[int, int]:
    """(least, most) of "4" or "2:8". Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    least = int(found[1]) if found else 0
    most = int(found[2] or found[1]) if found else 0
    if not 1 <= least <= most:
        raise UserError(
            f"--workers: '{text}' is not a number of workers", hint="4, or 2:8 for at least 2 and at most 8"
        )
    return least, most


def is_ray(address: str) -> bool:
    """Whether `--cluster` names a Ray cluster and not a file."""
    return ADDRESS.fullmatch(address) is not None


@dataclass(frozen=True)
class Nodes:
    """What a Ray cluster has now: living nodes, CPUs and GPUs."""

    count: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str, *, show: bool = True) -> Iterator[Nodes]:
    """As a driver of the Ray cluster at `auto` (RAY_ADDRESS, or the one on this machine), HOST:PORT or
    ray://HOST:PORT; what its workers print goes to stderr, if `show`. All that the driver began ends with it,
    but for what Ray Serve has deployed.

    Raises MissingExtra without Ray, UserError when there is no cluster or one of another version.
    """
    ray = load_ray()
    _check_reachable(address)
    # Ray prints what workers wrote to their stdout on ours, which belongs to --json.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address, log_to_driver=show, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError) as error:
            ray.shutdown()
            raise _unreachable(address, str(error).strip().splitlines()[0]) from error
        try:
            alive, has = [node for node in ray.nodes() if node["Alive"]], ray.cluster_resources()
            yield Nodes(len(alive), int(has.get("CPU", 0)), int(has.get("GPU", 0)))
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise UserError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise _unreachable(address, str(error.strerror or error)) from None


def _unreachable(address: str, why: str) -> UserError:
    return UserError(
        f"cannot reach a Ray cluster at '{address}': {why}",
        hint="'ray status' on one of its machines tells whether it runs; from outside it is "
        "ray://HEAD:10001; Python and Ray must have the same versions here and there",
    )


def load_ray() -> Any:
    """The package ray. Raises MissingExtra."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "cluster") from error
    return ray


class Ledger:
    """An actor that outlives the workers: what their first attempt found, why no other can succeed, and
    whether they have been asked to stop."""

    def __init__(self) -> None:
        self._first: list[Any] = []
        self._fault: dict[str, Any] | None = None
        self._stop: int | None = None

    def first(self, found: Any) -> Any:
        """The value of the first call."""
        self._first = self._first or [found]
        return self._first[0]

    def give_up(self, fault: dict[str, Any]) -> None:
        self._fault = self._fault or fault

    def fault(self) -> dict[str, Any] | None:
        return self._fault

    def stop(self, signal_number: int) -> None:
        self._stop = self._stop or signal_number

    def asked_to_stop(self) -> int | None:
        """The signal that asked."""
        return self._stop


def ask(ledger: Any, question: str, *values: Any) -> Any:
    """In a worker: what a method of the run's Ledger returns."""
    return load_ray().get(getattr(ledger, question).remote(*values))


def listen(ledger: Any, stop: Callable[[int], None]) -> None:
    """In a worker: call `stop` with the signal that has asked the training to stop, as soon as one has."""

    def wait() -> None:
        with contextlib.suppress(Exception):  # the driver is gone, and soon so is this worker
            while (number := ask(ledger, "asked_to_stop")) is None:
                time.sleep(LISTEN_S)
            stop(number)

    threading.Thread(target=wait, name="stop", daemon=True).start()


def train_together(
    part: Callable[[dict[str, Any]], dict[str, Any]],
    sent: dict[str, Any],
    workers: Workers,
    *,
    name: str,
    retries: int = RETRIES,
) -> dict[str, Any]:
    """What `part(sent)` returns in the worker of rank 0; to be called inside `connected`.

    Every worker has RANK and the like in its environment, a gloo group that has met, and the run's Ledger as
    sent["ledger"]. When a worker dies or raises, Ray ends the others and starts all again, `retries` times.
    Ctrl-C and SIGTERM are handed to those who `listen`.
    Raises RunFailed after the retries, Interrupted by a second Ctrl-C.
    """
    ray = load_ray()
    ledger = ray.remote(num_cpus=0, scheduling_strategy=_here(ray))(Ledger).remote()
    # Ray's own notes of this run. Checkpoints are ours: none is reported to Ray.
    notes = tempfile.mkdtemp(prefix="tunesmith-ray-")
    try:
        trainer = _trainer(part, sent | {"ledger": ledger}, workers, notes, name, retries)
        value: dict[str, Any] = _in_thread(trainer.fit, ledger.stop.remote).return_value
        return value
    except ray.train.TrainingFailedError as error:
        raise RunFailed(
            f"{name}: {_why(error)}", hint="the same command goes on from the last checkpoint"
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(
            SIGINT, "stopped; Ray ends the workers", hint="the same command goes on from the last checkpoint"
        ) from None
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def _here(ray: Any) -> Any:
    """The driver's node: what lies there is lost only when the driver is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _trainer(
    part: Callable[..., Any], sent: dict[str, Any], workers: Workers, notes: str, name: str, retries: int
) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    train: Any = ray.train  # annotated as its first version, which has other arguments
    count = workers.most if workers.least == workers.most else (workers.least, workers.most)
    return TorchTrainer(
        part,
        train_loop_config=sent,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if workers.gpu else {}),
            placement_strategy="PACK" if workers.gpu else "SPREAD",
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=notes,
            failure_config=train.FailureConfig(max_failures=retries, controller_failure_limit=retries),
        ),
    )


def _in_thread(call: Callable[[], Any], asked: Callable[[int], object]) -> Any:
    """What `call` returns; `asked` gets the signal that asks to stop.

    In the main thread Ray would take Ctrl-C for itself, and end with code 0.
    Raises KeyboardInterrupt by a second Ctrl-C.
    """
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((call(), None))
        except BaseException as error:
            box.append((None, error))

    with StopRequest("{}: asking the workers to save and stop; again ends them") as stop:
        thread = threading.Thread(target=run, name="ray-train", daemon=True)
        thread.start()
        handed_on = False
        while thread.is_alive():
            thread.join(0.2)
            if stop.signal_number is not None and not handed_on:
                handed_on = True
                asked(stop.signal_number)
    value, error = box[0]
    if error is not None:
        raise error
    return value


def _why(error: BaseException) -> str:
    """Each rank's own reason in a line; the first of them has no other's death as its cause."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    lines = [f"rank {rank}: {_last_words(failure)}" for rank, failure in sorted(failures.items())]
    lines.sort(key=lambda line: "connection to another process was lost" in line)
    return "\n".join(lines) or _last_words(error)


def _last_words(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
