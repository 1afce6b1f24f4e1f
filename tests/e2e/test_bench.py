"""`tunesmith bench train` on a tiny model: the real training beside the real plain loop, the same losses."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Cli


def test_ours_beside_the_plain_loop(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(
        "bench", "train", "--model", str(tiny), "--rows", "8", "--rows-per-step", "2", "--repeat", "1",
        "--threads", "1", "--precision", "fp32", "--device", "cpu", "--method", "full", "--peer", "plain",
        "--lr", "1e-3", "--output", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    part = found["methods"]["full"]
    ours, plain = (part["contenders"][name] for name in ("tunesmith", "plain"))
    assert len(ours["losses"]) == 4 and ours["losses"][-1] < ours["losses"][0]
    assert ours["loss_off_by"] < 1e-3 and plain["loss_off_by"] < 1e-5
    assert part["best_peer"] == "plain" and part["ours_over"]["plain"]["peak_gib"] > 0
    assert json.loads((out / "results.json").read_text())["methods"] == found["methods"]
    assert (out / "curves.svg").read_text().startswith("<svg") and not (out / "work").exists()


def test_a_bad_option_is_one_object(cli: Cli, tmp_path: Path) -> None:
    done = cli("bench", "train", "--peer", "nobody", "--output", str(tmp_path), "--json")
    assert done.returncode == 2
    assert "nobody" in json.loads(done.stdout)["error"]["what"]
