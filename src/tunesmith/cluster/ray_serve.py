"""Ray Serve: replicas of an application on a Ray cluster, and a front before them that clients ask."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.cluster.ray_train import load_ray
from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.progress import say

APP, FRONT = "tunesmith", "tunesmith-front"
REPLICA = "Replica"
SCALE = "scale"
ROUTER = "tunesmith.cluster.prefix_router.PrefixRouter"
# A replica that ends has to be seen to have ended, by health checks, before another takes its place.
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 3.0, 30.0
ANSWER_S = 30.0
# Tries of a replica that does not come up, before the deployment has failed.
STARTS = 2
NO_REPLICA = "no replica of the model is running; try again soon"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """At least `least` and at most `most` replicas, each with `cpus` and `gpus` of one node and with the
    variables `env`.

    target: requests under way at a replica for which another is added, where there may be more.
    max_requests: that one replica takes. grace_s: for those it has when it is to end.
    """

    least: int
    most: int
    cpus: float
    gpus: int
    env: Mapping[str, str]
    target: float
    max_requests: int
    grace_s: float


def deploy(replica: type, sent: Mapping[str, Any], scale: Scale) -> None:
    """Have replicas, made as `replica(sent)`; where there are some of an earlier call, one after the other is
    replaced, each after its requests have been answered. Returns when all are ready; inside `connected`.

    Raises RunFailed with Ray's reason when they do not start; then those of before are there again.
    """
    before = _before()
    try:
        _run(_bound(replica, sent, scale), APP, None)
    except RunFailed as error:
        if before is None:
            raise
        say(f"{error.what}; the replicas of before are started again")
        _run(_bound(replica, before, Scale(**before[SCALE])), APP, None)
        raise


def _bound(replica: type, sent: Mapping[str, Any], scale: Scale) -> Any:
    serve = _serve()
    count: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        count = {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "initial_replicas": scale.least,
                "target_ongoing_requests": scale.target,
                "upscale_delay_s": 5,
                "downscale_delay_s": 120,
            }
        }
    made = serve.deployment(
        replica,
        name=REPLICA,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus}
        | ({"runtime_env": {"env_vars": dict(scale.env)}} if scale.env else {}),
        max_ongoing_requests=scale.max_requests,
        graceful_shutdown_timeout_s=scale.grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=STARTS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        request_router_config=serve.config.RequestRouterConfig(request_router_class=ROUTER),
        **count,
    )
    return made.bind(dict(sent) | {SCALE: asdict(scale)})


def _before() -> dict[str, Any] | None:
    """What the replicas that run now were made of; None where there are none."""
    if not replicas().get("RUNNING"):
        return None
    handle: Any = _serve().get_deployment_handle(REPLICA, APP)
    try:
        return dict(handle.describe.remote().result(timeout_s=ANSWER_S)["sent"])
    except Exception as error:  # whatever it is: it must not stand in the way of a better one
        say(f"warning: the replicas that run do not tell what they are: {error}")
        return None


def open_front(build: Callable[[], Any], *, host: str, port: int, max_requests: int) -> str:
    """Have the ASGI application that `build` makes answer at host:port of the head node; the URL.

    One that answers there already stays as it is. Raises UserError when Ray Serve listens elsewhere.
    """
    serve = _serve()
    begin(host, port)
    app = serve.status().applications.get(FRONT)
    if app is None or app.status != "RUNNING":
        front = serve.deployment(
            serve.ingress(build)(type("Front", (), {})),
            name="Front",
            num_replicas=1,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=max_requests,
        )
        _run(front.bind(), FRONT, "/")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def begin(host: str, port: int) -> None:
    """Have Ray Serve listen at host:port of the head node. Raises UserError where it listens elsewhere."""
    serve = _serve()
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    # Ray keeps the address of its first start, and says so only in a log.
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    at = client.http_config
    if (at.host, at.port) != (host, port):
        raise UserError(
            f"--host {host} --port {port}: Ray Serve on this cluster listens on {at.host}:{at.port} already",
            hint=f"--host {at.host} --port {at.port}, or end it first: serve shutdown",
        )


def stop() -> bool:
    """End what `deploy` and `open_front` began, and Ray Serve where it has nothing else; whether there was
    something."""
    serve = _serve()
    there = [name for name in (FRONT, APP) if name in serve.status().applications]
    for name in there:
        serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()
    return bool(there)


def replicas() -> dict[str, int]:
    """How many replicas are in each state: RUNNING, STARTING and the like."""
    app = _serve().status().applications.get(APP)
    found = app.deployments.get(REPLICA) if app else None
    return (
        {str(getattr(state, "value", state)): n for state, n in found.replica_states.items()} if found else {}
    )


async def answers(call: Any, lost: Callable[[str], Exception]) -> AsyncIterator[Any]:
    """What a replica's `answer(call)` yields; to be asked in a deployment.

    Raises lost(why) when it has died, or when there is none.
    """
    from ray import serve
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    handle: Any = serve.get_deployment_handle(REPLICA, APP)
    response = handle.options(stream=True, method_name="answer").remote(call)
    done = False
    try:
        async for part in response:
            yield part
        done = True
    except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
        done = True
        raise lost(
            NO_REPLICA if not isinstance(error, RayActorError) else "it was killed or has crashed"
        ) from None
    except RayTaskError:
        done = True
        raise
    finally:
        if not done:
            response.cancel()


async def answers_of_all(method: str, *args: Any) -> list[Any]:
    """What `method` of each replica returns, without those that fail; to be asked in a deployment."""
    from ray import serve

    handle: Any = serve.get_deployment_handle(REPLICA, APP)
    found = await handle.broadcast(method, *args).results_async(timeout_s=ANSWER_S, return_exceptions=True)
    return [answer for answer in found if not isinstance(answer, BaseException)]


def replica_name() -> str:
    """Of the replica that asks, as 'serve status' and Ray's logs have it."""
    return str(_serve().get_replica_context().replica_id.unique_id)


def _serve() -> Any:
    load_ray()
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells each of its steps
    return serve


def _run(app: Any, name: str, route: str | None) -> None:
    """Deploy, and wait until it is there."""
    try:
        _serve().run(app, name=name, route_prefix=route)
    except RuntimeError as error:
        raise RunFailed(
            f"Ray Serve: {name} did not start: {_why(name) or error}",
            hint="'ray status' tells what the cluster has room for, 'serve status' of each replica",
        ) from error


def _why(name: str) -> str:
    """The last line that Ray has for an application that failed."""
    app = _serve().status().applications.get(name)
    texts = [app.message, *(found.message for found in app.deployments.values())] if app else []
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line]
    return (told or lines or [""])[-1]
