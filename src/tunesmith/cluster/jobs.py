"""Ray Jobs: a command that runs in a Ray cluster, whether or not whoever submitted it is still there."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster.ray_train import load_ray
from tunesmith.core.errors import MissingExtra, TunesmithError, UserError

HEADERS = "RAY_JOB_HEADERS"
EXAMPLE = f"""export {HEADERS}='{{"Authorization": "Bearer TOKEN"}}'"""
ADDRESS = "RAY_API_SERVER_ADDRESS"
# Between the stop signal and SIGKILL. Ray's own 3 s are too few for a driver that ends its workers.
GRACE_S = 60
# SIGTERM, for a Ray that was started in the background of a shell hands on that it ignores SIGINT.
ENVIRONMENT = {
    "RAY_JOB_STOP_SIGNAL": "SIGTERM",
    "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S),
    "RAY_USAGE_STATS_ENABLED": "0",
}
# They tell each file that they send.
TALKATIVE = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
CONNECT_S, ANSWER_S, AGAIN_S = 10, 120, 1
ENDED = ("stopped", "succeeded", "failed")


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it. Times are seconds since the epoch, by the cluster's clock.

    state: pending, running, stopped, succeeded or failed. exit_code: of a command that has ended by itself.
    """

    id: str
    state: str
    command: str
    metadata: Mapping[str, str]
    started_s: float
    ended_s: float | None = None
    exit_code: int | None = None
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Jobs:
    """The jobs of the Ray cluster whose dashboard is at `address`, a URL.

    Every method raises UserError when no cluster answers there or it refuses; TunesmithError for its own
    faults.
    """

    def __init__(self, address: str) -> None:
        """Connect. Raises MissingExtra without Ray."""
        self.address = address
        with self._told():
            self._client = _client(address)

    def submit(
        self, job_id: str, command: str, folder: Path, metadata: dict[str, str], env: dict[str, str]
    ) -> None:
        """Run a shell command in a copy of `folder`, with the variables `env`, on the head of the cluster."""
        with self._told():
            self._client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": ENVIRONMENT | env},
                metadata=metadata,
            )

    def all(self) -> list[Job]:
        """Every job that was submitted, the newest first; the cluster forgets them when it ends."""
        with self._told():
            found = [_job(info) for info in self._client.list_jobs() if info.submission_id]
        return sorted(found, key=lambda job: job.started_s, reverse=True)

    def get(self, job_id: str) -> Job:
        with self._told():
            return _job(self._client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with self._told():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Give `show` the job's log, piece by piece, until it has ended; returns it then.

        A connection that breaks on the way is made anew.
        """
        shown = 0
        while True:
            shown = self._tail(job_id, show, shown)
            job = self.get(job_id)
            if job.ended:
                show(self.log(job_id)[shown:])
                return job
            time.sleep(AGAIN_S)

    def stop(self, job_id: str) -> None:
        """Ask the job to end: SIGTERM, and SIGKILL after GRACE_S. It has not ended yet on return."""
        with self._told():
            self._client.stop_job(job_id)

    def _tail(self, job_id: str, show: Callable[[str], None], shown: int) -> int:
        """Show what the log has beyond its first `shown` characters, while it grows; how many it has then."""
        seen = 0

        async def read() -> None:
            nonlocal seen, shown
            async for text in self._client.tail_job_logs(job_id):
                seen += len(text)
                if seen > shown:
                    show(text[-(seen - shown) :])
                    shown = seen

        with self._told(broken=True):
            asyncio.run(read())
        return shown

    @contextmanager
    def _told(self, *, broken: bool = False) -> Iterator[None]:
        """Ray's errors, in one sentence. broken: those of a connection that was there are passed over."""
        try:
            yield
        except (MissingExtra, UserError):
            raise
        except Exception as error:
            fault = _fault(error, self.address)
            if fault is None:
                raise
            if not broken:
                raise fault from error


def _client(address: str) -> Any:
    load_ray()
    try:
        import aiohttp  # noqa: F401
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise MissingExtra("ray[default]", "cluster") from error

    class Client(JobSubmissionClient):
        """Ray's, which would wait for minutes where nothing answers."""

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": (CONNECT_S, ANSWER_S)} | kwargs)

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    headers = _headers(os.environ.get(HEADERS))
    with _named(address):
        return Client(address, headers=headers)


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Name the cluster in the environment too: for Ray that counts more than an argument."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        if before is not None:
            os.environ[ADDRESS] = before


def _headers(text: str | None) -> dict[str, str] | None:
    """The HTTP headers that RAY_JOB_HEADERS holds. Its value is a secret: no error shows it."""
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"${HEADERS}: is no JSON object of texts", hint=EXAMPLE)
    return found


def _job(info: Any) -> Job:
    return Job(
        id=info.submission_id,
        state=info.status.value.lower(),
        command=info.entrypoint,
        metadata=info.metadata or {},
        started_s=(info.start_time or 0) / 1000,
        ended_s=info.end_time / 1000 if info.end_time else None,
        exit_code=info.driver_exit_code,
        message=info.message or "",
    )


def _fault(error: Exception, address: str) -> TunesmithError | None:
    """What one of Ray's errors means; None: it is not one that Ray makes."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, AuthenticationError) or status in (401, 403):
        return UserError(
            f"{address}: the cluster refuses who is asking",
            hint=f"{EXAMPLE}; or RAY_AUTH_MODE=token and $RAY_AUTH_TOKEN",
        )
    text = str(error).strip()
    if isinstance(error, OSError | aiohttp.ClientError):
        return UserError(
            f"{address}: no Ray cluster answers there: {_reason(error)}",
            hint="start one: ray start --head --dashboard-host 0.0.0.0; name another: "
            f"--cluster http://HEAD:8265, or ${ADDRESS}",
        )
    if isinstance(error, KeyError | TypeError | ValueError) or text.startswith("Version check returned 404"):
        return UserError(
            f"{address}: what answers there is not Ray's dashboard: {_reason(error)}",
            hint="its address: --cluster http://HEAD:8265",
        )
    if isinstance(error, RuntimeError):
        return TunesmithError(f"{address}: the Ray cluster says: {_last_line(text)}")
    return None


def _reason(error: Exception) -> str:
    """Of an error without a good text: what kind it is."""
    text = str(error).strip()
    if text.startswith("Failed to connect to Ray"):
        return "no connection"
    return text.splitlines()[0][:200] if text else type(error).__name__


def _last_line(text: str) -> str:
    """Ray sends whole tracebacks, whose last line tells."""
    return text.splitlines()[-1].strip()[:500] if text else "nothing"
