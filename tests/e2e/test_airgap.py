"""A machine without network, prepared from a bundle only: a network namespace with nothing but loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
        reason="a network namespace needs root, unshare and ip",
    ),
]
# Rows and steps enough to go through every stage, and no more.
SHORT = ["--rows", "8", "--test-rows", "3", "--set", "samples.every=0", "--set", "eval.max_rows=2",
         "--set", "train.max_steps=2", "--set", "hardware.threads=1"]  # fmt: skip
# Notes every address that Python asks for or connects to, in each process of the environment.
AUDIT = """\
import os, sys; sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") \
and open(os.environ["AUDIT"], "a").write(f"{args[-1] if event == 'socket.connect' else args[0]}\\n") and None)
"""


@pytest.fixture(scope="module")
def bundle(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's bundle; its wheels are kept between runs where $TUNESMITH_TEST_CACHE is set."""
    kept = os.environ.get("TUNESMITH_TEST_CACHE")
    target = (Path(kept) if kept else tmp_path_factory.mktemp("airgap")) / "bundle"
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(smol, cache / "models" / "smollm2-135m-instruct")
    done = Cli()("bundle", "create", target, "--json", env={"TUNESMITH_CACHE": str(cache)}, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    shutil.rmtree(cache)
    return target


class Machine:
    """A home of its own, no settings of this one, and no network but loopback (`lo=False`: not even that)."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir()

    def __call__(self, *args: str | Path, lo: bool = True) -> subprocess.CompletedProcess[str]:
        python = Path(os.path.realpath(sys.executable)).parent
        env = {
            "PATH": f"{python}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",  # the other tests want a core as well
            "AUDIT": str(self.home / "audit.log"),
        }
        up = 'ip link set lo up && exec "$@"' if lo else 'exec "$@"'
        command = ["unshare", "--net", "sh", "-c", up, "sh", *map(str, args)]
        return subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True, timeout=1500)


@pytest.mark.timeout(1800)  # installing alone takes minutes where the disk is slow
def test_quickstart_on_a_machine_that_has_only_the_bundle(bundle: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    assert machine("ip", "-o", "link").stdout.count("\n") == 1
    done = machine("sh", bundle / "install.sh", "--venv", "env")
    assert done.returncode == 0, done.stderr
    assert (machine.home / ".cache/tunesmith/models/smollm2-135m-instruct/manifest.json").is_file()
    assert (machine.home / "tunesmith/recipes/quickstart.yaml").is_file()
    tunesmith = machine.home / "env" / "bin" / "tunesmith"

    again = machine("sh", bundle / "install.sh", "--venv", "env", "--json")
    assert again.returncode == 0, again.stderr
    assert {step["state"] for step in json.loads(again.stdout)["steps"]} == {"there already"}

    (packages,) = (machine.home / "env" / "lib").glob("python*/site-packages")
    (packages / "audit.pth").write_text(AUDIT)
    cut = machine(tunesmith, "quickstart", *SHORT, "--json", lo=False)
    assert cut.returncode == 2 and "ip link set lo up" in cut.stderr

    ran = machine(tunesmith, "quickstart", *SHORT, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["template_parity"] and len(found["endpoint_answers"]) == 3 and found["steps"] > 0
    assert Path(found["merged"]).is_relative_to(machine.home)
    asked = {
        line for line in (machine.home / "audit.log").read_text().splitlines() if "127.0.0.1" not in line
    }
    assert not asked, asked


def test_a_damaged_bundle_installs_nothing(bundle: Path, tmp_path: Path) -> None:
    broken = bundle.with_name("broken")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(bundle, broken, copy_function=os.link)
    wheel = next((broken / "wheels").glob("transformers-*.whl"))
    content = bytearray(wheel.read_bytes())
    content[1000] ^= 4
    wheel.unlink()  # it is one file with the whole bundle's
    wheel.write_bytes(content)
    machine = Machine(tmp_path / "machine")
    done = machine("sh", broken / "install.sh", "--venv", "env")
    shutil.rmtree(broken)
    assert done.returncode == 1 and f"wheels/{wheel.name}: changed" in done.stderr
    assert not (machine.home / "env").exists() and not (machine.home / ".cache").exists()
