"""Serve a model on a Ray cluster: the same gateway, in replicas that Ray Serve places and replaces."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.cluster import ray_serve
from tunesmith.cluster.ray_serve import Scale
from tunesmith.cluster.ray_train import Nodes, connected
from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.store import is_url
from tunesmith.recipe.serving import Serve
from tunesmith.workflows.engines import LLAMA_SERVER, VLLM, VLLM_ARGS, vllm_args
from tunesmith.workflows.ray_replica import Replica, front
from tunesmith.workflows.serve_settings import Deployment, ServeOptions, deployment
from tunesmith.workflows.vllm_memory import vllm_options

# What says here which programs answer, and how, holds for every replica.
PASSED_ON = (VLLM, VLLM_ARGS, LLAMA_SERVER)


def serve_on_ray(
    path: str, options: ServeOptions, address: str, *, most: int | None = None
) -> dict[str, Any]:
    """Have replicas of the model or run answer, and return: they stay when this program has ended.

    Replicas that are there already are replaced one after the other by those of this call: a rolling update.
    most: replicas that there may be when requests pile up; as many as `replicas` says without.
    Returns url, replicas and most. Raises UserError for what cannot be, RunFailed when they do not start:
    those of before are started again then.
    """
    wanted = deployment(path, options)
    least, most = count_of(wanted.settings, most)
    sent = sent_to(path, wanted, options)
    with connected(address, show=False) as nodes:
        scale = scale_of(wanted, options, nodes, least, most)
        say(f"Ray: {nodes.count} nodes, {nodes.cpus} CPUs, {nodes.gpus} GPUs; {_text(scale)}")
        ray_serve.begin(wanted.settings.host, wanted.settings.port)
        ray_serve.deploy(Replica, sent, scale)
        url = ray_serve.open_front(
            front,
            host=wanted.settings.host,
            port=wanted.settings.port,
            max_requests=wanted.settings.max_requests * most,
        )
    say(f"{path} answers at {url}/v1  (tunesmith serve --cluster {address} --stop ends it)")
    return {"url": url, "replicas": least, "max_replicas": most}


def stop_on_ray(address: str) -> bool:
    """End the replicas and their front; whether there were any."""
    with connected(address, show=False):
        return ray_serve.stop()


def count_of(settings: Serve, most: int | None) -> tuple[int, int]:
    if settings.tls_cert:
        raise UserError(
            "--tls-cert with --cluster: Ray Serve answers over http", hint="let a proxy before it do that"
        )
    if settings.port == 0:
        raise UserError("--port 0 with --cluster: clients need to know the port", hint="--port 8000")
    if most is not None and most < settings.replicas:
        raise UserError(
            f"--max-replicas {most}: --replicas says {settings.replicas}",
            hint=f"--max-replicas {settings.replicas} or more",
        )
    return settings.replicas, most or settings.replicas


def sent_to(path: str, wanted: Deployment, options: ServeOptions) -> dict[str, Any]:
    """What every replica is told. Paths are named in full: a replica starts in a folder of its own."""
    settings = dict(options.settings) | {"replicas": 1}
    if wanted.settings.keys_file:
        settings["keys_file"] = _in_full(wanted.settings.keys_file)
    elif wanted.keys_file:
        settings["keys_file"] = str(wanted.keys_file)
    else:
        settings["keys_file"] = "none"
    if wanted.settings.api_key:
        settings["api_key"] = wanted.settings.api_key
    adapters = [_adapter_in_full(text) for text in options.adapters]
    # Whether other machines may ask without a key has been judged here.
    told = replace(options, settings=settings, adapters=adapters, allow_open=True)
    return {"path": _in_full(path), "options": asdict(told)}


def _in_full(path: str) -> str:
    """A path of this machine from its root; a URL or a model's name as it is."""
    here = Path(path).expanduser()
    return str(here.absolute()) if not is_url(path) and here.exists() else path


def _adapter_in_full(text: str) -> str:
    name, equals, folder = text.partition("=")
    return f"{name}={_in_full(folder)}" if equals and "/" not in name else _in_full(text)


def scale_of(wanted: Deployment, options: ServeOptions, nodes: Nodes, least: int, most: int) -> Scale:
    """Raises UserError where the cluster could never have room for a replica."""
    gpus = _gpus(options.device, nodes)
    cpus = 1.0 if gpus or options.threads == "auto" else float(options.threads)
    need, has, what = (gpus * least, nodes.gpus, "GPUs") if gpus else (cpus * least, nodes.cpus, "CPUs")
    if need > has:
        say(f"warning: {need:g} {what} are needed and the cluster has {has}; waiting until it has grown")
    settings = wanted.settings
    return Scale(
        least=least,
        most=most,
        cpus=cpus,
        gpus=gpus,
        env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        target=max(1.0, settings.max_concurrent * 0.75),
        max_requests=settings.max_requests,
        grace_s=settings.grace_s,
    )


def _gpus(device: Literal["auto", "cpu", "cuda"], nodes: Nodes) -> int:
    """Of one replica: more than one where vLLM is to spread the model over them, all on one node."""
    if device == "cuda" and nodes.gpus == 0:
        raise UserError("--device cuda, but the Ray cluster has no GPU", hint="--device auto")
    if device == "cpu" or nodes.gpus == 0:
        return 0
    spread = vllm_options("auto", vllm_args())
    return spread.tensor_parallel * spread.pipeline_parallel


def _text(scale: Scale) -> str:
    count = str(scale.least) if scale.least == scale.most else f"{scale.least} to {scale.most}"
    what = f"{scale.gpus} GPU{'s' * (scale.gpus > 1)}" if scale.gpus else f"{scale.cpus:g} CPU"
    return f"{count} replica{'s' * (scale.most > 1)} with {what} each"
