"""What is sent to a Ray cluster, and how a job is found and told of."""

from __future__ import annotations

import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from tunesmith.cluster.jobs import Job, Jobs
from tunesmith.core.errors import RecipeErrors, TunesmithError, UserError
from tunesmith.recipe.load import load_recipe
from tunesmith.workflows.jobs import (
    DEFAULT_ADDRESS,
    RECIPE,
    RUN,
    as_dict,
    check_succeeded,
    cluster_address,
    duration_s,
    find,
    job_id,
    prepare,
)

TEXT = "# mine\nmodel: {path: models/base}\ndata: {sources: [{path: rows.jsonl}]}\n"
URL = "http://10.0.0.5:8265"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a recipe, its model and its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "mine.yaml").write_text(TEXT)
    return tmp_path


def sent_recipe(here: Path, command: str, text: str) -> dict[str, object]:
    """What the recipe is where it is read: in another folder, with the command's overrides."""
    args = shlex.split(command)
    overrides = [value for flag, value in pairwise(args) if flag == "--set"]
    there = here / "there.yaml"
    there.write_text(text)
    return load_recipe(there, overrides).model_dump()


def job(name: str, state: str = "running", **more: object) -> Job:
    return Job(name, state, "tunesmith train", {}, 100.0, **more)  # type: ignore[arg-type]


def test_local_paths_are_sent_in_full(here: Path) -> None:
    made = prepare(Path("mine.yaml"), ["train.lr=1e-3", "output_dir=out"], workers="2:8", fresh=True)
    assert made.text == TEXT and made.file == "mine.yaml" and made.run == f"{here}/out/mine"
    assert made.command == (
        "tunesmith train mine.yaml --cluster auto --workers 2:8 --fresh --set train.lr=1e-3 "
        f"--set output_dir={here}/out --set model.path={here}/models/base "
        f"--set data.sources.0.path={here}/rows.jsonl"
    )
    assert made.again == (
        f"tunesmith jobs submit {here}/mine.yaml --workers 2:8 --set train.lr=1e-3 --set output_dir=out"
    )


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("smollm2-135m-instruct", "tatsu-lab/alpaca"),
        ("Qwen/Qwen1.5-0.5B-Chat", "s3://bucket/rows"),
        ("s3://bucket/model", "/only/there.jsonl"),
        ("/only/there", "~/only-there.jsonl"),
    ],
)
def test_what_only_the_cluster_reads_stays_as_it_is(here: Path, model: str, rows: str) -> None:
    sets = [f"model.path={model}", f"data.sources.0.path={rows}", "output_dir=s3://bucket/runs"]
    made = prepare(Path("mine.yaml"), sets)
    assert shlex.split(made.command)[5:] == [part for given in sets for part in ("--set", given)]
    assert made.run == "s3://bucket/runs/mine"


def test_paths_that_yaml_would_read_otherwise_arrive(here: Path) -> None:
    odd = here / "a: b #c"
    odd.mkdir()
    (odd / "rows 'x'.jsonl").touch()
    path = "a: b #c/rows 'x'.jsonl"
    (here / "mine.yaml").write_text(
        f'model: {{path: models/base}}\ndata: {{sources: [{{path: "{path}"}}]}}\n'
    )
    made = prepare(Path("mine.yaml"), [])
    data = sent_recipe(here, made.command, made.text)["data"]
    assert isinstance(data, dict) and data["sources"][0]["path"] == f"{here}/{path}"


def test_paths_that_lead_nowhere_are_all_told(here: Path) -> None:
    sets = ["model.path=./none", "data.sources.0.path=none.jsonl", "model.chat_template=none.jinja"]
    with pytest.raises(RecipeErrors) as caught:
        prepare(Path("mine.yaml"), sets)
    assert len(caught.value.faults) == 3 and "'none.jsonl' does not exist" in str(caught.value)


def test_an_api_key_stays_here(here: Path) -> None:
    (here / "mine.yaml").write_text(TEXT + "serve: {api_key: hidden}\n")
    made = prepare(Path("mine.yaml"), ["serve.api_key=secret", "train.seed=7"])
    assert not any(word in made.text + made.command + made.again for word in ("hidden", "secret"))
    recipe = sent_recipe(here, made.command, made.text)
    assert recipe["train"]["seed"] == 7 and recipe["model"]["path"] == f"{here}/models/base"  # type: ignore[index]


