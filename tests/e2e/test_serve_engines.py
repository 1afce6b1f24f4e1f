"""`tunesmith serve --engine llamacpp`, whole: the real server of llama.cpp, where one is installed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.test_serve_process import ENDLESS, Server, events, running, start, until
from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.workflows.engines import llama_server
from tunesmith.workflows.verify import is_alive

PROMPT = "Once upon a time"
OPTIONS = ("--engine", "llamacpp", "--precision", "fp32", "--threads", "1", "--max-length", "512")
MORE = ("--max-concurrent", "3", "--grace", "60")


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    return (
        make_run(folder / "orders", tiny, steps=(4, 7, 11)),
        make_run(folder / "letters", tiny, steps=(5, 9)),
    )


@pytest.fixture(scope="module")
def server(runs: tuple[RunFolder, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A run with its adapter and another one beside it."""
    try:
        llama_server()
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = start(runs[0].path, "--adapter", f"letters={runs[1].path}", *OPTIONS, *MORE)
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.process.communicate()


def adapter_of(run: RunFolder) -> Path:
    latest = run.latest_checkpoint()
    assert latest is not None
    return latest / "adapter"


def greedy(tiny: Path, adapter: Path | None) -> str:
    """By transformers and peft alone, twelve tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(found[0, ids.shape[1] :]))


def post(server: Server, where: str, /, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{where}", json={"model": "orders"} | body, timeout=120)


def chat(server: Server, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hi"}]
    answer = post(server, "/v1/chat/completions", messages=messages, max_tokens=12, temperature=0, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def child_of(server: Server) -> int:
    [child] = server.engines()
    return child


def test_every_adapter_and_the_base_answer_as_peft_does(
    server: Server, runs: tuple[RunFolder, RunFolder], tiny: Path
) -> None:
    assert server.facts["models"] == ["orders", "letters", "tiny-llama"]
    assert server.facts["run"] == str(runs[0].path)
    expected = {
        "orders": greedy(tiny, adapter_of(runs[0])),
        "letters": greedy(tiny, adapter_of(runs[1])),
        "tiny-llama": greedy(tiny, None),
    }
    assert len(set(expected.values())) == 3
    with ThreadPoolExecutor(6) as threads:  # at the same time, each with its own
        asked = {
            model: [threads.submit(server.text, model=model, prompt=PROMPT, ignore_eos=True) for _ in "ab"]
            for model in expected
        }
        found = {model: {one.result() for one in answers} for model, answers in asked.items()}
    assert found == {model: {text} for model, text in expected.items()}


def test_what_clients_ask_for_is_answered(server: Server) -> None:
    whole = post(server, "/v1/completions", prompt=PROMPT, max_tokens=9, temperature=0, logprobs=2, n=2)
    first, second = whole.json()["choices"]
    assert first["text"] == second["text"] and len(first["logprobs"]["top_logprobs"][0]) == 2
    stop = first["logprobs"]["tokens"][4].strip()
    cut = post(server, "/v1/completions", prompt=PROMPT, max_tokens=9, temperature=0, stop=[stop])
    assert cut.json()["choices"][0]["text"] == first["text"][: first["text"].index(stop)]
    chunks = events(server, {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == first["text"]
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema | {"additionalProperties": False}},
    }
    answer = chat(server, response_format=form)["choices"][0]
    assert json.loads(answer["message"]["content"])["a"] in ("x", "y")
    assert post(server, "/tokenize", prompt=PROMPT).json()["count"] == 4


def test_what_it_cannot_do_is_refused(server: Server, runs: tuple[RunFolder, RunFolder]) -> None:
    for path, body, words in (
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "log-probabilities of the prompt"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 1}, "counts the prompt's tokens"),
        ("/v1/embeddings", {"input": "a"}, "embeddings are not computed"),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    more = {"name": "more", "path": str(runs[1].path)}
    added = httpx.post(f"{server.url}/admin/adapters", json=more, timeout=60)
    assert added.status_code == 400 and "takes its adapters at the start" in added.text
    gone = httpx.delete(f"{server.url}/admin/adapters/letters", timeout=60)
    assert gone.status_code == 400 and "cannot unload" in gone.text


def test_only_the_gateway_reaches_the_program(server: Server) -> None:
    child = child_of(server)
    args = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
    port = int(args[args.index(b"--port") + 1])
    assert args[args.index(b"--host") + 1] == b"127.0.0.1"
    body = {"prompt": [1], "n_predict": 1}
    refused = httpx.post(f"http://127.0.0.1:{port}/completion", json=body, timeout=60)
    assert refused.status_code == 401
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    bound = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{port:04X}" in bound and f"00000000:{port:04X}" not in bound


def test_who_leaves_frees_the_place(server: Server) -> None:
    body = {"model": "orders"} | ENDLESS | {"max_tokens": 480}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    until(lambda: running(server) == 0)


def test_a_killed_program_ends_its_streams_and_comes_back_then_drains(server: Server) -> None:
    before, child = server.text(model="letters"), child_of(server)
    body = ENDLESS | {"max_tokens": 480}
    found = events(server, body, lambda: os.kill(child, signal.SIGKILL))
    assert found[-1]["error"]["code"] == "engine_unavailable", found[-1]
    refused = server.post(body | {"stream": False})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    until(lambda: server.ready().status_code == 200)
    assert server.ready().json()["restarts"] == 1
    assert server.text(model="letters") == before
    again = child_of(server)
    with ThreadPoolExecutor(1) as threads:
        last = threads.submit(events, server, body)
        until(lambda: running(server) == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ready().status_code == 503)
        assert server.post(body).status_code == 503
        assert last.result()[-1] == "[DONE]"
    assert server.wait() == 0
    assert not is_alive(again) and not is_alive(child)
