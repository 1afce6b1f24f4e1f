"""`tunesmith bench serve`: real load on a real server, started for it or already there."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Cli
from tunesmith.workflows.endpoint import serving


def test_a_model_is_served_and_measured(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(
        "bench", "serve", str(tiny), "--concurrency", "1,3", "--rate", "20", "--requests", "5", "--new-tokens",
        "9", "--prompt-tokens", "10-40", "--output", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, three, open_loop = found["levels"]
    assert (one["requests"], three["requests"], open_loop["requests"]) == (5, 6, 5)
    for level in found["levels"]:
        assert level["failed"] == 0 and level["output_tokens"] == 9 * level["requests"]
        assert 0 < level["first_token_s"]["p50"] <= level["first_token_s"]["p99"] < level["whole_s"]["p99"]
        assert level["tokens_per_s"] > 0 and level["between_tokens_s"]["p50"] > 0
    assert found["ready_s"] > 0 and found["peak_gib"] > 0.1
    assert json.loads((out / "results.json").read_text())["levels"] == found["levels"]
    assert (out / "latency.svg").read_text().startswith("<svg")


def test_a_server_that_is_up_over_chat_and_what_it_does_not_have(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    with serving(str(tiny), log=tmp_path / "log") as endpoint:
        shared = ("bench", "serve", endpoint.url, "--output", str(tmp_path), "--concurrency", "2", "--json")
        key = ("--api-key", endpoint.api_key)
        done = cli(*shared, *key, "--endpoint", "chat", "--new-tokens", "5", "--requests", "2")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["levels"][0]["output_tokens"] == 20
        done = cli(*shared, *key, "--model", "another")
        assert done.returncode == 2 and "--model another" in json.loads(done.stdout)["error"]["what"]
        done = cli(*shared)
        assert done.returncode != 0 and "401" in json.loads(done.stdout)["error"]["what"]
    done = cli("bench", "serve", str(tiny), "--concurrency", "0", "--json")
    assert done.returncode == 2 and "--concurrency 0" in json.loads(done.stdout)["error"]["what"]
