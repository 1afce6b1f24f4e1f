from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tunesmith.core.errors import UserError
from tunesmith.model import hardware


def test_device() -> None:
    has_gpu = torch.cuda.is_available()
    assert hardware.pick_device("cpu").type == "cpu"
    assert hardware.pick_device("auto").type == ("cuda" if has_gpu else "cpu")
    if not has_gpu:
        with pytest.raises(UserError, match="torch sees no GPU"):
            hardware.pick_device("cuda")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert hardware.set_threads(1) == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert hardware.set_threads("auto") == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert 1 <= hardware.set_threads("auto") <= len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_cores_do_not_exceed_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert hardware.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_precision_on_a_cpu_follows_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert hardware.pick_training_precision("bf16-pure", cpu) == "bf16-pure"
    flags = Path("/proc/cpuinfo").read_text()
    native = "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.split("Features", 1)[-1][:400]
    assert hardware.pick_training_precision("auto", cpu) == ("bf16" if native else "fp32")
    assert hardware.pick_serving_dtype("auto", cpu) == torch.float32
    assert hardware.pick_serving_dtype("fp16", cpu) == torch.float16
