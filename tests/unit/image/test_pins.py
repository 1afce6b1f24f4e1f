"""Our pins and those of the base image as one list."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tunesmith.image import pins

REQUIREMENTS = [
    "typer>=0.16",
    "torch>=2.6 ; extra == 'train'",
    "numpy>=1.26 ; extra == 'train'",
    "rich>=13.7",
]
OURS = {"torch": "2.13.0", "numpy": "2.4.6", "typer": "0.29.2", "rich": "15.0.0"}


def test_what_the_base_compiled_against_is_held() -> None:
    base = {"torch": "2.7.0a0+7c8ec84dab", "numpy": "1.26.4", "flash-attn": "2.7.3", "requests": "2.32.3"}
    merged, notes = pins.merge(OURS, {}, base, REQUIREMENTS)
    assert merged["torch"] == "2.7.0a0+7c8ec84dab" and merged["numpy"] == "1.26.4"
    assert merged["flash-attn"] == "2.7.3"
    assert merged["typer"] == "0.29.2" and "requests" not in merged and notes == []


def test_the_bases_constraints_hold_but_where_tunesmith_needs_more() -> None:
    theirs = {"rich": "13.9.4", "typer": "0.15.2", "setuptools": "70.3.0"}
    merged, notes = pins.merge(OURS, theirs, {}, REQUIREMENTS)
    assert merged["rich"] == "13.9.4" and merged["setuptools"] == "70.3.0"
    assert merged["typer"] == "0.29.2"
    assert notes == ["typer 0.15.2 of the base is not what tunesmith needs"]


def test_a_base_with_a_torch_that_is_too_old_stops_the_build() -> None:
    with pytest.raises(SystemExit, match="too old for tunesmith: torch"):
        pins.merge(OURS, {"torch": "2.3.0a0"}, {"torch": "2.3.0a0"}, REQUIREMENTS)


def test_pins_are_read_as_pip_writes_them() -> None:
    text = "# note\nTorch_Audio==2.1 # why\nnumpy === 1.26.4\nx>=2\n-e .\nruamel.yaml==0.18 ; python_version>'3'\n"
    assert pins.read_pins(text) == {"torch-audio": "2.1", "numpy": "1.26.4", "ruamel-yaml": "0.18"}


@pytest.mark.parametrize(
    "name", ["torch", "torchvision", "pytorch-triton", "nvidia-nccl-cu12", "numpy", "apex"]
)
def test_held_names(name: str) -> None:
    assert pins.HELD.fullmatch(name)


@pytest.mark.parametrize("name", ["transformers", "torchmetrics", "peft", "tokenizers", "rich"])
def test_free_names(name: str) -> None:
    assert not pins.HELD.fullmatch(name)


def test_it_runs_in_an_environment_without_tunesmith(tmp_path: Path) -> None:
    """As in a build: alone in a folder, under an environment's own Python that sees no other package."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    build = tmp_path / "build"
    build.mkdir()
    (build / "pins.py").write_text(Path(pins.__file__).read_text())
    (build / "constraints.txt").write_text("typer==0.29.2\ntorch==2.13.0\n")
    with zipfile.ZipFile(build / "tunesmith-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tunesmith-0.1.0.dist-info/METADATA", "Name: tunesmith\nRequires-Dist: typer>=0.16\n")
    python = [venv / "bin" / "python", build / "pins.py"]
    subprocess.run([*python, "write", build], check=True)
    assert (build / "pins.txt").read_text() == "torch==2.13.0\ntyper==0.29.2\n"
    subprocess.run([*python, "check", build], check=True)
    # As if pip had installed over what the base holds: the environment itself has 'pip'.
    (build / "held.json").write_text(json.dumps({"pip": "1"}))
    done = subprocess.run([*python, "check", build], capture_output=True, text=True)
    assert done.returncode == 1 and "installed over the base image's own: pip" in done.stderr
