"""The quickstart: one command that fine-tunes a small real model, proves it, exports it and serves it.

    data -> base score -> train -> tuned score -> adapter, merged -> endpoint

What each stage found is kept in the run folder; a second call repeats only what has not been finished. The
endpoint is asked anew each time.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruamel.yaml import YAML

import tunesmith
from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_json, write_json, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder
from tunesmith.model.weights import is_adapter, read_json_file
from tunesmith.recipe.load import load_recipe
from tunesmith.workflows.data import show_rows
from tunesmith.workflows.endpoint import ask, check_loopback, same_tokens, serving
from tunesmith.workflows.evaluate import evaluate_model
from tunesmith.workflows.export import export_run
from tunesmith.workflows.shipped import shipped
from tunesmith.workflows.train import sole_trainer, train_recipe

RECIPE = "recipes/quickstart.yaml"
GENERATOR = "examples/quickstart/make_data.py"
FOLDER = "quickstart"  # in the run folder: rows, recipe, state, the server's log
ROWS_SHOWN = 3
QUESTIONS = 3
ANSWER_TOKENS = 40  # the longest expected answer of the shipped rows has 33
STAGES = ("base", "train", "tuned", "adapter", "merged")

Found = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """output: the run folder; rows, test_rows: how many are made; overrides: `section.key=value` laid over
    the shipped recipe; fresh: remove an earlier quickstart in `output` first."""

    output: Path = Path("runs/quickstart")
    rows: int = 600
    test_rows: int = 100
    seed: int = 0
    overrides: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True)
class QuickstartResult:
    """What the stages found; `answers` came from the endpoint, `seconds` is the time of every stage."""

    run: Path
    base: Found
    train: Found
    tuned: Found
    adapter: Path
    merged: Path
    answers: list[Found]
    template_parity: bool
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "base_exact_match": self.base["exact_match"],
            "tuned_exact_match": self.tuned["exact_match"],
            "train_seconds": self.train["train_seconds"],
            "tokens_per_s": self.train["tokens_per_s"],
            "steps": self.train["steps"],
            "run": str(self.run),
            "adapter": str(self.adapter),
            "merged": str(self.merged),
            "endpoint_answers": self.answers,
            "template_parity": self.template_parity,
            "test_rows": self.tuned["rows"],
            "base_loss": self.base["loss"],
            "tuned_loss": self.tuned["loss"],
            "seconds": self.seconds,
        }


def quickstart(options: Options) -> QuickstartResult:
    """Run what is not finished of the quickstart in `options.output`.

    Raises UserError when the folder holds something else, or a quickstart with other rows or settings.
    """
    check_loopback()  # the last stage needs it: say so before minutes of training
    run = RunFolder(options.output.expanduser().absolute())
    notes = _open_notes(run, options)
    files = notes.timed("data", lambda: _write_inputs(run, options))
    overrides = list(options.overrides)
    model = load_recipe(files.recipe, overrides).model.path
    notes.timed("show", lambda: _show(files.recipe, overrides))
    base = notes.once("base", lambda: _score(model, files.test))
    train = notes.once("train", lambda: _train(files.recipe, overrides), holds=_has_checkpoint(run))
    tuned = notes.once("tuned", lambda: _score(str(run.path), files.test))
    adapter = notes.once("adapter", lambda: _export(run, "adapter"), holds=_is_there)
    merged = notes.once("merged", lambda: _export(run, "merged"), holds=_is_there)
    answers, parity = notes.timed("endpoint", lambda: _ask_endpoint(run, files))
    return QuickstartResult(
        run=run.path,
        base=base,
        train=train,
        tuned=tuned,
        adapter=Path(adapter["folder"]),
        merged=Path(merged["folder"]),
        answers=answers,
        template_parity=parity,
        seconds=notes.seconds,
    )


# -- what has been done ----------------------------------------------------------------------------------


class Notes:
    """What the finished stages found, kept in a file of the run folder."""

    def __init__(self, path: Path, inputs: Found) -> None:
        self._path = path
        self._values: Found = read_json_file(path) if path.is_file() else {"inputs": inputs}

    @property
    def inputs(self) -> Found:
        return dict(self._values["inputs"])

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._values.get("seconds", {}))

    def once(
        self, stage: str, work: Callable[[], Found], *, holds: Callable[[Found], bool] = lambda found: True
    ) -> Found:
        """What `stage` found before if that still holds, else what it finds now.

        When a stage is done, those after it are due again.
        """
        known = self._values.get(stage)
        if known is not None and holds(known):
            say(f"{stage}: finished before, not repeated")
            return dict(known)
        found = self.timed(stage, work)
        for later in STAGES[STAGES.index(stage) + 1 :]:
            self._values.pop(later, None)
        self._values[stage] = found
        self.save()
        return found

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        start = time.monotonic()
        found = work()
        self._values.setdefault("seconds", {})[stage] = round(time.monotonic() - start, 2)
        return found

    def save(self) -> None:
        write_json(self._path, self._values)


def _open_notes(run: RunFolder, options: Options) -> Notes:
    path = run.path / FOLDER / "state.json"
    _refuse_other(run.path, path)
    if options.fresh and run.path.exists():
        with sole_trainer(run):
            shutil.rmtree(run.path)
    inputs = _inputs(options)
    notes = Notes(path, inputs)
    if notes.inputs != inputs:
        changed = [key for key in inputs if notes.inputs.get(key) != inputs[key]]
        raise UserError(
            f"{run.path}: holds a quickstart with another {' and another '.join(changed)}",
            hint="--fresh removes it and starts anew; --output takes another folder",
        )
    notes.save()
    return notes


def _refuse_other(folder: Path, state: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file", hint="give a folder")
    if folder.exists() and any(folder.iterdir()) and not state.is_file():
        raise UserError(
            f"--output {folder}: the folder holds something else than a quickstart",
            hint="give a new folder: a run is never written over other files",
        )


def _inputs(options: Options) -> Found:
    """What the results depend on; a finished stage counts for the same inputs only."""
    return {
        "tunesmith version": tunesmith.__version__,
        "recipe": sha256_json(shipped(RECIPE).read_text(encoding="utf-8")),
        "generator": sha256_json(shipped(GENERATOR).read_text(encoding="utf-8")),
        "--set": list(options.overrides),
        "--rows": options.rows,
        "--test-rows": options.test_rows,
        "--seed": options.seed,
    }


# -- stages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    recipe: Path
    train: Path
    test: Path
    log: Path
    test_rows: list[Found]


def _write_inputs(run: RunFolder, options: Options) -> _Files:
    """The rows, and the shipped recipe with its paths set to this run; its comments are kept."""
    folder = run.path / FOLDER
    make_data = _generator()
    train, test = make_data.make(options.seed, options.rows, options.test_rows)
    files = _Files(
        folder / "recipe.yaml", folder / "train.jsonl", folder / "test.jsonl", folder / "serve.log", test
    )
    make_data.write(train, files.train)
    make_data.write(test, files.test)
    yaml = YAML()
    values = yaml.load(shipped(RECIPE))
    values["name"], values["output_dir"] = run.path.name, str(run.path.parent)
    values["data"]["sources"][0]["path"] = str(files.train)
    values["data"]["eval_sources"][0]["path"] = str(files.test)
    text = io.StringIO()
    yaml.dump(values, text)
    write_text(files.recipe, text.getvalue())
    say(f"made {len(train)} training rows and {len(test)} test rows in {folder}")
    return files


def _show(recipe: Path, overrides: list[str]) -> None:
    """A few rows as the model will see them; what it learns from stands in brackets."""
    for row in show_rows(recipe, overrides, count=ROWS_SHOWN):
        text = "".join(f"⟦{span.text}⟧" if span.supervised else span.text for span in row.spans)
        say(f"--- row {row.row}: {row.tokens} tokens, {row.supervised_tokens} of them learned, in ⟦⟧\n{text}")


def _score(model: str, test_file: Path) -> Found:
    """Exact match of greedy answers, and loss, on the test rows."""
    say(f"evaluate {model} on the test rows")
    found = evaluate_model(model, data=test_file, max_new_tokens=ANSWER_TOKENS)
    say(f"  exact match {found.exact_match:.3f}, loss {found.loss:.3f}, {found.rows} rows")
    return {"exact_match": found.exact_match, "loss": found.loss, "rows": found.rows}


def _train(recipe: Path, overrides: list[str]) -> Found:
    found = train_recipe(recipe, overrides)
    return {"train_seconds": found.train_seconds, "tokens_per_s": found.tokens_per_s, "steps": found.steps}


def _has_checkpoint(run: RunFolder) -> Callable[[Found], bool]:
    return lambda found: run.latest_checkpoint() is not None


def _export(run: RunFolder, kind: Literal["adapter", "merged"]) -> Found:
    return {"folder": str(export_run(run.path, kind).folder)}


def _is_there(found: Found) -> bool:
    return (Path(found["folder"]) / "config.json").is_file() or is_adapter(Path(found["folder"]))


def _ask_endpoint(run: RunFolder, files: _Files) -> tuple[list[Found], bool]:
    """Answers of a real endpoint to the first test rows, and whether its tokens are the trained ones."""
    rows = files.test_rows[:QUESTIONS]
    say("start the endpoint and ask it")
    with serving(str(run.path), log=files.log) as endpoint:
        answers = [answer.as_dict() for answer in ask(endpoint, rows, max_tokens=ANSWER_TOKENS)]
        parity = same_tokens(endpoint, run.path / "tokenizer", rows)
    return answers, parity


# -- shipped files ---------------------------------------------------------------------------------------


def _generator() -> Any:
    """The module examples/quickstart/make_data.py."""
    spec = importlib.util.spec_from_file_location("tunesmith_quickstart_data", shipped(GENERATOR))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
