"""A run keeps what its tokens were: what has changed since is found before an endpoint says that it is ready."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import write_recipe
from tunesmith.core.errors import UserError
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.open_engine import open_engine
from tunesmith.workflows.served_models import Facts, served_models


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; the base that it was trained on lies beside the folder of runs."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny, folder / "base")
    recipe = write_recipe(folder, folder / "base", train={"max_steps": 2}, eval={"every": 2})
    done = Cli()("train", recipe)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


def models(run: Path) -> list[str]:
    """What an endpoint of this run would serve."""
    engine, facts = open_engine(EngineWants(path=str(run), max_concurrent=1, max_length=64))
    engine.close(grace_s=0.0)
    return list(served_models(Facts.of(facts)))


@contextmanager
def changed(file: Path, change: Callable[[str], str]) -> Iterator[None]:
    """Another content for a while."""
    before = file.read_text()
    file.write_text(change(before))
    try:
        yield
    finally:
        file.write_text(before)


def other_merges(text: str) -> str:
    values: dict[str, Any] = json.loads(text)
    values["model"]["merges"].pop()
    return json.dumps(values)


def other_end(text: str) -> str:
    return json.dumps(json.loads(text) | {"eos_token_id": [2, 0]})


CHANGES = {
    "tokenizer": ("tokenizer/tokenizer.json", other_merges),
    "chat template": ("tokenizer/chat_template.jinja", lambda text: text + " "),
    "stop tokens": ("../../base/generation_config.json", other_end),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_after_the_training_is_refused(run: Path, what: str) -> None:
    file, change = CHANGES[what]
    with (
        changed(run / file, change),
        pytest.raises(UserError, match=rf"the {what} to be served .*lock\.json"),
    ):
        models(run)


def test_the_command_refuses_too(run: Path, cli: Cli) -> None:
    file, change = CHANGES["chat template"]
    with changed(run / file, change):
        done = cli("serve", run, "--port", "0", "--json")
    assert done.returncode == 2
    assert "the chat template to be served" in json.loads(done.stdout)["error"]["what"]


def test_an_unchanged_run_is_served_and_one_of_an_earlier_version_as_before(run: Path) -> None:
    assert models(run) == ["run", "base"]
    file, change = CHANGES["stop tokens"]
    without_tokens = lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "tokens"})  # noqa: E731
    with changed(run / "lock.json", without_tokens), changed(run / file, change):
        assert models(run) == ["run", "base"]


def test_another_version_of_the_tokenizers_is_told_and_not_compared(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def earlier(text: str) -> str:
        lock = json.loads(text)
        lock["versions"]["tokenizers"] = "0.1"
        lock["tokens"]["tokenizer_hash"] = "0" * 64
        return json.dumps(lock)

    with changed(run / "lock.json", earlier):
        assert models(run) == ["run", "base"]
    assert "tokenizers was 0.1" in " ".join(capsys.readouterr().err.split())
