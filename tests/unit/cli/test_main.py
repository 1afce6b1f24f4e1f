from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tunesmith.cli.main import COMMANDS


def test_help_lists_every_command(cli: Cli) -> None:
    out = cli("--help").stdout
    assert all(f"  {name} " in out for name in COMMANDS)
    assert cli().stdout == out


def test_unknown_command_and_option(cli: Cli) -> None:
    done = cli("trian", "--json")
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr
    assert json.loads(done.stdout)["error"]["what"] == "tunesmith: 'trian' is not a command"
    done = cli("schema", "--jsn")
    assert done.returncode == 2 and "--jsn" in done.stderr and not done.stdout


def test_schema_describes_every_section(cli: Cli) -> None:
    schema = cli.json("schema")
    assert {"model", "data", "method", "train", "eval", "samples", "serve", "hardware"} <= set(
        schema["properties"]
    )  # type: ignore[arg-type]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("command", ["train", "data"])
def test_errors_have_one_object_on_stdout_and_no_traceback(cli: Cli, command: str, tmp_path: Path) -> None:
    args = ["train"] if command == "train" else ["data", "check"]
    done = cli(*args, tmp_path / "none.yaml", "--json")
    assert done.returncode == 2 and "no such recipe" in json.loads(done.stdout)["error"]["what"]
    assert "Traceback" not in done.stderr
