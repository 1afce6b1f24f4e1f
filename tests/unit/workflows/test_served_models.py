"""The models that a run, its adapters and its base are served as."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json
from tunesmith.core.run_folder import RunFolder
from tunesmith.model.template import template_hash
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.workflows.served_models import Facts, open_adapter, served_models
from tunesmith.workflows.token_facts import token_facts


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs") / "orders", tiny, steps=(5,))


@pytest.fixture
def facts(run: RunFolder, tiny: Path) -> Facts:
    """Of an engine that has the run's base, and its adapter beside it."""
    adapter = str(run.checkpoint(5) / "adapter")
    return Facts(
        name="orders",
        origin=str(run.path),
        base=str(tiny),
        tokenizer=str(run.path / "tokenizer"),
        max_length=512,
        vocab_size=49152,
        context_length=1024,
        adapter=adapter,
        adapters={"orders": adapter},
        end_ids=(2,),
    )


def test_run_first_then_other_adapters_then_the_base(facts: Facts, run: RunFolder, tiny: Path) -> None:
    other = replace(facts, adapters={"orders": str(facts.adapter), "again": str(run.path)})
    models = served_models(other)
    assert list(models) == ["orders", "again", "tiny-llama"]
    assert [model.adapter for model in models.values()] == ["orders", "again", None]
    first = models["orders"]
    assert (first.max_length, first.stop_ids) == (512, (2,))
    assert first.origin["run"] == str(run.path)
    assert first.origin["base"] == str(tiny)
    assert first.origin["adapter"] == facts.adapter
    assert first.origin["template_hash"] == template_hash(load_tokenizer(tiny))
    assert len(first.origin["data_hash"]) == 64
    assert first.origin["sampling_defaults"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert json.dumps(first.card())
    assert models["again"].origin["data_hash"] == first.origin["data_hash"]
    assert [model.origin["path"] for model in models.values()] == [str(run.path), str(run.path), str(tiny)]
    assert models["tiny-llama"].origin["run"] is models["tiny-llama"].origin["adapter"] is None


def test_a_merged_run_is_one_model(facts: Facts) -> None:
    [model] = served_models(replace(facts, adapters={}, merged=True)).values()
    assert (model.name, model.adapter) == ("orders", None)
    assert model.origin["adapter"] == facts.adapter
    assert model.origin["run"] == facts.origin


def test_a_base_of_the_runs_name_gets_another(facts: Facts) -> None:
    models = served_models(replace(facts, name="tiny-llama", adapters={"tiny-llama": str(facts.adapter)}))
    assert list(models) == ["tiny-llama", "tiny-llama-base"]


def test_a_plain_model_has_no_run(facts: Facts, tiny: Path) -> None:
    plain = replace(facts, name="tiny", origin=str(tiny), tokenizer=str(tiny), adapter=None, adapters={})
    [model] = served_models(plain).values()
    assert (model.name, model.origin["run"], model.origin["data_hash"]) == ("tiny", None, None)


def test_another_template_than_the_runs_is_refused(facts: Facts, tiny: Path, tmp_path: Path) -> None:
    changed = tmp_path / "tokenizer"
    shutil.copytree(tiny, changed)
    (changed / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="chat template to be served is not the one"):
        served_models(replace(facts, tokenizer=str(changed)))


def test_other_stop_tokens_than_those_in_the_lock_are_refused(
    facts: Facts, run: RunFolder, tmp_path: Path
) -> None:
    copy = RunFolder(tmp_path / "orders")
    shutil.copytree(run.path, copy.path)
    adapter = str(copy.checkpoint(5) / "adapter")
    moved = replace(
        facts,
        origin=str(copy.path),
        tokenizer=str(copy.path / "tokenizer"),
        adapter=adapter,
        adapters={"orders": adapter},
    )
    tokens = token_facts(load_tokenizer(copy.path / "tokenizer")) | {"stop_ids": [2]}
    lock = json.loads(copy.lock.read_text())
    write_json(copy.lock, lock | {"tokens": tokens})
    assert list(served_models(moved)) == ["orders", "tiny-llama"]
    write_json(copy.lock, lock | {"tokens": tokens | {"stop_ids": [2, 0]}})
    with pytest.raises(UserError, match="stop tokens to be served"):
        served_models(moved)


def test_adapters_opened_while_serving(facts: Facts, run: RunFolder, tiny: Path, tmp_path: Path) -> None:
    found = open_adapter(facts, "letters", str(run.path))
    assert (found.model.name, found.model.adapter) == ("letters", "letters")
    assert found.folder == run.checkpoint(5) / "adapter"
    assert open_adapter(facts, "x", str(found.folder)).model.origin["run"] == str(run.path)
    for path, words in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "holds no adapter"),
        (tiny, "holds no adapter"),
    ):
        with pytest.raises(UserError, match=words):
            open_adapter(facts, "x", str(path))
    full = make_run(tmp_path / "full", tiny, steps=(5,), full=True)
    with pytest.raises(UserError, match="trained all weights"):
        open_adapter(facts, "x", str(full.path))


def test_an_adapter_of_another_base_is_refused(
    facts: Facts, run: RunFolder, tiny: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    same = replace(facts, base=str(other))
    assert open_adapter(same, "x", str(run.path)).model.adapter == "x", "a copy of the base is the base"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(UserError, match="was trained on"):
        open_adapter(same, "x", str(run.path))
