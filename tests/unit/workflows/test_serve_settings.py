"""What `tunesmith serve` is asked to do: recipe, command line and the user's keys, put together."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.recipe.load import dump_yaml, load_recipe
from tunesmith.recipe.resolve import without_secrets
from tunesmith.serve.keys import Key, add_key, hashed
from tunesmith.workflows.serve_settings import (
    Deployment,
    ServeOptions,
    deployment,
    engine_wants,
    split_adapters,
)

MIB = 1024**2
SECTION = """
serve:
  api_key: secret
  port: 9001
  engine: local
  weights: bf16
  adapters: {legal: runs/legal}
  max_body_mib: 2
  request_timeout_s: 60
  grace_s: 20
  log_requests: requests.jsonl
  log_prompts: true
"""


@pytest.fixture(autouse=True)
def own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's own file of keys would be; there is none yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TUNESMITH_KEYS_FILE")
    return tmp_path / "config" / "tunesmith" / "keys.json"


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose recipe says how it is deployed."""
    run = make_run(tmp_path_factory.mktemp("runs") / "orders", tiny, steps=(5,))
    run.recipe.write_text(run.recipe.read_text() + SECTION)
    run.resolved.write_text(dump_yaml(without_secrets(load_recipe(run.recipe))))
    return run


def asked(path: str | RunFolder, *adapters: str, **settings: Any) -> Deployment:
    path = str(path.path) if isinstance(path, RunFolder) else path
    return deployment(path, ServeOptions(settings=settings, adapters=adapters))


def add(file: Path, name: str, **limits: Any) -> None:
    add_key(file, Key(name=name, sha256=hashed(name.encode()), created=datetime.now(UTC), **limits))


def test_the_runs_recipe_says_how_it_is_deployed(run: RunFolder) -> None:
    wanted = asked(run)
    settings = wanted.settings
    assert (settings.port, settings.engine, settings.api_key) == (9001, "local", "secret")
    assert (settings.log_requests, settings.log_prompts, settings.grace_s) == ("requests.jsonl", True, 20)
    assert (wanted.bounds.max_body_bytes, wanted.bounds.request_timeout_s) == (2 * MIB, 60)
    wants = engine_wants(wanted, ServeOptions(device="cpu", threads=3))
    assert (wants.path, wants.weights, wants.precision) == (str(run.path), "bf16", "auto")
    assert (wants.adapters, wants.device, wants.threads) == ({"legal": "runs/legal"}, "cpu", 3)
    assert "secret" not in run.resolved.read_text()


def test_a_run_from_before_these_settings_is_served_with_their_defaults(run: RunFolder) -> None:
    lines = run.resolved.read_text().splitlines()
    start = lines.index("serve:")
    end = next(n for n in range(start + 1, len(lines)) if not lines[n].startswith(" "))
    of_old = ("host", "port", "api_key", "model_name", "max_length", "max_concurrent", "precision")
    kept = [line for line in lines[start + 1 : end] if line.strip().split(":")[0] in of_old]
    whole = run.resolved.read_text()
    try:
        run.resolved.write_text("\n".join([*lines[: start + 1], *kept, *lines[end:]]))
        settings = asked(run).settings
    finally:
        run.resolved.write_text(whole)
    assert (settings.port, settings.engine, settings.grace_s, settings.adapters) == (9001, "auto", 8, {})


def test_the_command_line_goes_over_the_recipe(run: RunFolder) -> None:
    wanted = asked(run, "mails=runs/mails", port="80", log_prompts=False, max_length="auto", replicas="2")
    settings = wanted.settings
    assert (settings.port, settings.replicas, settings.log_prompts) == (80, 2, False)
    assert settings.adapters == {"mails": "runs/mails"}
    assert settings.request_timeout_s == 60


@pytest.mark.parametrize(
    ("given", "weights", "precision"),
    [
        ({"weights": "int8"}, "int8", "auto"),
        ({"precision": "fp32"}, None, "fp32"),
        ({"weights": "bf16", "precision": "bf16"}, "bf16", "bf16"),
    ],
)
def test_weights_and_precision_are_two_words_for_one_thing(
    run: RunFolder, given: dict[str, str], weights: str | None, precision: str
) -> None:
    wants = engine_wants(asked(run, **given), ServeOptions())
    assert (wants.weights, wants.precision) == (weights, precision)


