"""tunesmith fetch against a real HTTP server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import COMMIT, Fault, Hub, serve_hub
from tests.repos import contents, make_model, wanted
from tunesmith.cli.main import main

NAME = "owner/tiny"
ROWS = "owner/rows"
WEIGHTS = "model.safetensors"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_model(tmp_path / "repo")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for split, count in (("train", 12), ("test", 3)):
        columns = {
            "instruction": [f"{split} question {n}" for n in range(count)],
            "output": ["answer"] * count,
        }
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "old.pkl").write_bytes(b"never wanted")
    return folder


@pytest.fixture
def hub(repo: Path, rows: Path) -> Iterator[Hub]:
    with serve_hub({NAME: repo}, {ROWS: rows}) as server:
        yield server


@pytest.fixture
def online(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def fetch(online: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line, called in this process: fifty processes would take a minute."""

    def run(*args: str, ok: bool = True, **env: str) -> dict[str, Any]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            for name in ("HF_TOKEN", "HF_ENDPOINT"):
                patch.delenv(name, raising=False)
            for name, value in (online | env).items():
                patch.setenv(name, value)
            main(["fetch", *args, "--json"])
        out, err = capsys.readouterr()
        assert (end.value.code == 0) is ok, err
        return json.loads(out) | {"code": end.value.code, "stderr": err}

    return run


def dead_endpoint() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_fetch_brings_safetensors_with_hashes_and_commit(hub: Hub, fetch: Any, repo: Path) -> None:
    found = fetch(NAME, HF_ENDPOINT=hub.url)
    assert (found["source"], found["revision"]) == ("hub", COMMIT)
    assert contents(Path(found["folder"])) == wanted(repo)
    assert not any(".bin" in request or "consolidated" in request for request in hub.requests)
    entry = found["files"][WEIGHTS]
    content = (repo / WEIGHTS).read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_second_endpoint_after_the_first_is_dead(hub: Hub, fetch: Any) -> None:
    dead = dead_endpoint()
    found = fetch(NAME, "--endpoint", dead, "--endpoint", hub.url)
    assert found["revision"] == COMMIT
    assert dead in found["stderr"]


@pytest.mark.parametrize("form", ["argument", "option"])
def test_recipe_gets_all_it_needs_and_writes_the_lock(
    hub: Hub, fetch: Any, tmp_path: Path, rows: Path, form: str
) -> None:
    recipe, lock = tmp_path / "r.yaml", tmp_path / "lock.json"
    recipe.write_text(
        f"model: {{path: {NAME}, revision: v1, endpoint: ['{hub.url}']}}\n"
        f"data: {{sources: [{{path: {ROWS}}}, {{path: rows.jsonl}}, {{path: {ROWS}, split: test}}]}}\n"
    )
    args = [str(recipe)] if form == "argument" else ["--recipe", str(recipe)]
    plan = fetch(*args, "--dry-run")
    assert plan["missing_bytes"] == plan["bytes"] > 300_000 and hub.served == []
    found = fetch(*args, "--lock", str(lock))
    written = json.loads(lock.read_text())
    assert written["model"]["revision"] == COMMIT == found["revision"]
    assert written["model"]["files"] == found["files"]
    (data,) = written["datasets"]
    assert (data["name"], data["revision"]) == (ROWS, COMMIT)
    brought = {name: content for name, content in contents(rows).items() if name != "old.pkl"}
    assert contents(Path(data["folder"])) == brought and data["files"].keys() == brought.keys()


@pytest.mark.parametrize("args", [["--dataset", ROWS], [f"datasets/{ROWS}"], [f"dataset:{ROWS}"]])
def test_data_set_by_option_or_prefix(hub: Hub, fetch: Any, args: list[str]) -> None:
    found = fetch(*args, HF_ENDPOINT=hub.url)
    assert (found["dataset"], found["revision"]) == (ROWS, COMMIT)
    assert "data/train-00000-of-00001.parquet" in found["files"] and "old.pkl" not in found["files"]
    assert "old.pkl" in found["stderr"]


