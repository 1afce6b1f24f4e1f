"""The C++ kernels against plain arithmetic in float64, and how they are built and shared out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.paths import cache_dir
from tunesmith.model import cpu_kernels
from tunesmith.model.cpu_kernels import PAGE, Kernels

LENGTHS = [1, 5, 16, 17, 200, 319, 320]
SHAPES = [(9, 3, 64), (4, 2, 16), (8, 1, 80), (5, 5, 20), (14, 2, 128)]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = cpu_kernels.load()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def expected(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, scale: float) -> Tensor:
    rows = []
    for row, length in enumerate(LENGTHS):
        k, v = (p[tables[row].long()].flatten(0, 1)[:length].double() for p in (k_pages, v_pages))
        group = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        scores = torch.einsum("hd,lhd->hl", q[row].double(), k) * scale
        rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


def case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k_pages, v_pages, tables, lengths), the pages of each row scattered."""
    heads, key_heads, size = shape
    made = torch.Generator().manual_seed(0)
    k, v = (torch.randn(160, PAGE, key_heads, size, generator=made).to(dtype) for _ in "kv")
    tables = torch.randperm(160, generator=made)[: len(LENGTHS) * 20].view(-1, 20).int()
    q = torch.randn(len(LENGTHS), heads, size, generator=made)
    return q, k, v, tables, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_pages(kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v, tables, lengths = case(shape, dtype)
    wanted = expected(q, k, v, tables, 0.1)
    found = kernels.paged_attention(q, k, v, tables, lengths, 0.1)
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)
    small = kernels.paged_attention(q.bfloat16(), k, v, tables, lengths, 0.1)
    wanted = expected(q.bfloat16(), k, v, tables, 0.1)
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(small.double(), wanted, atol=1e-3, rtol=1 / 128)


def test_a_row_depends_on_no_other_row_and_not_on_the_threads(kernels: Kernels) -> None:
    q, k, v, tables, lengths = case(SHAPES[0], torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [
            kernels.paged_attention(
                q[i : i + 1], k, v, tables[i : i + 1], lengths[i : i + 1].contiguous(), 0.1
            )
            for i in range(len(q))
        ]
        torch.set_num_threads(2)
        assert torch.equal(torch.cat(alone), kernels.paged_attention(q, k, v, tables, lengths, 0.1))
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_are_not_finite_stay_in_their_row(kernels: Kernels) -> None:
    q, k, v, tables, lengths = case(SHAPES[0], torch.float32)
    k[int(tables[4, 0])] = float("nan")
    found = kernels.paged_attention(q, k, v, tables, lengths, 0.1)
    assert found[4].isnan().all() and found[[0, 1, 2, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("new", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_new_keys_and_values_go_to_their_slots(kernels: Kernels, new: torch.dtype, kept: torch.dtype) -> None:
    pages = [torch.zeros(6, PAGE, 3, 20, dtype=kept) for _ in "kv"]
    k, v = (torch.randn(9, 3, 20).to(new) for _ in "kv")
    slots = torch.randperm(6 * PAGE)[:9]
    kernels.write_pages(k, v, *pages, slots)
    for page, part in zip(pages, (k, v), strict=True):
        wanted = torch.zeros(6 * PAGE, 3, 20, dtype=kept)
        wanted[slots] = part.to(kept)
        assert torch.equal(page.flatten(0, 1), wanted)


@pytest.mark.parametrize("size", [576, 40, 7])
def test_norm_rotation_and_swiglu(kernels: Kernels, size: int) -> None:
    x, weight = torch.randn(70, size) * 3, torch.rand(size)
    wide = x.double()
    wanted = weight.double() * wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5).double(), wanted, atol=1e-6, rtol=1e-6)
    up = torch.randn(70, size)
    found = kernels.swiglu_(x.clone(), up)
    wanted = torch.nn.functional.silu(wide) * up.double()
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [64, 20, 6])
def test_heads_are_normed_and_turned(kernels: Kernels, size: int) -> None:
    x, weight = torch.randn(5, 3, size), torch.rand(size)
    cos, sin = torch.randn(5, size), torch.randn(5, size)
    normed = kernels.rms_norm(x.view(15, size), weight, 1e-6).view(5, 3, size)
    halves = torch.cat([-normed[..., size // 2 :], normed[..., : size // 2]], -1)
    wanted = normed * cos[:, None] + halves * sin[:, None]
    torch.testing.assert_close(kernels.rotate_(x, cos, sin, weight, 1e-6), wanted, atol=1e-6, rtol=1e-6)


def test_they_compute_with_torchs_threads(kernels: Kernels, tmp_path: Path) -> None:
    """In a fresh process: after torch's own parallel work, the kernels start no further thread."""
    done = script(tmp_path, THREADS)
    assert done.stdout.split() == ["2", "same"], done.stdout + done.stderr


THREADS = """
import os, torch
from tunesmith.model import cpu_kernels
kernels = cpu_kernels.load()
torch.set_num_threads(2)
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
torch.randn(4_000_000).exp_()
before = len(os.listdir("/proc/self/task"))
x = torch.randn(512, 1024)
for _ in range(3):
    kernels.rms_norm(x, torch.ones(1024), 1e-6)
after = len(os.listdir("/proc/self/task"))
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(torch.get_num_threads(), "same" if after == before and len(libraries) == 1 else (before, after, libraries))
"""


def script(tmp_path: Path, text: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(text)
    given = {**os.environ, "TUNESMITH_CACHE": str(cache_dir()), **env}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=given)


def load_anew() -> Kernels | None:
    """As in a new process."""
    return cpu_kernels.load.__wrapped__()


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TUNESMITH_NO_KERNELS", "1")
    assert load_anew() is None
    assert capsys.readouterr().err == ""


def test_without_a_compiler_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.delenv("TUNESMITH_KERNELS")
    monkeypatch.setenv("CXX", "false")
    assert load_anew() is None
    assert "'false" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    assert load_anew() is None
    assert "no C++ compiler is installed" in capsys.readouterr().err
    assert [path.suffix for path in (cache_dir() / "kernels").iterdir()] == [".lock"]


LOAD = "from tunesmith.model import cpu_kernels; print(cpu_kernels.load() is not None)"


@pytest.mark.usefixtures("kernels")
def test_processes_that_start_at_once_build_one_library(tmp_path: Path) -> None:
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho call >> {calls}\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "TUNESMITH_KERNELS": str(tmp_path / "cache" / "kernels")}
    running = [
        subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["True"] * 3
    assert calls.read_text().splitlines() == ["call"]
    (library,) = (tmp_path / "cache" / "kernels").glob("*.so")
    assert not list(library.parent.glob("*.partial-*"))
    library.write_text("no library")
    again = script(tmp_path, LOAD, CXX=str(compiler), TUNESMITH_KERNELS=str(library.parent))
    assert again.stdout.strip() == "True", again.stderr
    assert calls.read_text().splitlines() == ["call"] * 2
