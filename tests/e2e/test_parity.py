"""`tunesmith verify parity`: quiet where the endpoint serves the run, and each planted fault is named."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import write_recipe
from tunesmith.core.run_folder import RunFolder
from tunesmith.workflows.endpoint import Endpoint, serving
from tunesmith.workflows.train import train_recipe

Change = Callable[[str, dict[str, Any]], dict[str, Any]]


def train(folder: Path, model: Path, answer: str, steps: int, **method: Any) -> RunFolder:
    """A run that has learnt to answer everything with `answer`."""
    folder.mkdir()
    recipe = write_recipe(
        folder,
        model,
        method=method,
        train={"max_steps": steps, "lr": 5e-3, "save_every": 1000},
        eval={"every": 0},
        data={"max_length": 256},
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = answer
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return train_recipe(recipe, []).run


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers "No." and stops."""
    folder = tmp_path_factory.mktemp("parity-base")
    run = train(folder / "train", tiny, "No.", 60, type="full")
    model = run.checkpoint(60) / "model"
    for file in (run.path / "tokenizer").iterdir():
        shutil.copy(file, model)
    return model


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A LoRA run over it that has learnt to say "Yes, of course." and to stop."""
    folder = tmp_path_factory.mktemp("parity")
    return train(folder / "train", base, "Yes, of course.", 60, type="lora", rank=16, dropout=0.0)


@pytest.fixture(scope="module")
def served(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(str(run.path), log=tmp_path_factory.mktemp("log") / "log") as endpoint:
        yield endpoint


def check(cli: Cli, run: RunFolder, endpoint: Endpoint, *args: str) -> dict[str, Any]:
    command = ("verify", "parity", run.path, "--url", endpoint.url, "--api-key", endpoint.api_key, "--json")
    done = cli(*map(str, command), "--rows", "3", *args)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is (done.returncode == 0)
    return found


def faults(found: dict[str, Any]) -> set[str]:
    return {finding["check"] for finding in found["findings"]}


@contextmanager
def between(endpoint: Endpoint, change: Change) -> Iterator[Endpoint]:
    """A server in front of another one that changes what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.forward(None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.forward(json.dumps(change(self.path, body)).encode())

        def forward(self, body: bytes | None) -> None:
            headers = {"authorization": self.headers["authorization"], "content-type": "application/json"}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(endpoint.url + self.path, body, headers)
                ) as got:
                    status, answer = got.status, got.read()
            except urllib.error.HTTPError as error:
                status, answer = error.code, error.read()
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}", endpoint.api_key, endpoint.pid)
    finally:
        server.shutdown()


def test_the_run_served_is_the_run_trained(cli: Cli, run: RunFolder, served: Endpoint) -> None:
    found = check(cli, run, served)
    assert found["equal"], found["findings"]
    assert found["rows"] == 4 and found["skipped"] == {}
    wanted = {"prompt_ids": 4, "length": 4, "logprobs": 3, "answer": 4}
    assert {name: found["checked"][name] for name in wanted} == wanted
    assert found["checked"]["stop"] >= 3, "the model has not learnt to stop"
    assert found["logprob_difference"] < 1e-3
    again = cli(
        "verify", "parity", str(run.path), "--url", served.url, "--api-key", served.api_key, "--rows", "1",
        "--data", str(run.path.parent.parent / "rows.jsonl"),
    )  # fmt: skip
    assert again.returncode == 0 and "the same as in training" in again.stdout, again.stderr


def test_a_missing_stop_token_and_a_cut_prompt_are_found(cli: Cli, run: RunFolder, served: Endpoint) -> None:
    def without_stop(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return body | ({"ignore_eos": True} if path.endswith("/chat/completions") else {})

    def cut(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/chat/completions"):
            body["messages"][-1]["content"] = body["messages"][-1]["content"][-150:]
        return body

    with between(served, without_stop) as endpoint:
        found = check(cli, run, endpoint)
        assert faults(found) == {"stop"} and "<|im_end|>" in found["findings"][0]["why"]
    with between(served, cut) as endpoint:
        found = check(cli, run, endpoint)
        assert "length" in faults(found)
        assert {f["place"] for f in found["findings"] if f["check"] == "length"} == {"the longest prompt"}


def test_an_adapter_that_is_not_applied_is_found(
    cli: Cli, run: RunFolder, base: Path, tmp_path: Path
) -> None:
    with serving(str(base), log=tmp_path / "log") as endpoint:
        found = check(cli, run, endpoint)
    told = [finding["why"] for finding in found["findings"] if finding["check"] == "logprobs"]
    assert len(told) == 3 and all("the adapter is not applied" in why for why in told)


def test_another_template_and_one_more_first_token_are_found(
    cli: Cli, run: RunFolder, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert cli("export", str(run.path), "--to", "merged", "--output", str(merged)).returncode == 0
    template = (merged / "chat_template.jinja").read_text()
    for name, text, why in (
        ("other", template.replace("<|im_start|>", "### ", 1), "another template: at token"),
        ("bos", "{{ bos_token }}" + template, "before the prompt"),
    ):
        folder = shutil.copytree(merged, tmp_path / name)
        (folder / "chat_template.jinja").write_text(text)
        with serving(str(folder), log=tmp_path / "log") as endpoint:
            found = check(cli, run, endpoint)
        told = [finding["why"] for finding in found["findings"] if finding["check"] == "prompt_ids"]
        assert len(told) == 4 and why in told[0], told


def test_an_endpoint_that_is_not_there_and_a_model_that_it_has_not(
    cli: Cli, run: RunFolder, served: Endpoint
) -> None:
    done = cli("verify", "parity", str(run.path), "--url", "http://127.0.0.1:9", "--json")
    assert done.returncode == 2 and "127.0.0.1:9" in json.loads(done.stdout)["error"]["what"]
    done = cli(
        "verify", "parity", str(run.path), "--url", served.url, "--api-key", served.api_key, "--model", "x"
    )
    assert done.returncode == 2 and "--model x" in done.stderr
