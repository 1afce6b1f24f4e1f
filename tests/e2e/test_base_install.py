"""The base install, without torch: what a bare server runs first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tunesmith.cli.main import COMMANDS

HEAVY = "{'torch', 'transformers', 'safetensors', 'datasets', 'numpy'}"
BARE = "bare-ubuntu2204.json"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the base install only, put there by this environment's pip."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-compile", "-c", "constraints.txt", str(ROOT)]
    done = subprocess.run(install, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def call(python: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-m", "tunesmith", *args], cwd=cwd, capture_output=True, text=True)


def test_it_has_no_heavy_package(base: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {HEAVY} if u.find_spec(n)])"
    assert subprocess.run([base, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Each command in a fork of a process that has imported what prints, and the table of commands.
HELP = """
import os, sys
import typer.rich_utils
from tunesmith.cli.main import main
for name in sys.argv[1:]:
    if os.fork() == 0:
        main([name, "--help"])
    assert os.wait()[1] == 0, name
"""


def test_every_command_has_its_help(base: Path, tmp_path: Path) -> None:
    done = subprocess.run([base, "-c", HELP, *COMMANDS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"tunesmith {name}" in done.stdout for name in COMMANDS), done.stdout


def test_doctor_looks_and_setup_plans(base: Path, tmp_path: Path) -> None:
    looked = call(base, "doctor", "--json", cwd=tmp_path)
    assert looked.returncode in (0, 1) and looked.stdout.startswith('{"ok"'), looked.stderr
    facts = str(ROOT / "tests" / "facts" / BARE)
    planned = call(base, "setup", "--dry-run", "--facts", facts, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("args", [["train", "r.yaml"], ["quickstart"], ["lab", "--here"]])
def test_what_needs_more_says_which_extra(base: Path, tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {path: smollm2-135m-instruct}\ndata: {sources: [{path: r.jsonl}]}\n"
    )
    done = call(base, *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "pip install 'tunesmith[" in done.stderr
