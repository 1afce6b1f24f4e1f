"""What the documents say exists: commands, options, files, recipe keys."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli
from tunesmith.cli.main import COMMANDS
from tunesmith.recipe.load import check, parse_yaml

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# Commands with commands below them.
GROUPS = {"data", "image", "bundle", "import", "verify", "bench", "keys", "jobs"}
CALL = re.compile(r"^(?:\$ )?tunesmith (\w+)(.*)$", re.MULTILINE)


@cache
def help_of(command: str, below: str = "") -> str:
    done = Cli()(command, *([below] if below else []), "--help", env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "reference" not in p.parts], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_and_options_exist(page: Path) -> None:
    for command, rest in CALL.findall(page.read_text(encoding="utf-8")):
        assert command in COMMANDS, f"{page}: tunesmith {command}"
        below = rest.split()[0] if command in GROUPS else ""
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.split("#")[0]):
            assert option in help_of(command, below), f"{page}: tunesmith {command} {option}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/guides/*.md")], ids=lambda p: p.name)
def test_recipes_in_the_text_are_recipes(page: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    found = [text for text in blocks if re.search(r"^(model|data|method|train):", text, re.MULTILINE)]
    assert found or page.name not in ("README.md", "own-data.md")
    for text in found:
        check(parse_yaml(text, page.name), page.name)


def test_scripts_of_the_readme_are_there_and_can_be_run() -> None:
    for name in set(re.findall(r"scripts/\w+", (ROOT / "README.md").read_text(encoding="utf-8"))):
        assert (ROOT / name).stat().st_mode & 0o111, name


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    assert all(path.name in listed for path in ROOT.glob("docs/adr/0*.md"))
