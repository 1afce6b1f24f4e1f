"""The quickstart as a user calls it, on a tiny model: what it leaves, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import warm
from tests.conftest import Cli
from tunesmith.core.events import read_events
from tunesmith.workflows.verify import is_alive

SMALL = ("--rows", "24", "--test-rows", "6", "--set", "train.max_steps=3")
KEYS = {
    "base_exact_match", "tuned_exact_match", "train_seconds", "tokens_per_s", "steps", "run", "adapter", "merged",
    "endpoint_answers", "template_parity",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A finished quickstart: its folder, its JSON object, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("quickstart") / "runs" / "first"
    done = call(folder, tiny)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def command(folder: Path, model: Path, *more: str) -> list[str]:
    start = ["quickstart", "--output", str(folder), "--json"]
    return [*start, *SMALL, "--set", f"model.path={model}", *more]


def call(folder: Path, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return Cli()(*command(folder, model, *more))


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "quickstart" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_it_prints_one_object_with_every_figure(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = finished
    assert set(found) >= KEYS
    assert found["run"] == str(folder)
    assert found["steps"] == 3 and found["train_seconds"] > 0 and found["tokens_per_s"] > 0
    assert 0 <= found["base_exact_match"] <= 1 and 0 <= found["tuned_exact_match"] <= 1
    assert found["test_rows"] == 6


def test_the_endpoint_answered_three_test_rows(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = finished
    asked = [row["messages"] for row in rows(folder)[:3]]
    assert [a["question"] for a in found["endpoint_answers"]] == [m[1]["content"] for m in asked]
    assert [a["expected"] for a in found["endpoint_answers"]] == [m[2]["content"] for m in asked]
    for answer in found["endpoint_answers"]:
        assert answer["answer"]
        assert answer["correct"] == (answer["answer"].strip() == answer["expected"])


def test_the_endpoint_answers_as_the_exported_model(finished: tuple[Path, dict[str, Any], str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, found, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(found["merged"])
    model = AutoModelForCausalLM.from_pretrained(found["merged"], dtype=torch.float32)
    messages = rows(folder)[0]["messages"][:-1]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["endpoint_answers"][0]["answer"].startswith(text[: max(1, len(text) // 2)])


def test_the_endpoint_is_fed_the_trained_tokens(finished: tuple[Path, dict[str, Any], str]) -> None:
    assert finished[1]["template_parity"] is True


def test_the_server_is_stopped(finished: tuple[Path, dict[str, Any], str]) -> None:
    log = (finished[0] / "quickstart" / "serve.log").read_text(encoding="utf-8")
    url = re.search(r"http://127\.0\.0\.1:\d+", log)
    assert url is not None
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url[0]}/health", timeout=5)


def test_three_rows_are_shown_first(finished: tuple[Path, dict[str, Any], str]) -> None:
    first = json.loads(
        (finished[0] / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    assert first["messages"][1]["content"].split()[-1] in finished[2]


def test_a_second_call_repeats_only_the_endpoint(
    finished: tuple[Path, dict[str, Any], str], tiny: Path
) -> None:
    folder, found, _ = finished
    before = list(read_events(folder / "events.jsonl", "step"))
    again = call(folder, tiny)
    assert again.returncode == 0, again.stderr
    assert "train: finished before" in again.stderr
    assert list(read_events(folder / "events.jsonl", "step")) == before
    second = json.loads(again.stdout)
    assert {k: v for k, v in second.items() if k != "seconds"} == {
        k: v for k, v in found.items() if k != "seconds"
    }


def test_other_settings_in_the_same_folder_are_refused(
    finished: tuple[Path, dict[str, Any], str], tiny: Path
) -> None:
    refused = call(finished[0], tiny, "--rows", "30")
    assert refused.returncode == 2
    error = json.loads(refused.stdout)["error"]
    assert "--rows" in error["what"] and "--fresh" in error["hint"]


def test_a_folder_with_other_things_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused = call(tmp_path, tiny, "--fresh")
    assert refused.returncode == 2
    assert "something else" in json.loads(refused.stdout)["error"]["what"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_stopped_quickstart_leaves_no_server_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "stopped"
    with (tmp_path / "out").open("w") as out:
        process = warm.start(*command(folder, tiny), stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not (servers := warm.children(process.pid)) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert servers and not any(map(is_alive, servers))
    done = call(folder, tiny)
    assert done.returncode == 0, done.stderr
    assert "train: finished before" in done.stderr
