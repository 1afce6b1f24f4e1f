"""The benchmark's figures worked out by hand, its rows, its measuring of a real process, and its refusals."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from xml.dom import minidom

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.core.errors import UserError
from tunesmith.workflows.bench import BenchOptions, get_ready
from tunesmith.workflows.bench_flops import flops_per_token, peak_flops
from tunesmith.workflows.bench_measure import Measured, Usage, figures, watch
from tunesmith.workflows.bench_peers import PEERS, python_of, requirements
from tunesmith.workflows.bench_report import REFERENCE_RUN, curves_svg, summary, table
from tunesmith.workflows.bench_rows import alpaca_rows


def test_rows_depend_on_seed_and_number_alone() -> None:
    rows = list(alpaca_rows(50, seed=3))
    assert rows[:10] == list(alpaca_rows(10, seed=3))
    assert rows != list(alpaca_rows(50, seed=4))
    assert 5 < sum(bool(row["input"]) for row in rows) < 40
    assert all(row["instruction"] and row["output"] for row in rows)


def test_a_process_is_measured_with_its_children(tmp_path: Path) -> None:
    """64 MiB in a child, and a second of its work, both seen from outside."""
    work = "import time; x = bytearray(64 * 2**20); t = time.process_time()\nwhile time.process_time() < t + 1: pass"
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {work!r}]))"
    usage = watch([sys.executable, "-c", code], log=tmp_path / "log", env=dict(os.environ))
    assert usage.code == 0
    assert 70 * 2**20 < usage.peak_bytes < 400 * 2**20
    assert 0.5 < usage.cpu_between(usage.began, usage.ended) < 3


def test_cpu_seconds_between_looks_are_interpolated() -> None:
    usage = Usage(cpu=[(10.0, 1.0), (12.0, 3.0), (14.0, 3.0)])
    assert usage.cpu_between(11.0, 13.0) == pytest.approx(1.0)
    assert usage.cpu_between(10.0, 99.0) == pytest.approx(2.0)


def step_events(path: Path, times: list[float]) -> Path:
    lines = [{"time": t, "event": "step", "loss": 5 - i} for i, t in enumerate(times)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rates_leave_the_first_step_out(tmp_path: Path) -> None:
    usage = Usage(began=90.0, ended=120.0, peak_bytes=2**30, cpu=[(90.0, 0.0), (130.0, 80.0)])
    found = figures(usage, step_events(tmp_path / "e", [100.0, 102.0, 110.0]), [7, 100, 200])
    assert found["tokens_per_s"] == pytest.approx(30)
    assert found["tokens_per_cpu_s"] == pytest.approx(15)
    assert found["first_step_s"] == pytest.approx(10)
    assert (found["wall_s"], found["peak_gib"], found["losses"]) == (30.0, 1.0, (5.0, 4.0, 3.0))


def test_a_run_that_lacks_steps_has_no_figures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 3 steps"):
        figures(Usage(), step_events(tmp_path / "e", [1.0, 2.0]), [1, 1, 1])


def run(name: str, rate: float, gib: float, losses: tuple[float, ...], repeat: int = 0) -> Measured:
    return Measured(name, "lora", repeat, rate, rate, 1.0, 2.0, gib, losses=losses)


RUNS = [
    run(REFERENCE_RUN, 50, 8, (5.0, 4.0)),
    run("tunesmith", 290, 2, (5.0, 4.01)),
    run("tunesmith", 310, 2, (5.0, 4.01), 1),
    run("fast", 100, 6, (5.001, 4.0)),
    run("wrong", 400, 1, (5.5, 4.2)),
    Measured("broken", "lora", 0, failure="it ended with code 1"),
]


def test_best_peer_is_the_fastest_that_does_the_same_work() -> None:
    found = summary(RUNS, flops_per_token=2e6, gpu=None)
    assert found["best_peer"] == "fast"
    assert found["ours_over"]["fast"]["tokens_per_s"] == pytest.approx(3.0)
    assert found["ours_over"]["fast"]["peak_gib"] == pytest.approx(1 / 3)
    ours = found["contenders"]["tunesmith"]
    assert (ours["tokens_per_s"], ours["runs"], ours["gflops"]) == (300, 2, pytest.approx(0.6))
    assert ours["loss_off_by"] == pytest.approx(0.01)
    assert not found["contenders"]["wrong"]["same_work"]


def test_without_a_reference_ours_is_what_others_are_held_to() -> None:
    found = summary(RUNS[1:], flops_per_token=1.0, gpu=None)
    assert found["best_peer"] == "fast" and not found["contenders"]["wrong"]["same_work"]


def test_table_and_picture_tell_every_contender() -> None:
    found = {"methods": {"lora": summary(RUNS, flops_per_token=2e6, gpu="NVIDIA H100 80GB HBM3")}}
    text, picture = table(found), curves_svg(found)
    assert all(one.contender in text for one in RUNS)
    assert "other work" in text and "failed: it ended with code 1" in text
    assert "best peer fast: ours 3.00x its tokens/s, 0.33x its memory" in text
    assert len(minidom.parseString(picture).getElementsByTagName("polyline")) == 1 + 4


def test_flops_count_the_matrices_that_a_token_meets(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    layers = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    for tied in (True, False):
        folder = tmp_path / str(tied)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).save_pretrained(folder)
        assert flops_per_token(folder, "full") == 6 * (layers + 8 * 32)
        assert flops_per_token(folder, "lora") == 4 * (layers + 8 * 32)


def test_peaks_of_gpus() -> None:
    assert peak_flops("NVIDIA GeForce RTX 3090") == pytest.approx(71.2e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB") == pytest.approx(312e12)
    assert peak_flops("Tesla T4") is None, "it has no bf16 products"
    assert peak_flops("Some GPU") is None and peak_flops(None) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peers": ("nobody",)}, "--peer nobody"),
        ({"methods": ("qlora",)}, "--method qlora"),
        ({"rows": 8}, "--rows 8"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"device": "tpu"}, "--device tpu"),
        ({"data": Path("not/there.json")}, "--data"),
        ({"peers": ("trl",), "envs": Path("not/there")}, "--peer trl: its environment"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    values: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        get_ready(BenchOptions(output=tmp_path / "out", **values))  # type: ignore[arg-type]
    assert said in str(caught.value) and caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_peers_that_need_a_gpu_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a GPU only"):
        get_ready(BenchOptions(peers=("unsloth",), output=tmp_path / "out"))


def test_every_peer_has_its_runner_and_environment_file(tmp_path: Path) -> None:
    for name, contender in PEERS.items():
        assert contender.runner.is_file()
        if contender.env is None:
            assert python_of(contender, name, tmp_path, install=False) == sys.executable
        else:
            assert requirements(contender.env).read_text().strip()


def test_the_watch_ends_with_its_process(tmp_path: Path) -> None:
    before = time.time()
    usage = watch([sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "log", env=dict(os.environ))
    assert usage.code == 3 and before <= usage.began <= usage.ended <= time.time()
