"""The header of a safetensors file, read without the package, against the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tunesmith.core.errors import UserError
from tunesmith.model.weights import tensor_shapes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {
        "a": np.zeros((3, 4), np.float16),
        "b": np.ones(7, np.int8),
        "scalar": np.array(1.0, np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_shapes_are_those_that_the_package_reads(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert tensor_shapes(path) == expected == {"a": (3, 4), "b": (7,), "scalar": ()}


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_file_that_is_cut_short(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="the file is damaged"):
        tensor_shapes(path)


@pytest.mark.parametrize(
    "header", [[], {"a": {}}, {"a": {"shape": [1], "data_offsets": [0, 9]}}, {"a": 1}, "x"]
)
def test_header_of_something_else(path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(UserError, match="the file is damaged"):
        tensor_shapes(path)


def test_bytes_left_over(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="end at byte"):
        tensor_shapes(path)
