"""The plan as a bash script: sound by shellcheck, quoted, and it does what the plan says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.host.test_steps import ADA, GPU, RELEASES, SETTLED, bundle, host
from tunesmith.host.script import script_of
from tunesmith.host.steps import plan_setup
from tunesmith.host.steps_types import Plan, SetupOptions, Step, Write

NASTY = '/data/it\'s $(touch x) `id` "quoted"'


def shellcheck(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + text


@pytest.mark.parametrize("release", RELEASES)
def test_every_plan_is_clean_bash(release: str, tmp_path: Path) -> None:
    options = SetupOptions(
        data_root=NASTY,
        registry_mirrors=("https://your.mirror",),
        proxy="http://ada:it's%20$HOME@10.0.0.1:3128".replace("'", ""),
        docker="docker-ce",
    )
    plan = plan_setup(host(release, GPU), options)
    text = script_of(plan, f"Set up {release}")
    shellcheck(text)
    assert "set -euo pipefail" in text
    assert all(step.why in text for step in plan.steps)
    assert 'usermod -aG docker "${SUDO_USER:-$(id -un)}"' in text


def test_a_plan_from_a_bundle_and_an_empty_one_are_clean_bash(tmp_path: Path) -> None:
    made = bundle(tmp_path / "it's mine", "ubuntu-22.04", ["docker.io_24.0_amd64.deb"])
    shellcheck(script_of(plan_setup(host("ubuntu-22.04", ADA), SetupOptions(bundle=made)), "Set up"))
    text = script_of(plan_setup(host("ubuntu-22.04", SETTLED), SetupOptions()), "Set up")
    shellcheck(text)
    assert "Nothing to do" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="the script asks for root")
def test_the_script_writes_what_the_plan_writes_and_stops_at_a_failure(tmp_path: Path) -> None:
    text = "it's $HOME `id` \\n\nTUNESMITH_END_OF_FILE\n"
    path, late = tmp_path / "a b's" / "file", tmp_path / "late"
    odd = str(tmp_path / "odd $(touch bad) 'name'")
    plan = Plan(
        (
            Step("one", "It's one", "why $(touch bad)", (Write(str(path), text, "0600"), ("touch", odd))),
            Step("two", "Two", "why", (("false",), ("touch", str(late)))),
        ),
        warnings=("first line\nsecond line",),
        env={"WORD": "it's $X"},
    )
    script = script_of(plan, "title\ntouch bad")
    shellcheck(script)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert path.read_text() == text and path.stat().st_mode & 0o777 == 0o600
    assert Path(odd).exists() and not late.exists() and not (tmp_path / "bad").exists()