def test_all_faults_of_the_command_line_come_at_once_under_their_own_names() -> None:
    given = {"port": "99999", "engine": "gguf", "tls_key": "k.pem", "log_prompts": True, "weights": "fp32"}
    given |= {"precision": "bf16", "cors_origins": ["example.org"], "grace_s": "inf", "max_length": "0"}
    given |= {"request_timeout_s": "soon", "host": ""}
    with pytest.raises(RecipeErrors) as found:
        asked("x", **given)
    told = "\n".join(fault.what for fault in found.value.faults)
    for words in (
        "--port: serve.port: '99999' is greater than 65535",
        "--engine: serve.engine: 'gguf' is not one of",
        "--tls-key: serve.tls_key: 'k.pem' has no effect without serve.tls_cert",
        "--log-prompts: serve.log_prompts: True has no effect without serve.log_requests",
        "--weights: serve.weights: 'fp32' is not what serve.precision says: 'bf16'",
        "--cors-origin: serve.cors_origins: a list has 'example.org'",
        "--grace: serve.grace_s: 'inf' is not a finite number",
        "--max-length: serve.max_length: '0' is less than 8",
        "--request-timeout: serve.request_timeout_s: 'soon' is not a number",
        "--host: serve.host: '' is empty",
    ):
        assert words in told
    assert len(found.value.faults) == 10


def test_a_recipe_stands_for_its_run(run: RunFolder, tmp_path: Path) -> None:
    recipe = tmp_path / "orders.yaml"
    recipe.write_text(run.recipe.read_text().replace("9001", "9002") + f"output_dir: {run.path.parent}\n")
    wanted = asked(str(recipe))
    assert (wanted.path, wanted.settings.port, wanted.settings.api_key) == (str(run.path), 9002, "secret")
    other = tmp_path / "mails.yaml"
    recipe.rename(other)
    with pytest.raises(UserError, match="mails is not there") as refused:
        asked(str(other))
    assert refused.value.hint == f"tunesmith train {other}"


def test_the_users_own_keys_are_asked_for_when_there_are_any(own_keys: Path) -> None:
    none = asked("x")
    assert (none.keys_file, none.keys_text) == (None, None)
    add(own_keys, "alice")
    add(own_keys, "bob", expires=datetime.now(UTC) - timedelta(days=1))
    own = asked("x", host="0.0.0.0")
    assert own.keys_file == own_keys
    told = f"asks for an API key: {own_keys} has 2, 1 of them expired  (--keys-file none: asks for none)"
    assert own.keys_text == told
    assert asked("x", keys_file="none").keys_file is None
    own_keys.write_text(json.dumps({"version": 1, "keys": []}))
    assert asked("x").keys_file is None


def test_a_file_that_is_named_goes_over_the_users_own(own_keys: Path, tmp_path: Path) -> None:
    add(own_keys, "alice")
    named = tmp_path / "k.json"
    with pytest.raises(UserError, match="there is no such file of keys"):
        asked("x", keys_file=str(named))
    add(named, "carol")
    wanted = asked("x", keys_file=str(named))
    assert (wanted.keys_file, wanted.keys_text) == (named, f"asks for an API key: {named} has 1")
    named.write_text(json.dumps({"version": 1, "keys": []}))
    assert asked("x", keys_file=str(named)).keys_text == f"asks for an API key: {named} has 0"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_own_keys_that_cannot_be_read_are_no_open_door(own_keys: Path, content: str) -> None:
    own_keys.parent.mkdir(parents=True)
    own_keys.write_text(content)
    with pytest.raises(UserError, match=r"keys\.json") as refused:
        asked("x")
    assert "--keys-file none" in str(refused.value.hint)
    assert asked("x", keys_file="none").keys_file is None
    own_keys.unlink()
    own_keys.mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        asked("x")


def test_an_address_that_others_reach_needs_a_key(own_keys: Path) -> None:
    for settings in ({}, {"keys_file": "none"}):
        with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: without an API key"):
            asked("x", host="0.0.0.0", **settings)
    assert asked("x", host="0.0.0.0", api_key="k").settings.api_key == "k"
    assert deployment("x", ServeOptions(settings={"host": "::"}, allow_open=True)).keys_file is None
    add(own_keys, "alice")
    assert asked("x", host="0.0.0.0").keys_file == own_keys


def test_adapters_of_the_command_line() -> None:
    assert split_adapters([]) == (None, {})
    assert split_adapters(["runs/a", "b=runs/b", "c=x=y"]) == ("runs/a", {"b": "runs/b", "c": "x=y"})
    assert split_adapters(["./odd=name/x"]) == ("./odd=name/x", {})
    for bad, words in ((["a", "b"], "one already"), (["=x"], "NAME=FOLDER"), (["a="], "NAME=FOLDER"),
                       (["a=1", "a=2"], "twice")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            split_adapters(bad)


def test_an_adapter_in_place_of_the_models_own_gives_it_its_name(run: RunFolder) -> None:
    def name(adapter: str, **settings: str) -> str | None:
        return engine_wants(asked("x", adapter, **settings), ServeOptions()).model_name

    assert name(str(run.path)) == name(str(run.checkpoint(5) / "adapter")) == "orders"
    assert name("/some/folder") == "folder"
    assert name("/some/folder", model_name="given") == "given"
