"""Options made out of a recipe's section: each field has one, and its value goes on as it was typed."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from tunesmith.cli.serve import SETTINGS
from tunesmith.recipe.serving import Serve, option_of


@pytest.fixture
def called() -> Any:
    """Calls a command with the options of `serve`, and tells what it was given."""
    app, found = typer.Typer(add_completion=False), {}

    @app.command()
    @SETTINGS.options
    def command(model: str = typer.Argument(), flag: bool = False, **given: Any) -> None:
        found.update(given, model=model, flag=flag)

    def call(*args: str) -> dict[str, Any]:
        found.clear()
        app(args=list(args), standalone_mode=False)
        return {name: value for name, value in found.items() if value}

    return call


def test_every_setting_is_under_one_heading() -> None:
    listed = [name for names in SETTINGS.panels.values() for name in names]
    assert sorted(listed) == sorted(Serve.model_fields)


def test_values_are_what_was_typed(called: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_KEYS_FILE")
    assert called("m") == {"model": "m"}
    given = called("m", "--port", "x1", "--adapter", "a=b", "--adapter", "c", "--log-prompts", "--flag",
                   "--grace", "5", "--request-timeout", "7", "--cors-origin", "*")  # fmt: skip
    assert given == {
        "model": "m", "port": "x1", "adapters": ["a=b", "c"], "log_prompts": True, "flag": True,
        "grace_s": "5", "request_timeout_s": "7", "cors_origins": ["*"],
    }  # fmt: skip


def test_a_variable_stands_for_an_option(called: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_KEYS_FILE", "k.json")
    monkeypatch.setenv("TUNESMITH_API_KEY", "")
    assert called("m") == {"model": "m", "keys_file": "k.json"}
    assert called("m", "--keys-file", "none")["keys_file"] == "none"


def test_help_has_the_fields_own_words_and_defaults(
    called: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    called("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in Serve.model_fields:
        assert option_of(name) in text
    assert "more wait in line. Default: 32." in text
    assert "Largest body of a request, in MiB. Default: 8." in text
    assert "--no-merge" in text and "FILE|none" in text
