"""From options and facts of a host to an image's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith import __version__
from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_file
from tunesmith.host.checks_host import SMI
from tunesmith.host.facts import Answer
from tunesmith.workflows.image import ImageOptions, build, read_gpus, show

DIGEST = "sha256:" + "2" * 64


@pytest.fixture
def facts(tmp_path: Path) -> Any:
    def write(stdout: str, rc: int = 0) -> Path:
        path = tmp_path / "facts.json"
        path.write_text(json.dumps({"commands": {SMI: {"rc": rc, "stdout": stdout, "stderr": ""}}}))
        return path

    return write


def options(tmp_path: Path, **values: Any) -> ImageOptions:
    return ImageOptions(**{"lock": tmp_path / "image.lock.json", "user": "1000:1000"} | values)


def test_a_facts_file_chooses_the_base(tmp_path: Path, facts: Any) -> None:
    path = facts("NVIDIA GeForce RTX 3090, 580.95.05, 8.6, 24576 MiB\n" * 2)
    found = show(options(tmp_path, facts=path))
    assert found["base"]["image"] == "nvcr.io/nvidia/pytorch:25.10-py3" and found["base"]["cuda"] == "13.0"
    assert found["vllm"] == "0.33.0" and found["images"] == {
        "train": "tunesmith:train",
        "serve": "tunesmith:serve",
    }
    assert show(options(tmp_path, facts=path, family="cpu"))["base"]["kind"] == "cpu"
    assert show(options(tmp_path, facts=path, vllm="none"))["vllm"] is None
    assert show(options(tmp_path, facts=path, vllm="0.30.1"))["vllm"] == "0.30.1"
    assert show(options(tmp_path, facts=path, stages=("train",)))["vllm"] is None


def test_a_host_without_nvidia_smi_is_for_cpu(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text('{"commands": {}}')
    found = show(options(tmp_path, facts=path))
    assert found["base"]["image"] == "python:3.11-slim" and found["vllm"] is None


@pytest.mark.parametrize(
    ("stdout", "rc"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18),
        ("", 0),
    ],
)
def test_a_driver_that_fails_is_not_taken_for_none(tmp_path: Path, facts: Any, stdout: str, rc: int) -> None:
    with pytest.raises(UserError, match="nvidia-smi is here, but says") as caught:
        show(options(tmp_path, facts=facts(stdout, rc)))
    assert "tunesmith doctor" in (caught.value.hint or "")


def test_a_capability_that_nvidia_smi_does_not_know() -> None:
    driver, gpus = read_gpus(Answer(0, "Tesla K80, 580.1, [N/A], 11441 MiB\n"))
    assert driver == "580.1" and gpus[0].capability is None


def test_labels_follow_what_the_image_is_made_of(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: x}\n")
    pins = tmp_path / "pins.txt"
    pins.write_text("rich==15.0.0\n")

    def labels(**values: Any) -> dict[str, str]:
        found: dict[str, str] = show(options(tmp_path, family="cpu", **values))["labels"]["train"]
        return found

    first = labels(recipe=recipe, constraints=pins)
    assert (
        first["org.tunesmith.recipe"] == sha256_file(recipe) and first["org.tunesmith.version"] == __version__
    )
    assert labels(constraints=pins)["org.tunesmith.lock"] == first["org.tunesmith.lock"]
    pins.write_text("rich==14.0.0\n")
    assert labels(constraints=pins)["org.tunesmith.lock"] != first["org.tunesmith.lock"]
    with pytest.raises(UserError, match="--recipe"):
        labels(recipe=tmp_path / "none.yaml")


def test_the_lock_pins_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "image.lock.json").write_text(
        json.dumps({"images": {"python:3.11-slim": {"digest": DIGEST, "id": DIGEST}}})
    )
    found = show(options(tmp_path, family="cpu"))
    assert f"FROM python:3.11-slim@{DIGEST} AS base" in found["dockerfile"]


def test_a_wheelhouse_without_vllm_builds_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "rich-15.0.0-py3-none-any.whl").write_bytes(b"")
    assert show(options(tmp_path, driver="580.1", wheelhouse=wheels))["vllm"] is None
    assert "no vLLM 0.33.0" in capsys.readouterr().err
    (wheels / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl").write_bytes(b"")
    assert show(options(tmp_path, driver="580.1", wheelhouse=wheels))["vllm"] == "0.33.0"


def test_a_context_can_be_written_and_kept_without_docker(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / f"tunesmith-{__version__}-py3-none-any.whl").write_bytes(b"own")
    wanted = options(tmp_path, family="cpu", wheelhouse=wheels)
    context = tmp_path / "context"
    found = build(wanted, context=context, dry_run=True)
    assert (context / "Dockerfile").read_text() == found["dockerfile"]
    assert (context / "build" / f"tunesmith-{__version__}-py3-none-any.whl").read_bytes() == b"own"
    assert not (tmp_path / "image.lock.json").exists()
    with pytest.raises(UserError, match="not an empty folder"):
        build(wanted, context=context, dry_run=True)
