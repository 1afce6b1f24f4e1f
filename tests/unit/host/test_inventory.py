"""Hosts as they are named on the command line and in an inventory file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.host.inventory import LOCAL, Target, parse_target, read_inventory


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("gpu1", "gpu1", None, None),
        ("ubuntu@10.0.0.5", "10.0.0.5", "ubuntu", None),
        ("ubuntu@gpu1.lan:2222", "gpu1.lan", "ubuntu", 2222),
        ("root@[fe80::1]:22", "fe80::1", "root", 22),
    ],
)
def test_a_target(text: str, host: str, user: str | None, port: int | None) -> None:
    assert parse_target(text) == Target(text, host, user, port)


def test_this_host_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert parse_target("@local") == LOCAL and LOCAL.is_local
    folder = parse_target(f"@chroot/{tmp_path}")
    assert folder.is_chroot and folder.name == f"@chroot{tmp_path}" and not folder.is_local


@pytest.mark.parametrize(
    "text", ["", "a b", "user@", "-oProxyCommand=x", "@docker/x", "h:99999", "h;id", "a@b@c", "@chroot/nowhere", "@chroot//"]
)  # fmt: skip
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert caught.value.hint


def test_an_inventory(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    file = tmp_path / "hosts.yaml"
    file.write_text(
        f"hosts:\n  - {{host: gpu1, user: ada, port: 2222, key: {tmp_path}/key}}\n  - root@gpu2\n"
    )
    first, second = read_inventory(file)
    assert first == Target("ada@gpu1:2222", "gpu1", "ada", 2222, tmp_path / "key")
    assert second == Target("root@gpu2", "gpu2", "root")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hosts: [", "line 2|line 1"),
        ("", "no list of hosts"),
        ("hosts: []", "no list of hosts"),
        ("hosts: gpu1", "no list of hosts"),
        ("- {user: ada}", r"hosts\[0\]: .* names no host"),
        ("- {host: gpu1, password: x}", "'password' is not a key"),
        ("- {host: gpu1, port: many}", "port: 'many' is not a number"),
        ("- {host: gpu1, port: 70000}", "not a TCP port"),
        ("- {host: gpu1, key: /nowhere/key}", "does not exist"),
        ("- gpu1\n- gpu1", "named twice"),
        ("- '-oX'", r"hosts\[0\]: '-oX' is not a host"),
        ("- {host: [1]}", "names no host"),
    ],
)
def test_a_bad_inventory_is_one_clear_error(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=fault) as caught:
        read_inventory(file)
    assert str(file) in caught.value.what and caught.value.hint
