"""The card, the stop ids, and what may be replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.export.card import CardFacts, card
from tunesmith.export.save import EXPORT, check_target, copy_tokenizer, license_of, write_generation_config
from tunesmith.recipe.load import parse_yaml


def test_card_head_is_yaml_and_cells_are_escaped() -> None:
    text = card(
        CardFacts(
            name="one",
            kind="adapter",
            base='o"wner/x',
            base_license="mit",
            method="lora",
            data=[{"file": "a|b.jsonl", "rows": 3}],
            results={"held-out loss": 1.23456789},
        )
    )
    head = parse_yaml(text.split("---")[1], "head")
    assert head == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": 'o"wner/x',
        "license": "mit",
        "tags": ["tunesmith", "lora"],
    }
    assert "| a\\|b.jsonl | 3 |" in text and "| held-out loss | 1.235 |" in text


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\ntags: [a]\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_license_of_a_base(tmp_path: Path, readme: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert license_of(tmp_path) == found


def test_generation_config_keeps_the_base_s_settings(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "folder"
    base.mkdir(), folder.mkdir()
    write_generation_config(base, folder, [2], None)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 2}
    (base / "generation_config.json").write_text(
        '{"temperature": 0.7, "eos_token_id": 0, "_from_model_config": true}'
    )
    write_generation_config(base, folder, [2, 0], 5)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"temperature": 0.7, "eos_token_id": [2, 0], "pad_token_id": 5}


def test_tokenizer_copy_takes_only_its_files(tiny: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_targets(tmp_path: Path) -> None:
    check_target(tmp_path / "new")
    check_target(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "x")
    with pytest.raises(UserError, match="no earlier export"):
        check_target(tmp_path)
    (tmp_path / EXPORT).write_text("{}")
    check_target(tmp_path)
