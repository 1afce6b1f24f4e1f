"""Fixtures: every test has its own cache and folder; models are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling

from tests import warm
from tests.docker_daemon import busybox_image, docker_host, python_image, use_docker
from tests.ssh_server import ssh_server
from tunesmith.core.paths import cache_dir

__all__ = ["busybox_image", "docker_host", "python_image", "ssh_server", "use_docker"]

ROOT = Path(__file__).resolve().parent.parent
# The files that take longest: started first, so that none of them runs alone at the end.
LONGEST = (
    "test_containers", "test_image", "test_airgap", "test_parallel", "test_plan_parallel", "test_plan_memory",
    "test_plan_time", "test_plan_fit", "test_methods", "test_parallel_faults", "test_train_faults",
    "test_foreign_clients", "test_serve", "test_engine_exact", "test_mixed_adapters",
    "test_gguf_llamacpp", "test_serve_engines", "test_served_tokens", "test_parity", "test_train",
    "test_lab_files", "test_setup", "test_preference", "test_verify", "test_train_kill", "test_bench", "test_quickstart",
    "test_builtin_model", "test_train_cluster", "test_store", "test_doctor_cluster", "test_serve_load", "test_bundle", "test_serve_process", "test_base_install",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="take the cases that are marked 'whole' too")


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether tests with many cases of one kind take all of them: minutes more."""
    return _takes_all(request.config)


def _takes_all(config: pytest.Config) -> bool:
    """With --whole, and where a case is named: tests/test_x.py::test_y[case]."""
    return bool(config.getoption("--whole")) or any("[" in name for name in config.args)


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts in the background with Ctrl-C ignored, and programs would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Compiled once, not by every test that has a cache of its own.
    os.environ.setdefault("TUNESMITH_KERNELS", str(cache_dir() / "kernels"))
    warm.ENVIRONMENT.update(os.environ)
    warm.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out(config, items)
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if "docker_host" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("docker"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The cases marked "whole" repeat what others prove, with other values."""
    left_out = [item for item in items if item.get_closest_marker("whole")]
    if left_out and not _takes_all(config):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class FilesAndGroups(LoadGroupScheduling):
    """Each file goes to one worker whole; of all files, the tests with docker share a daemon and its images."""

    def _split_scope(self, nodeid: str) -> str:
        group = super()._split_scope(nodeid)
        return nodeid.split("::", 1)[0] if group == nodeid else group


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndGroups:
    return FilesAndGroups(config, log)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the caches or keys of another, or of the user."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TUNESMITH_API_KEY", raising=False)
    monkeypatch.setenv("TUNESMITH_KEYS_FILE", "none")  # a server asks for no key of the user's own file


@pytest.fixture(scope="session")
def smol() -> Path:
    """Folder of the built-in model smollm2-135m-instruct, made once and kept between test runs."""
    given = os.environ.get("TUNESMITH_TEST_SMOL")
    if given:
        return Path(given)
    from tunesmith.hub.sources import resolve_model

    return resolve_model("smollm2-135m-instruct").folder


@pytest.fixture(scope="session")
def tiny(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with SmolLM2's tokenizer and template: fast, and a real model."""
    return _two_layers(tmp_path_factory.mktemp("tiny") / "tiny-llama", smol, 49152)


@pytest.fixture(scope="session")
def trainee(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny`, with the first 2,048 tokens of its vocabulary: read and trained in a part of the time."""
    from tests.tiny_models import keep_tokens

    folder = _two_layers(tmp_path_factory.mktemp("trainee") / "tiny-llama", smol, 2048)
    keep_tokens(folder, 2048)
    return folder


def _two_layers(folder: Path, smol: Path, vocab_size: int) -> Path:
    from transformers import AutoTokenizer

    from tests.tiny_models import make

    sizes = {"vocab_size": vocab_size, "intermediate_size": 128, "max_position_embeddings": 1024}
    tokens = {"eos_token_id": 2, "pad_token_id": 2}
    make(wide=False, **sizes, **tokens, tie_word_embeddings=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smol).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder with real Alpaca and ShareGPT shaped files; it is not part of the repository."""
    given = os.environ.get("TUNESMITH_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not (folder / "alpaca_en_demo.json").is_file():
        pytest.skip("alpaca_en_demo.json is not here: set TUNESMITH_TEST_DATA to its folder")
    return folder


class Cli:
    """Runs the real command in a process of its own; see tests/warm.py for how it is started."""

    def __call__(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        timeout: float = 300,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        pipe = subprocess.PIPE
        with warm.start(*args, env=env, cwd=cwd, stdout=pipe, stderr=pipe) as process:
            try:
                out, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def json(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        timeout: float = 300,
        env: dict[str, str] | None = None,
    ) -> dict[str, object]:
        """Run with --json, expect success, and return the one object on stdout."""
        done = self(*args, "--json", cwd=cwd, timeout=timeout, env=env)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == 1, done.stdout
        return json.loads(lines[0])


@pytest.fixture
def cli() -> Cli:
    return Cli()
