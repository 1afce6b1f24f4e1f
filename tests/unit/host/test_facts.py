"""Facts files: read, refused with the place of the fault, written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.host.facts import UNKNOWN, Answer, Facts, load_facts


def test_what_is_absent_answers_as_an_unknown_command() -> None:
    facts = Facts()
    assert facts.answer("docker info").rc == UNKNOWN
    assert facts.file("/etc/os-release") is None


@pytest.mark.parametrize(
    "spelling",
    [
        "lsmod|grep -w nouveau",
        "lsmod | grep -w nouveau",
        "lsmod \\| grep  -w nouveau",
        "sudo lsmod |grep -w nouveau",
    ],
)
def test_spellings_of_one_command(spelling: str) -> None:
    facts = Facts({spelling: Answer(0, "nouveau 1 2\n")})
    assert facts.answer("lsmod|grep -w nouveau").ok
    assert facts.has("lsmod|grep -w nouveau")


def test_docker_formats_in_any_spelling() -> None:
    for spelling in (
        "--format '{{.CgroupDriver}}'",
        '-f "{{.CgroupDriver}}"',
        "--format='{{.CgroupDriver}}'",
    ):
        facts = Facts({f"docker info {spelling}": Answer(0, "systemd\n")})
        assert facts.answer("docker info -f '{{.CgroupDriver}}'").stdout == "systemd\n"


def test_round_trip(tmp_path: Path) -> None:
    facts = Facts(
        {"a b": Answer(3, "é\n", "x")}, {"/etc/os-release": "ID=debian\n"}, {"HF_ENDPOINT": "https://m"}
    )
    facts.save(tmp_path / "facts.json")
    assert load_facts(tmp_path / "facts.json") == facts


def test_outputs_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text('{"commands": {"getenforce": {"rc": 0, "stdout": "Enforcing"}}, "note": "by hand"}')
    assert load_facts(path).answer("getenforce") == Answer(0, "Enforcing", "")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([], "is not an object"),
        ({"command": {}}, "none of 'commands', 'files', 'env'"),
        ({"commands": []}, "commands"),
        ({"commands": {"a": "text"}}, "'a'"),
        ({"commands": {"a": {"stdout": ""}}}, "rc"),
        ({"commands": {"a": {"rc": "0"}}}, "rc"),
        ({"commands": {"a": {"rc": True}}}, "rc"),
        ({"commands": {"a": {"rc": 0, "stdout": 1}}}, "stdout"),
        ({"files": {"/x": None}}, "'/x'"),
        ({"env": {"A": 1}}, "'A'"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, value: Any, place: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        load_facts(path)
    assert place in error.value.what and str(path) in error.value.what
    assert error.value.hint


def test_no_json_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    with pytest.raises(UserError, match="No such file"):
        load_facts(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_facts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not JSON"):
        load_facts(path)
