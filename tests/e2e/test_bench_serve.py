"""`tunesmith bench serve`: real load on a real server, started for it or already there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Cli
from tunesmith.core.errors import UserError
from tunesmith.workflows.bench_serve import LoadOptions, bench_serve
from tunesmith.workflows.endpoint import serving


def test_a_model_is_served_and_measured(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(
        "bench", "serve", str(tiny), "--concurrency", "1,3", "--rate", "20", "--requests", "3,6,4", "--new-tokens",
        "9", "--prompt-tokens", "10-40", "--output", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [level["requests"] for level in found["levels"]] == [3, 6, 4]
    for level in found["levels"]:
        assert level["failed"] == level["unfinished"] == 0
        assert level["output_tokens"] == 9 * level["requests"]
        assert 0 < level["first_token_s"]["p50"] <= level["first_token_s"]["p99"] < level["whole_s"]["p99"]
        assert level["tokens_per_s"] > 0 and level["between_tokens_s"]["p50"] > 0
    assert found["ready_s"] > 0 and found["peak_gib"] > 0.1
    assert json.loads((out / "results.json").read_text())["levels"] == found["levels"]
    assert (out / "latency.svg").read_text().startswith("<svg")


def test_a_server_that_is_up_over_chat_and_what_it_refuses(tiny: Path, tmp_path: Path) -> None:
    with serving(str(tiny), log=tmp_path / "log") as endpoint:
        open_ = LoadOptions(target=f"{endpoint.url}/v1/", output=tmp_path, concurrency=(2,), requests=(2,))
        shared = replace(open_, api_key=endpoint.api_key, endpoint="chat", new_tokens=5)
        found = bench_serve(shared)
        assert [(level["requests"], level["output_tokens"]) for level in found["levels"]] == [(4, 20)]
        with pytest.raises(UserError, match="--model another"):
            bench_serve(replace(shared, model="another"))
        with pytest.raises(UserError, match="401") as refused:
            bench_serve(open_)
        assert "--api-key" in (refused.value.hint or "")
    with pytest.raises(UserError, match="All connection attempts failed"):
        bench_serve(open_)


@pytest.mark.parametrize(
    ("concurrency", "requests", "what"),
    [((), (8,), "no load"), ((1, 8), (1, 2, 3), "3 numbers for 2 levels")],
)
def test_loads_that_are_none(concurrency: tuple[int, ...], requests: tuple[int, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        bench_serve(LoadOptions(target="nowhere", concurrency=concurrency, requests=requests))
