"""tunesmith bundle: a recipe with its model and rows goes from one machine to another, and trains there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli
from tests.hub_server import serve_hub
from tunesmith.cli.bundle import volume_bytes
from tunesmith.core.errors import UserError
from tunesmith.host.collect import this_distro
from tunesmith.workflows.bundle_install import InstallOptions, install

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(24)]
RECIPE = """\
# my first recipe
model: {path: tiny-llama}
data:
  sources:
    - path: rows.jsonl      # my rows
  max_length: 64
train: {epochs: 1, max_steps: 2}
samples: {every: 0}
serve: {api_key: hunter2}
"""


@pytest.fixture
def work(tmp_path: Path, tiny: Path) -> Path:
    """A folder with a recipe, rows and a model, as a user has it."""
    folder = tmp_path / "work"
    shutil.copytree(tiny, folder / "tiny-llama")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def create(cli: Cli, work: Path, *args: str) -> dict[str, object]:
    return cli.json(
        "bundle", "create", "../bundle", "recipe.yaml", "--parts", "model,data,project", *args, cwd=work
    )


def test_a_recipe_is_carried_and_trains_at_its_new_place(cli: Cli, work: Path, tmp_path: Path) -> None:
    made = create(cli, work, "--split", "1M")
    bundle = tmp_path / "bundle"
    assert max(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) <= 1_000_000
    assert list(bundle.rglob("*.part002"))
    assert cli.json("bundle", "verify", bundle, "--expect", str(made["manifest_sha256"]))["ok"]
    shutil.rmtree(work)

    there = tmp_path / "there"
    there.mkdir()
    dry = cli.json("bundle", "install", bundle, "--project", "p", "--dry-run", cwd=there)
    assert dry["steps"] and not list(there.iterdir())
    done = cli.json("bundle", "install", bundle, "--project", "p", cwd=there)
    assert {step["state"] for step in done["steps"]} == {"done"}  # type: ignore[attr-defined]
    again = cli.json("bundle", "install", bundle, "--project", "p", cwd=there)
    assert {step["state"] for step in again["steps"]} == {"there already"}  # type: ignore[attr-defined]
    text = (there / "p" / "recipe.yaml").read_text()
    assert "# my first recipe" in text and "# my rows" in text and "hunter2" not in text
    assert (there / "p" / "recipes" / "quickstart.yaml").is_file()
    trained = cli("train", "recipe.yaml", cwd=there / "p")
    assert trained.returncode == 0, trained.stderr

    (there / "p" / "recipe.yaml").write_text(text + "# mine\n")
    refused = cli("bundle", "install", bundle, "--project", "p", cwd=there)
    assert refused.returncode == 2 and "recipe.yaml: is there already" in refused.stderr


def test_damage_is_named_and_nothing_is_installed(cli: Cli, work: Path, tmp_path: Path) -> None:
    create(cli, work)
    bundle = tmp_path / "bundle"
    rows = next(bundle.rglob("*rows.jsonl"))
    rows.write_text(rows.read_text().replace("Say 7.", "Say 8."))
    (bundle / "stray").write_text("x")
    named = str(rows.relative_to(bundle))
    found = cli("bundle", "verify", bundle, "--json")
    assert found.returncode == 1
    faults = json.loads(found.stdout)["faults"]
    assert [fault["path"] for fault in faults] == [named, "stray"]
    done = cli("bundle", "install", bundle, "--project", "p", cwd=tmp_path)
    assert done.returncode == 1 and f"{named}: changed" in done.stderr and not (tmp_path / "p").exists()
    (bundle / "stray").unlink()
    assert create(cli, work)["ok"] and cli.json("bundle", "verify", bundle)["ok"]
    wrong = cli("bundle", "verify", bundle, "--expect", "0" * 64)
    assert wrong.returncode == 1 and "manifest.json" in wrong.stdout


def test_a_hub_model_and_a_hub_data_set_train_without_the_hub(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "one"))
    recipe = RECIPE.replace("{path: tiny-llama}", "{path: owner/tiny}").replace("rows.jsonl", "owner/rows")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with serve_hub({"owner/tiny": tiny}, {"owner/rows": rows}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        create(cli, tmp_path)
    (tmp_path.parent / "bundle").rename(tmp_path / "bundle")
    for name in ("HF_HOME", "TUNESMITH_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "two" / name))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cli.json("bundle", "install", "bundle", "--project", "p", cwd=tmp_path)
    trained = cli("train", "recipe.yaml", cwd=tmp_path / "p")
    assert trained.returncode == 0, trained.stderr
    assert "offline: true" in (tmp_path / "p" / "recipe.yaml").read_text()


def test_the_scripts_in_a_bundle_are_clean(cli: Cli, work: Path, tmp_path: Path) -> None:
    create(cli, work)
    script = tmp_path / "bundle" / "install.sh"
    checker = shutil.which("shellcheck")
    command = [checker, "--shell=sh", str(script)] if checker else ["sh", "-n", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "basename", "ls", "cat"):
        (tools / name).symlink_to(shutil.which(name) or "")
    command = ["/bin/sh", str(script)]
    missing = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert missing.returncode == 2 and "this bundle needs python3." in missing.stderr, missing.stderr


def test_host_packages_of_this_distribution(cli: Cli, tmp_path: Path) -> None:
    label = this_distro().label
    if not label.startswith(("debian-1", "ubuntu-2")) or not shutil.which("apt-get"):
        pytest.skip("packages are collected on Debian and Ubuntu")
    args = ["--parts", "packages", "--distro", label, "--no-gpu"]
    made = cli.json("bundle", "create", tmp_path / "bundle", *args)
    assert [item["part"] for item in made["items"]] == ["installer", "packages"]  # type: ignore[attr-defined]
    folder = tmp_path / "bundle" / "packages" / label
    names = (folder / "order.txt").read_text().split()
    assert {path.name for path in folder.glob("*.deb")} == set(names)
    assert any(name.startswith("docker.io_") for name in names)
    assert not any(name.startswith(("libc6_", "dpkg_", "bash_")) for name in names)
    for name in names:
        assert subprocess.run(["dpkg-deb", "--info", folder / name], capture_output=True).returncode == 0
    planned = cli("setup", "--bundle", tmp_path / "bundle", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    left = cli.json("bundle", "install", tmp_path / "bundle")
    assert [step["state"] for step in left["steps"]] == ["by hand"], "nobody was there to be asked"  # type: ignore[attr-defined]
    would = cli.json("bundle", "install", tmp_path / "bundle", "--dry-run", "--yes")
    assert [step["state"] for step in would["steps"]] == ["to do" if os.geteuid() == 0 else "by hand"]  # type: ignore[attr-defined]
    called: list[Path] = []
    done = install(InstallOptions(bundle=tmp_path / "bundle", set_up=called.append))
    assert ([step.state for step in done.steps], called) == (["done"], [tmp_path / "bundle"])


@pytest.mark.docker
def test_an_image_is_carried_in_pieces(cli: Cli, use_docker: str, busybox_image: str, tmp_path: Path) -> None:
    tag = "tunesmith-test:carried"
    env = os.environ | {"DOCKER_HOST": use_docker}
    subprocess.run(["docker", "tag", busybox_image, tag], env=env, check=True)
    args = ["--parts", "images", "--image", tag, "--split", "1M"]
    cli.json("bundle", "create", tmp_path / "bundle", *args)
    assert list((tmp_path / "bundle" / "images").glob("*.part001"))
    subprocess.run(["docker", "rmi", tag], env=env, check=True, capture_output=True)
    done = cli.json("bundle", "install", tmp_path / "bundle")
    assert [step["state"] for step in done["steps"]] == ["done"]  # type: ignore[attr-defined]
    ran = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{.Id}}", tag], env=env, capture_output=True, text=True
    )
    assert ran.stdout.startswith("sha256:"), ran.stderr
    again = cli.json("bundle", "install", tmp_path / "bundle")
    assert [step["state"] for step in again["steps"]] == ["there already"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--parts", "packages"], "of which distribution"),
        (["--parts", "images"], "which images"),
        (["--parts", "model,shoes"], "'shoes' is no part"),
        (["--distro", "beos-5"], "is not known"),
        (["--python", "3.10", "--parts", "wheels"], "needs Python 3.11"),
        (["--split", "huge"], "is no size"),
        (["gone.yaml"], "no such recipe"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    cli: Cli, tmp_path: Path, args: list[str], what: str
) -> None:
    done = cli("bundle", "create", tmp_path / "bundle", *args)
    assert done.returncode == 2 and what in done.stderr, done.stderr
    assert not (tmp_path / "bundle").exists()


def test_sizes_of_volumes() -> None:
    assert volume_bytes("4G") == 4_000_000_000 and volume_bytes("700MiB") == 734_003_200
    assert volume_bytes("1.5GB") == 1_500_000_000
    for text in ("", "4X", "-1G", "0", "1K"):
        with pytest.raises(UserError, match="--split"):
            volume_bytes(text)


def test_create_needs_no_network_library_at_start() -> None:
    code = (
        "import sys, tunesmith.cli.bundle, tunesmith.workflows.bundle, tunesmith.workflows.bundle_install\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'huggingface_hub', 'pyinfra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
