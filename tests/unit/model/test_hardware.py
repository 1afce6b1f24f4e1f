from __future__ import annotations

import os
import subprocess
import sys
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


def test_freed_memory_is_taken_again() -> None:
    """In a process of its own: blocks of many sizes, freed and taken again, come from pages already there."""
    code = (
        "import resource, torch\n"
        "from tunesmith.model.hardware import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "def use():\n"
        "    for size in range(1, 9): torch.ones(size << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "use(), use()\n"
        "before = use()\n"
        "print(use() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    # Without it the 36 million numbers touch 35,000 new pages of 4 KiB every time.
    assert faults < 1000


def test_liger_is_for_gpus() -> None:
    assert hardware.pick_kernels(torch.device("cpu")) == "torch"
