"""A real S3 server (moto's) on a free port of 127.0.0.1, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.core.net import free_port

BUCKET = "tunes"


@dataclass(frozen=True)
class ObjectStore:
    """A server with one bucket; `env` is what a process needs to use it."""

    endpoint: str
    env: dict[str, str]

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"


@contextmanager
def serve_objects(home: Path) -> Iterator[ObjectStore]:
    """The server, for as long as the block; nothing is kept. home: a folder without credentials of a user."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with (home / "moto.log").open("wb") as log:
        args = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(args, stdout=log, stderr=log)
    try:
        store = ObjectStore(endpoint, _env(endpoint, home))
        _make_bucket(store, process)
        yield store
    finally:
        process.terminate()
        process.wait()


def _env(endpoint: str, home: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
    }


def _make_bucket(store: ObjectStore, process: subprocess.Popen[bytes]) -> None:
    from botocore.exceptions import EndpointConnectionError
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    end = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except EndpointConnectionError:
            assert process.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.05)


def use(store: ObjectStore, patch: pytest.MonkeyPatch) -> None:
    """Let this process, and those that it starts, use the store."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    set_env(patch, store.env)


def set_env(patch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    """Set variables, and forget the connections made with others, which a process keeps."""
    from s3fs import S3FileSystem

    for name, value in env.items():
        patch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