@pytest.mark.parametrize(
    ("workers", "name", "fault"), [("8:2", None, "--workers: '8:2'"), (None, "a b", "--name: 'a b'")]
)
def test_wrong_options_are_refused(here: Path, workers: str | None, name: str | None, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        prepare(Path("mine.yaml"), [], workers=workers, name=name)


@pytest.mark.parametrize(
    ("name", "front"), [("orders.v2", "orders.v2-"), ("my orders/1", "my-orders-1-"), ("训练", "job-")]
)
def test_ids_are_plain_and_new(name: str, front: str) -> None:
    assert job_id(name).startswith(front) and len(job_id(name)) == len(front) + 6
    assert job_id(name) != job_id(name)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, DEFAULT_ADDRESS),
        (f"{URL}/", {"RAY_ADDRESS": "http://other:1"}, URL),
        (None, {"RAY_API_SERVER_ADDRESS": URL, "RAY_ADDRESS": "http://other:1"}, URL),
        (None, {"RAY_ADDRESS": URL}, URL),
        (None, {"RAY_ADDRESS": "10.0.0.5:6379"}, DEFAULT_ADDRESS),
    ],
)
def test_the_address_of_the_cluster(given: str | None, environment: dict[str, str], expected: str) -> None:
    assert cluster_address(given, environment) == expected


@pytest.mark.parametrize("given", ["auto", "ray://10.0.0.5:10001", "10.0.0.5:8265", "http://", ""])
def test_another_kind_of_address_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="is not the address of a cluster's dashboard"):
        cluster_address(given, {})


def test_a_job_is_found_by_its_beginning() -> None:
    known = [job("orders-1a2b3c"), job("orders-1f0000"), job("orders")]
    assert find(known, "orders-1a") is known[0] and find(known, "orders") is known[2]
    with pytest.raises(UserError, match="'orders-1' is the beginning of 2 jobs"):
        find(known, "orders-1")
    with pytest.raises(UserError, match=r"(?s)no job 'oders'.*did you mean orders"):
        find(known, "oders")
    with pytest.raises(UserError, match=r"(?s)no job 'xyz'.*there are orders-1a2b3c"):
        find(known, "xyz")
    with pytest.raises(UserError, match="none was submitted"):
        find([], "orders")


def test_an_end_is_told() -> None:
    check_succeeded(job("a", "succeeded"), URL)
    cases = {
        "a was stopped": job("a", "stopped"),
        "failed: exit code 4": job("a", "failed", exit_code=4),
        "finds no 'tunesmith'": job("a", "failed", exit_code=127),
        "failed: runtime_env failed": job("a", "failed", message="\nruntime_env failed\n  Traceback"),
    }
    for told, ended in cases.items():
        with pytest.raises(TunesmithError, match=told) as caught:
            check_succeeded(ended, URL)
        assert caught.value.exit_code == 1 and caught.value.hint


def test_times_are_those_of_the_cluster() -> None:
    ended = Job("a", "succeeded", "c", {RECIPE: "r.yaml", RUN: "/runs/r"}, 100.0, 175.0, 0)
    told = as_dict(ended)
    assert (told["started"], told["duration_s"]) == ("1970-01-01T00:01:40+00:00", 75.0)
    assert (told["recipe"], told["run"], told["exit_code"]) == ("r.yaml", "/runs/r", 0)
    assert duration_s(Job("a", "running", "c", {}, 9e12)) == 0.0


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"{}", "refuses who is asking"),
        (404, b"{}", "what answers there is not Ray's dashboard"),
        (200, b"{}", "what answers there is not Ray's dashboard"),
        (200, b"<html>", "no Ray cluster answers there"),
        (502, b"", "no Ray cluster answers there"),
    ],
)
def test_what_is_no_cluster_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, told: str
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer hidden"}')
    asked: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=told) as caught:
            Jobs(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert asked[0] == "Bearer hidden" and "hidden" not in str(caught.value) and caught.value.hint


def test_headers_that_are_none_are_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_JOB_HEADERS", "Bearer hidden")
    with pytest.raises(UserError, match="RAY_JOB_HEADERS: is no JSON object") as caught:
        Jobs(URL)
    assert "hidden" not in str(caught.value)
