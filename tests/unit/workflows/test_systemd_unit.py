"""The systemd unit that `tunesmith serve --systemd-unit` prints."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.workflows.keys import KeyOptions, add
from tunesmith.workflows.serve_settings import ServeOptions, deployment
from tunesmith.workflows.systemd_unit import systemd_unit, unit_for_command

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "tunesmith.service"


def text() -> str:
    return systemd_unit(
        ["/opt/tunesmith/bin/python", "-m", "tunesmith", "serve", "runs/my orders", "--model-name", "50%$x"],
        user="llm",
        folder=Path("/srv/models"),
        cache=Path("/var/cache/tunesmith"),
        writable=[Path("/srv/keys"), Path("/var/log/my llm"), Path("/srv/keys")],
        grace_s=30,
    )


def test_unit_is_as_it_was() -> None:
    assert text() == GOLDEN.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    unit = tmp_path / "tunesmith.service"
    # A program and a user that exist everywhere; all else is what is checked.
    unit.write_text(text().replace("/opt/tunesmith/bin/python", "/bin/true").replace("User=llm", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if unit.name in line] == []


def unit_of(*args: str, bare: bool = False, **settings: object) -> str:
    wanted = deployment("x", ServeOptions(settings={"keys_file": "none"} | settings))
    return unit_for_command(["serve", "x", *args], wanted, key_is_bare=bare)


def test_a_key_that_everybody_could_read_is_refused() -> None:
    with pytest.raises(UserError, match="everybody") as refused:
        unit_of(bare=True)
    assert "--api-key-file" in str(refused.value.hint)


def test_the_command_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ("--json", "--systemd-unit", "--port", "80")
    unit = unit_of(*typed, log_requests="logs/a.jsonl", grace_s="90")
    assert "-m tunesmith serve x --port 80\n" in unit
    assert f"WorkingDirectory={tmp_path}\n" in unit
    assert f" -{tmp_path}/logs\n" in unit
    assert "TimeoutStopSec=105\n" in unit
    assert "/logs" not in unit_of(log_requests="-")


def test_the_file_of_keys_is_named_whatever_named_it_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / "etc" / "k.json"
    add("alice", KeyOptions(), keys)
    unit = unit_of(keys_file="etc/k.json")
    assert f"serve x --keys-file {keys}\n" in unit and f" -{tmp_path}/etc\n" in unit
    typed = unit_of("--keys-file=etc/k.json", keys_file="etc/k.json")
    assert "serve x --keys-file=etc/k.json\n" in typed


def test_a_line_break_cannot_smuggle_a_setting_in() -> None:
    with pytest.raises(UserError, match="line break"):
        systemd_unit(
            ["x", "a\nUser=root"], user="a", folder=Path("/"), cache=Path("/c"), writable=[], grace_s=1
        )
