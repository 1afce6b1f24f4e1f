from __future__ import annotations

from pathlib import Path

from tunesmith.core.memory import host_memory, process_bytes

MIB = 1 << 20
MEMINFO = "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\nSwapTotal: 1048576 kB\n"


def machine(root: Path, cgroup: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, limit: str, used: int, inactive: int, *, old: bool = False) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{'total_' * old}inactive_file {inactive}\n")


def test_without_a_limit_it_is_the_memory_and_the_swap(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/user.slice\n")
    group(root / "sys/fs/cgroup/user.slice", "max", 100, 0)
    found = host_memory(root)
    assert found.total_bytes == 9 << 30 and found.free_bytes == 4 << 30 and not found.limited


def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a/b\n")
    group(root / "sys/fs/cgroup/a", str(2048 * MIB), 1500 * MIB, 500 * MIB)
    group(root / "sys/fs/cgroup/a/b", str(4096 * MIB), 100 * MIB, 0)
    found = host_memory(root)
    # Of 2048 MiB 1500 are used, 500 of them pages of files that are given up when needed.
    assert found.total_bytes == 2048 * MIB and found.free_bytes == 1048 * MIB and found.limited


def test_version_1_and_a_path_of_the_host(tmp_path: Path) -> None:
    root = machine(tmp_path, "5:cpu:/x\n4:memory:/docker/abc\n")
    group(root / "sys/fs/cgroup/memory", str(1024 * MIB), 24 * MIB, 0, old=True)
    found = host_memory(root)
    assert found.total_bytes == 1024 * MIB and found.free_bytes == 1000 * MIB
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert not host_memory(root).limited


def test_this_machine_has_more_than_this_process() -> None:
    held = bytearray(64 * MIB)
    held[::4096] = b"1" * len(held[::4096])
    found = host_memory()
    assert 64 * MIB < process_bytes() < found.total_bytes and 0 < found.free_bytes <= found.total_bytes
