"""`tunesmith import xtuner` and `tunesmith train CONFIG.py`, from the outside and over xtuner's own configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.e2e.train_helpers import write_rows
from tunesmith.cli.main import main
from tunesmith.convert.xtuner_order import Rates
from tunesmith.core.errors import UserError
from tunesmith.core.events import read_events
from tunesmith.recipe.load import check, load_recipe, parse_yaml
from tunesmith.workflows.import_xtuner import import_xtuner

WHEEL = "xtuner-0.1.18-py3-none-any.whl"


@pytest.fixture(scope="session")
def xtuner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of xtuner 0.1.18 with its configs, fetched as a wheel; never imported."""
    kept = os.environ.get("TUNESMITH_TEST_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("wheels")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / WHEEL).is_file():
        wanted = ["--no-deps", "--python-version", "3.10", "--only-binary=:all:", "xtuner==0.1.18"]
        command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = f"the wheel of xtuner 0.1.18 cannot be had: {done.stderr.strip()[-200:]}"
            if os.environ.get("TUNESMITH_REQUIRE_DOCKER"):
                pytest.fail(reason)
            pytest.skip(reason)
    unpacked = tmp_path_factory.mktemp("xtuner")
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        wheel.extractall(unpacked)
    return unpacked / "xtuner"


def test_nearly_all_text_configs_of_xtuner_become_recipes(xtuner: Path) -> None:
    configs = [path for path in sorted((xtuner / "configs").rglob("*.py")) if path.name != "__init__.py"]
    refused: dict[Path, str] = {}
    for path in configs:
        try:
            found = import_xtuner(path, None)
        except UserError as error:
            refused[path] = error.what
            continue
        check(parse_yaml(found.text, path.name), path.name)
        unknown = [note.written for note in found.notes if note.why == "no counterpart"]
        assert not unknown, f"{path}: {unknown}"
    images = {path for path, what in refused.items() if "learns from images" in what}
    assert {path.name.partition("_")[0] for path in images} == {"llava"} and len(configs) == 427
    text = len(configs) - len(images)
    others = {path: what for path, what in refused.items() if path not in images}
    assert (text - len(others)) / text >= 0.95, others
    for path, what in others.items():
        assert what.startswith(str(path)) and "\n" not in what, what
    kinds = Counter(what.rpartition(": ")[2] for what in others.values())
    assert sum(kinds.values()) == len(others) <= 17, kinds


def test_the_alpaca_configs_are_reproduced_with_their_own_template(xtuner: Path) -> None:
    names = [
        "qwen/qwen1_5/qwen1_5_0_5b_chat/qwen1_5_0_5b_chat_full_alpaca_e3.py",
        "llama/llama2_7b/llama2_7b_qlora_alpaca_e3.py",
        "mistral/mistral_7b_qlora_skypile_pretrain_e1.py",
    ]
    instructions = []
    for name in names:
        found = import_xtuner(xtuner / "configs" / name, None, compat=True)
        compat = check(parse_yaml(found.text, name), name).compat
        assert compat is not None and compat.map_workers == 32
        instructions.append(compat.template.instruction)
    assert instructions[0] == "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
    assert instructions[2] == "{input}"  # rows without a template are text as it is


def test_sentences_of_xtuner_come_from_around_the_config(xtuner: Path) -> None:
    path = xtuner / "configs" / "llama" / "llama2_7b" / "llama2_7b_qlora_sql_e3.py"
    source = parse_yaml(import_xtuner(path, None).text, "recipe")["data"]["sources"][0]
    assert "SQL" in source["system"] and source["columns"]["instruction"] == "context"


CONFIG = """\
from datasets import load_dataset
from mmengine.optim import CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

batch_size = 1
max_epochs = 2
warmup_ratio = 0.1
tokenizer = dict(padding_side='right')
model = dict(
    type=SupervisedFinetune,
    llm=dict(pretrained_model_name_or_path={model!r}),
    lora=dict(type=LoraConfig, r=4, lora_alpha=8))
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path='json', data_files={rows!r}),
        tokenizer=tokenizer,
        max_length=128,
        dataset_map_fn=openai_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.qwen_chat),
        pack_to_max_length=True))
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0), accumulative_counts=4)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, end=warmup_ratio * max_epochs),
    dict(type=CosineAnnealingLR, begin=warmup_ratio * max_epochs, end=max_epochs)]
train_cfg = dict(max_epochs=max_epochs)
"""


@pytest.fixture
def config(tmp_path: Path, tiny: Path) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl")
    path = tmp_path / "own_config.py"
    path.write_text(CONFIG.format(model=str(tiny), rows=str(rows)))
    return path


def called(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_import_writes_a_recipe_and_tells_line_by_line(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    target = tmp_path / "recipe.yaml"
    code, out, err = called(capsys, "import", "xtuner", config, "-o", target)
    assert (code, out.strip()) == (0, str(target))
    recipe = load_recipe(target)
    assert (recipe.name, recipe.method.rank, recipe.train.grad_accumulation) == ("own_config", 4, 4)
    assert recipe.model.chat_template == str(tmp_path / "recipe.jinja")  # no Qwen chat model by its name
    assert "batch_size = 1" in err and "train.micro_batch_size: 1" in err
    assert "What is done otherwise than by xtuner" in err and "- warm-up:" in err
    code, out, _ = called(capsys, "import", "xtuner", config, "--json")
    found = json.loads(out)
    assert (code, found["recipe"]) == (0, None) and found["differences"] and found["lines"]
    assert check(parse_yaml(found["text"], "text"), "text").train == recipe.train


def test_import_writes_over_its_own_recipe_but_not_over_a_persons(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    target = tmp_path / "recipe.yaml"
    assert called(capsys, "import", "xtuner", config, "-o", target)[0] == 0
    assert called(capsys, "import", "xtuner", config, "-o", target)[0] == 0
    target.write_text("model: {path: mine}\n")
    code, _, err = called(capsys, "import", "xtuner", config, "-o", target)
    assert code == 2 and "is there already" in err and target.read_text() == "model: {path: mine}\n"
    assert called(capsys, "import", "xtuner", config, "-o", target, "--force")[0] == 0


def test_a_config_that_cannot_be_imported_is_one_clear_error(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    config.write_text(config.read_text() + "import os\nx = os.system('touch touched')\n")
    code, out, err = called(capsys, "import", "xtuner", config, "--json")
    assert code == 2 and "Traceback" not in err
    last = len(config.read_text().splitlines())
    assert f"line {last}: it calls os.system()" in json.loads(out)["error"]["what"]
    assert not list(tmp_path.rglob("touched"))


def test_train_takes_the_config_in_one_go(cli: Cli, config: Path, tmp_path: Path) -> None:
    done = cli("train", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip())
    assert run == tmp_path / "runs" / "own_config" and (tmp_path / "runs" / "own_config.yaml").is_file()
    assert "what differs from xtuner" in done.stderr
    steps = [event for event in read_events(run / "events.jsonl") if event["event"] == "step"]
    assert steps[-1]["epoch"] == 2.0 and steps[-1]["loss"] < steps[0]["loss"]
    again = cli("train", config, cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stderr


def test_compat_trains_with_xtuners_rates_and_windows(cli: Cli, config: Path, tmp_path: Path) -> None:
    assert cli("import", "xtuner", config, "--compat", "-o", "compat.yaml", cwd=tmp_path).returncode == 0
    values = ["train.precision=fp32", "compat.map_workers=1", "hardware.threads=1"]
    done: Any = cli.json("train", "compat.yaml", *(p for v in values for p in ("--set", v)), cwd=tmp_path)
    events = list(read_events(Path(done["run"]) / "events.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    packs = sum(event["tokens"] for event in steps) // 128
    per_epoch = packs // 2
    assert packs * 128 == sum(event["tokens"] for event in steps) and len(steps) == -(-packs // 4)
    rates = Rates(peak=1e-3, warmup_epochs=0.2, epochs=2, per_epoch=per_epoch)
    expected = [rates.lr(min(4 * k + 3, packs - 1)) for k in range(len(steps))]
    assert [event["lr"] for event in steps] == pytest.approx(expected, rel=1e-12)
    lost = [e["what"] for e in events if e["event"] == "warning" and "left over by packing" in e["what"]]
    assert len(lost) == 1