def test_fetched_data_set_is_read_offline(
    hub: Hub, fetch: Any, cli: Any, tmp_path: Path, smol: Path, online: dict[str, str]
) -> None:
    fetch("--dataset", ROWS, HF_ENDPOINT=hub.url)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: {smol}}}\ndata: {{sources: [{{path: {ROWS}}}], eval_fraction: 0}}\n")
    done = cli("data", "check", recipe, "--json", env=online | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"kept": 12' in done.stdout


def test_fetched_model_is_found_offline_by_transformers(hub: Hub, fetch: Any, online: dict[str, str]) -> None:
    fetch(NAME, HF_ENDPOINT=hub.url)
    code = f"from transformers import AutoConfig\nprint(AutoConfig.from_pretrained('{NAME}').model_type)"
    env = os.environ | online | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "llama\n", done.stderr


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


def test_file_damaged_on_its_way_is_not_kept(hub: Hub, fetch: Any) -> None:
    hub.faults.append(Fault("wrong", path=WEIGHTS, after=1000))
    error = fetch(NAME, ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 1
    assert (
        WEIGHTS in error["error"]["what"] and "damaged on its way: expected SHA-256" in error["error"]["what"]
    )
    hub.faults.clear()
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


def test_gated_model_and_no_token_anywhere_in_the_output(hub: Hub, fetch: Any) -> None:
    hub.gated.add(NAME)
    env = {"HF_ENDPOINT": hub.url.replace("//", "//user:pass-secret@"), "HF_TOKEN": "hf_secret"}
    error = fetch(NAME, ok=False, **env)
    assert error["code"] == 2
    assert "gated" in error["error"]["what"] and "HF_TOKEN" in error["error"]["hint"]
    assert "secret" not in json.dumps(error)
    hub.tokens.add("hf_secret")
    hub.faults.append(Fault("wrong", path=WEIGHTS))
    assert "secret" not in json.dumps(fetch(NAME, ok=False, **env))


@pytest.mark.parametrize(
    ("rename", "message"), [("pytorch_model.bin", "pickles"), ("m.gguf", "GGUF files only")]
)
def test_repository_without_safetensors(hub: Hub, fetch: Any, repo: Path, rename: str, message: str) -> None:
    (repo / "pytorch_model.bin").unlink()
    (repo / WEIGHTS).rename(repo / rename)
    error = fetch(NAME, ok=False, HF_ENDPOINT=hub.url)
    assert error["code"] == 2
    assert message in error["error"]["what"]
    assert hub.served == []
    if message == "pickles":
        assert rename in fetch(NAME, "--allow-pickle", HF_ENDPOINT=hub.url)["stderr"] or hub.bytes_of(rename)
    else:
        assert fetch(NAME, "--allow", "*.gguf", HF_ENDPOINT=hub.url)["files"].keys() == {rename}


def test_dry_run_lists_files_and_sizes_and_brings_nothing(
    hub: Hub, cli: Any, fetch: Any, repo: Path, online: dict[str, str]
) -> None:
    found = fetch(NAME, "--dry-run", HF_ENDPOINT=hub.url)
    assert {name: entry["bytes"] for name, entry in found["files"].items()} == {
        name: len(content) for name, content in wanted(repo).items()
    }
    assert found["bytes"] == found["missing_bytes"] == sum(map(len, wanted(repo).values()))
    text = cli("fetch", NAME, "--dry-run", env=online | {"HF_ENDPOINT": hub.url}).stdout
    assert "293.0 KiB  model.safetensors" in text and hub.served == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one thing"),
        ([NAME, "--endpoint", "ftp://x"], "endpoint 'ftp://x'"),
        ([NAME, "--jobs", "0"], "--jobs"),
        (["../x", "--dataset"], "no id of a data set"),
        ([".", "--allow", "*.json"], "no hub model"),
    ],
)
def test_wrong_input(fetch: Any, args: list[str], message: str) -> None:
    error = fetch(*args, ok=False)
    assert error["code"] == 2 and message in error["error"]["what"]


def test_text_output(cli: Any, repo: Path) -> None:
    (repo / "pytorch_model.bin").unlink()
    done = cli("fetch", str(repo))
    assert done.returncode == 0, done.stderr
    assert str(repo) in done.stdout and WEIGHTS in done.stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_points_until_done(
    tmp_path: Path, online: dict[str, str], number: signal.Signals
) -> None:
    """Each time another shard is held back by the hub, so that none ends before it is killed."""
    repo = make_model(tmp_path / "large", num_bytes=1_500_000, shards=3)
    cache = tmp_path / "hf/hub/models--owner--tiny"
    snapshot = cache / f"snapshots/{COMMIT}"
    rng = random.Random(number)
    with serve_hub({NAME: repo}) as hub:
        hub.faults.append(Fault("slow", path="model-", rate=3_000_000))
        for shard in (1, 2, 3):
            hub.faults.append(Fault("held", path=f"model-{shard:05d}"))
            process = fetching(online | {"HF_ENDPOINT": hub.url})
            kill_after(process, cache, rng.randrange(1, 1_000_000), number)
            hub.faults.pop()
            assert not snapshot.exists()
        assert fetching(online | {"HF_ENDPOINT": hub.url}).wait(120) == 0
        assert contents(snapshot) == wanted(repo)
        for name, content in wanted(repo).items():
            begins = [begin for begin, _ in hub.bytes_of(name)]
            assert len(content) > 1000 or len(begins) <= 1  # what was there whole came once
            assert begins == sorted(begins)  # and a part never began again
        assert any(begin > 0 for name in wanted(repo) for begin, _ in hub.bytes_of(name))


def fetching(env: dict[str, str]) -> subprocess.Popen[bytes]:
    args = [sys.executable, "-m", "tunesmith", "fetch", NAME]
    return subprocess.Popen(args, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after(process: subprocess.Popen[bytes], cache: Path, num_bytes: int, number: signal.Signals) -> None:
    """Kill a fetch when so many more bytes are on the disk."""
    goal = on_disk(cache) + num_bytes
    while on_disk(cache) < goal:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) in (-number, 130)


def on_disk(folder: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    return total
