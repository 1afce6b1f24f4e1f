"""From an xtuner 0.1 config to a recipe file: `tunesmith import xtuner`, and `tunesmith train CONFIG.py`."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tunesmith.convert.ledger import Note
from tunesmith.convert.xtuner import Imported, import_config, recipe_name
from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_text
from tunesmith.core.progress import say
from tunesmith.recipe.load import check

MARK = "# imported from "


@dataclass(frozen=True)
class ImportResult:
    """Where the recipe is (None: not written), its text, what became of each line, and what differs."""

    recipe: Path | None
    text: str
    notes: list[Note]
    differences: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": None if self.recipe is None else str(self.recipe),
            "text": self.text,
            "lines": [note.as_dict() for note in self.notes],
            "differences": self.differences,
        }


def import_xtuner(
    config: Path,
    output: Path | None,
    *,
    xtuner: Path | None = None,
    compat: bool = False,
    deepspeed: bool = False,
    force: bool = False,
) -> ImportResult:
    """Write the recipe of an xtuner config, and its chat template beside it where the model brings none.

    output: None writes nothing. Raises UserError for a config with no counterpart, and for a recipe that is
    there already and was not made from this config.
    """
    found = import_config(config, xtuner=xtuner, compat=compat, deepspeed=deepspeed)
    template = None if output is None or found.chat_template is None else output.with_suffix(".jinja")
    if template is not None:
        found.values["model"]["chat_template"] = str(template)
    text = recipe_text(found, config)
    if output is not None:
        _refuse_other(output, config, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        if template is not None:
            write_text(template, found.chat_template or "")
        write_text(output, text)
    return ImportResult(output, text, found.notes, found.differences)


def recipe_for(path: Path) -> Path:
    """The recipe that `tunesmith train` takes: `path` itself, or the one made of an xtuner config.

    A config's recipe is written beside its run, as runs/NAME.yaml. Raises UserError as `import_xtuner` does.
    """
    if path.suffix != ".py":
        return path
    output = Path("runs") / f"{recipe_name(path)}.yaml"
    found = import_xtuner(path, output)
    say(f"{path}: imported as {output}; what differs from xtuner:")
    for difference in found.differences:
        say(f"  {difference}")
    return output


def recipe_text(found: Imported, config: Path) -> str:
    """The recipe as YAML, checked, with the file it comes from on top."""
    values = json.loads(json.dumps({"name": recipe_name(config)} | found.values))  # plain types alone
    check(values, str(config))
    out = io.StringIO()
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    yaml.allow_unicode = True
    yaml.dump(values, out)
    return f"{_mark(config)}\n{out.getvalue()}"


def _mark(config: Path) -> str:
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    return f"{MARK}{config.name} (sha256 {digest[:16]}) by 'tunesmith import xtuner'"


def _refuse_other(output: Path, config: Path, *, force: bool) -> None:
    """Never write over a recipe that a person wrote."""
    if force or not output.exists():
        return
    first = output.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    if not first.startswith(f"{MARK}{config.name} "):
        raise UserError(
            f"{output}: is there already, and is not the recipe of {config.name}",
            hint="give another file with -o, or write over it with --force",
        )
