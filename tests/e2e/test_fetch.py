"""tunesmith fetch against a real HTTP server that answers as the hub does, each call its own process."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import COMMIT, Hub, serve_hub

NAME = "owner/tiny"


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    repo = Path(shutil.copytree(tiny, tmp_path / "repo"))
    (repo / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "pytorch_model.bin").write_bytes(b"never wanted")
    (repo / "consolidated.safetensors").write_bytes(b"the same weights again, for another program")
    with serve_hub({NAME: repo}) as server:
        yield server


@pytest.fixture
def fetch(cli: Any, tmp_path: Path) -> Any:
    def run(*args: str, ok: bool = True, **env: str) -> dict[str, Any]:
        own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"} | env
        done = cli("fetch", *args, "--json", env=own)
        assert (done.returncode == 0) is ok, done.stderr
        return json.loads(done.stdout) | {"code": done.returncode, "stderr": done.stderr}

    return run


def dead_endpoint() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_fetch_brings_safetensors_with_hashes_and_commit(hub: Hub, fetch: Any, tiny: Path) -> None:
    found = fetch(NAME, HF_ENDPOINT=hub.url)
    assert (found["source"], found["revision"]) == ("hub", COMMIT)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= found[
        "files"
    ].keys()
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & found["files"].keys()
    assert not any(".bin" in request or "consolidated" in request for request in hub.requests)
    sha256 = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert found["files"]["model.safetensors"]["sha256"] == sha256


def test_second_endpoint_after_the_first_is_dead(hub: Hub, fetch: Any) -> None:
    dead = dead_endpoint()
    found = fetch(NAME, "--endpoint", dead, "--endpoint", hub.url)
    assert found["revision"] == COMMIT
    assert dead in found["stderr"]


def test_recipe_names_endpoint_and_revision(hub: Hub, fetch: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {NAME}, revision: v1, endpoint: ['{hub.url}']}}\ndata: {{sources: [{{path: rows.jsonl}}]}}\n"
    )
    found = fetch(str(recipe), "--lock", str(tmp_path / "lock.json"))
    lock = json.loads((tmp_path / "lock.json").read_text())
    assert lock["model"]["revision"] == COMMIT == found["revision"]
    assert lock["model"]["files"] == found["files"]


def test_offline_takes_the_cache_and_asks_nobody(hub: Hub, fetch: Any) -> None:
    first = fetch(NAME, HF_ENDPOINT=hub.url)
    hub.requests.clear()
    assert fetch(NAME, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")["files"] == first["files"]
    assert fetch(NAME, "--offline", HF_ENDPOINT=hub.url)["files"] == first["files"]
    assert fetch(NAME, "--revision", COMMIT, HF_ENDPOINT=hub.url)["files"] == first["files"]
    assert hub.requests == []


def test_offline_without_a_copy_says_how_to_get_one(hub: Hub, fetch: Any) -> None:
    error = fetch(NAME, "--offline", ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 2
    assert "offline mode is on" in error["error"]["what"]
    assert f"tunesmith fetch {NAME}" in error["error"]["hint"]


def test_dead_network_names_every_endpoint_and_a_remedy(fetch: Any) -> None:
    first, second = dead_endpoint(), dead_endpoint()
    error = fetch(NAME, "--endpoint", first, "--endpoint", second, ok=False)
    assert error["code"] == 1
    assert first in error["error"]["what"] and second in error["error"]["what"]
    assert "mirror" in error["error"]["hint"]


def test_dead_network_falls_back_to_the_cache_and_says_so(hub: Hub, fetch: Any) -> None:
    first = fetch(NAME, HF_ENDPOINT=hub.url)
    again = fetch(NAME, HF_ENDPOINT=dead_endpoint())
    assert again["files"] == first["files"]
    assert "the copy in the cache is used" in again["stderr"]


def test_cut_download_is_resumed(hub: Hub, fetch: Any, tiny: Path) -> None:
    hub.fail_after = 1_000_000
    found = fetch(NAME, HF_ENDPOINT=hub.url)
    sha256 = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert found["files"]["model.safetensors"]["sha256"] == sha256
    assert sum(request.startswith("GET") and "model.safetensors" in request for request in hub.requests) == 2


def test_file_damaged_on_its_way_is_not_kept(hub: Hub, fetch: Any) -> None:
    hub.corrupt = True
    error = fetch(NAME, ok=False, HF_ENDPOINT=hub.url)
    assert "damaged on its way" in error["error"]["what"]
    hub.corrupt = False
    assert fetch(NAME, HF_ENDPOINT=hub.url)["revision"] == COMMIT


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("owner/none", None, "no such model"), (NAME, "v9", "no such revision")],
)
def test_unknown_model_or_revision(
    hub: Hub, fetch: Any, name: str, revision: str | None, message: str
) -> None:
    error = fetch(name, *(["--revision", revision] if revision else []), ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 2
    assert message in error["error"]["what"]


def test_gated_model(hub: Hub, fetch: Any) -> None:
    hub.gated.add(NAME)
    error = fetch(NAME, ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 2
    assert "gated" in error["error"]["what"] and "HF_TOKEN" in error["error"]["hint"]


@pytest.mark.parametrize(
    ("rename", "message"), [("pytorch_model.bin", "pickles"), ("m.gguf", "GGUF files only")]
)
def test_repository_without_safetensors(hub: Hub, fetch: Any, rename: str, message: str) -> None:
    repo = hub.repos[NAME]
    (repo / "pytorch_model.bin").unlink()
    (repo / "model.safetensors").rename(repo / rename)
    error = fetch(NAME, ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 2
    assert message in error["error"]["what"]
    assert not any(request.startswith("GET") and "/resolve/" in request for request in hub.requests)


def test_text_output(cli: Any, tiny: Path) -> None:
    done = cli("fetch", str(tiny))
    assert done.returncode == 0, done.stderr
    assert str(tiny) in done.stdout and "model.safetensors" in done.stdout
