"""A config as a recipe: every line is accounted for, every difference named, and the rest refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.convert.xtuner import Imported, import_config, recipe_name
from tunesmith.core.errors import UserError
from tunesmith.recipe.load import check
from tunesmith.workflows.import_xtuner import import_xtuner

HEAD = """\
from datasets import load_dataset, load_from_disk
from peft import LoraConfig
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from mmengine.optim import CosineAnnealingLR, LinearLR
from xtuner.dataset import ConcatDataset, LLaVADataset, MOSSSFTDataset, process_hf_dataset
from xtuner.dataset.map_fns import (alpaca_map_fn, alpaca_zh_map_fn, code_alpaca_map_fn, colors_map_fn,
                                    oasst1_map_fn, template_map_fn_factory)
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.model import LLaVAModel, SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

lr = 2e-5
accumulative_counts = 16
max_epochs = 3
warmup_ratio = 0.03
tokenizer = dict(type=AutoTokenizer.from_pretrained, padding_side='right')
llm = dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='Qwen/Qwen1.5-0.5B-Chat')
model = dict(type=SupervisedFinetune, llm=llm)
rows = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path='tatsu-lab/alpaca'),
    tokenizer=tokenizer,
    max_length=2048,
    dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.qwen_chat),
    pack_to_max_length=True)
train_dataloader = dict(batch_size=1, dataset=rows, sampler=dict(type='DefaultSampler'))
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1),
    accumulative_counts=accumulative_counts,
    dtype='float16')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs)]
train_cfg = dict(type='TrainLoop', max_epochs=max_epochs)
custom_hooks = [dict(type=EvaluateChatHook, every_n_iters=500, evaluation_inputs=['Hi'], system='S')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=2))
randomness = dict(seed=None)
"""


def imported(tmp_path: Path, more: str = "", *, replace: tuple[str, str] = ("", ""), **how: Any) -> Imported:
    path = tmp_path / "my config.py"
    assert replace[0] in HEAD
    path.write_text((HEAD.replace(*replace) if replace[0] else HEAD) + more, encoding="utf-8")
    found = import_config(path, **how)
    check({"name": recipe_name(path)} | found.values, "imported")
    return found


def test_the_tutorials_settings(tmp_path: Path) -> None:
    found = imported(tmp_path)
    train, data = found.values["train"], found.values["data"]
    assert found.values["model"] == {"path": "Qwen/Qwen1.5-0.5B-Chat"} and found.chat_template is None
    assert data["sources"] == [{"path": "tatsu-lab/alpaca", "format": "alpaca"}]
    assert (data["max_length"], data["packing"], data["too_long"], data["eval_fraction"]) == (
        2048, True, "truncate", 0.0,
    )  # fmt: skip
    assert (train["lr"], train["grad_accumulation"], train["epochs"], train["warmup_ratio"]) == (
        2e-5, 16, 3.0, 0.03,
    )  # fmt: skip
    # 500 micro-batches are 31.25 optimizer steps.
    assert (train["save_every"], train["keep_checkpoints"]) == (31, 2)
    assert found.values["samples"] == {"prompts": ["Hi"], "every": 31}
    assert found.values["method"] == {"type": "full"}


def test_every_difference_that_a_person_would_ask_about_is_named(tmp_path: Path) -> None:
    names = {text.partition(":")[0] for text in imported(tmp_path).differences}
    assert {"warm-up", "prompts", "last window", "dtype", "loss", "packing", "seed", "template"} <= names


def test_each_line_says_what_became_of_it(tmp_path: Path) -> None:
    notes = {
        note.written: note for note in imported(tmp_path, "env_cfg = dict(cudnn_benchmark=False)\n").notes
    }
    assert notes["lr = 2e-5"].became == "train.lr: 2e-05"
    assert notes["accumulative_counts = 16"].became == "train.grad_accumulation: 16"
    assert notes["env_cfg = dict(cudnn_benchmark=False)"].became is None
    assert [note.line for note in imported(tmp_path).notes] == sorted(
        n.line for n in imported(tmp_path).notes
    )


def test_a_value_that_nobody_knows_is_told_as_without_counterpart(tmp_path: Path) -> None:
    found = imported(tmp_path, "model.strange = 5\n")
    assert next(n for n in found.notes if n.written == "model.strange = 5").why == "no counterpart"


def test_qlora(tmp_path: Path) -> None:
    more = (
        "llm.quantization_config = dict(type=BitsAndBytesConfig, load_in_4bit=True,\n"
        "    bnb_4bit_use_double_quant=True, bnb_4bit_quant_type='nf4')\n"
        "model.lora = dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias='none',\n"
        "    target_modules=['q_proj'], modules_to_save=['embed_tokens'], use_dora=True)\n"
    )
    assert imported(tmp_path, more).values["method"] == {
        "type": "qlora",
        "rank": 64,
        "alpha": 16.0,
        "dropout": 0.1,
        "targets": ["q_proj"],
        "dora": True,
        "modules_to_save": ["embed_tokens"],
        "double_quant": True,
    }


def test_several_data_sets_files_and_maps(tmp_path: Path) -> None:
    more = (
        "def of(dataset, map_fn):\n    pass\n"
        "local = dict(type=load_dataset, path='json', data_files=dict(train=['a.json', 'b.json']))\n"
        "zh = dict(rows, dataset=local, dataset_map_fn=alpaca_zh_map_fn)\n"
        "talk = dict(rows, dataset=dict(type=load_from_disk, dataset_path='saved'), dataset_map_fn=oasst1_map_fn)\n"
        "own = dict(rows, dataset=dict(type=load_dataset, path='x/y', name='part', split='test'), dataset_map_fn=None)\n"
        "train_dataloader.dataset = dict(type=ConcatDataset, datasets=[rows, zh, talk, own])\n"
    )
    chinese = {"instruction": "instruction_zh", "input": "input_zh", "output": "output_zh"}
    assert imported(tmp_path, more).values["data"]["sources"] == [
        {"path": "tatsu-lab/alpaca", "format": "alpaca"},
        {"path": "a.json", "format": "alpaca", "columns": chinese},
        {"path": "b.json", "format": "alpaca", "columns": chinese},
        {"path": "saved", "format": "guanaco"},
        {"path": "x/y", "format": "turns", "split": "test", "subset": "part"},
    ]


def test_a_base_model_gets_the_prompt_template_as_jinja(tmp_path: Path) -> None:
    found = imported(tmp_path, replace=("Qwen/Qwen1.5-0.5B-Chat", "Qwen/Qwen1.5-0.5B"))
    assert found.chat_template is not None and "<|im_start|>user" in found.chat_template


def test_a_system_message_that_is_not_on_this_machine_is_named(tmp_path: Path) -> None:
    replace = ("dataset_map_fn=alpaca_map_fn", "dataset_map_fn=code_alpaca_map_fn")
    found = imported(tmp_path, replace=replace)
    assert any("code_alpaca_map_fn: its system message" in text for text in found.differences)
    with pytest.raises(UserError, match="--compat does not reproduce code_alpaca_map_fn without"):
        imported(tmp_path, replace=replace, compat=True)


def test_compat_keeps_the_template_and_the_way_it_was_started(tmp_path: Path) -> None:
    found = imported(tmp_path, compat=True, deepspeed=True)
    compat = found.values["compat"]
    assert (compat["tool"], compat["map_workers"], compat["deepspeed"]) == ("xtuner", 32, True)
    assert compat["template"]["suffix"] == "<|im_end|>" and found.differences == []


def test_sequence_parallel_ranks_share_a_step(tmp_path: Path) -> None:
    more = (
        "sequence_parallel_size = 4\noptim_wrapper.accumulative_counts = 8\n"
        "train_dataloader.sampler = dict(type=SequenceParallelSampler)\n"
    )
    assert imported(tmp_path, more).values["train"]["grad_accumulation"] == 2


def test_iterations_become_optimizer_steps(tmp_path: Path) -> None:
    more = (
        "train_cfg = dict(type='IterBasedTrainLoop', max_iters=100)\n"
        "param_scheduler = [dict(type=LinearLR, by_epoch=False, begin=0, end=33),\n"
        "    dict(type=CosineAnnealingLR, eta_min=2e-6, by_epoch=False, begin=33, end=100)]\n"
    )
    train = imported(tmp_path, more).values["train"]
    assert (train["max_steps"], train["warmup_steps"], train["min_lr_ratio"]) == (7, 3, pytest.approx(0.1))


REFUSED = [
    ("model = dict(type=LLaVAModel, llm=llm)\n", "learns from images"),
    ("train_dataloader.dataset = dict(type=LLaVADataset, max_length=64)\n", "only text is trained"),
    (
        "def mine(example):\n    return example\n\nrows.dataset_map_fn = mine\n",
        "mine() is Python of the config's own",
    ),
    ("rows.dataset_map_fn = 'other_map_fn'\n", "the map function other_map_fn has no counterpart"),
    ("rows.do_dataset_tokenization = False\n", "tokens already"),
    ("rows.dataset.type = 'MsDataset.load'\n", "loads rows by code"),
    ("rows.dataset.data_files = 'a.json'\n", "single files of the data set tatsu-lab/alpaca"),
    ("rows.dataset.data_dir = 'part'\n", "a folder of the data set"),
    ("rows.max_length = None\n", "not a number of tokens"),
    ("rows.template_map_fn.template = PROMPT_TEMPLATE.unheard\n", "is not known"),
    ("optim_wrapper.optimizer.type = SGD\n", "the optimizer SGD has no counterpart"),
    ("optim_wrapper.clip_grad.norm_type = 1\n", "only the L2 norm"),
    ("param_scheduler = [dict(type='PolyLR')]\n", "the schedule PolyLR"),
    ("train_cfg = dict(type='TrainLoop')\n", "neither max_epochs nor max_iters"),
    ("load_from = 'iter_500.pth'\n", "cannot be gone on with"),
    ("llm.quantization_config = dict(load_in_8bit=True)\n", "a base in 8 bits"),
    ("llm.quantization_config = dict(load_in_4bit=True)\n", "without lora"),
    ("model.lora = dict(type=LoraConfig, bias='all')\n", "trained biases"),
    ("model.lora = dict(type=LoraConfig, target_modules='.*q_proj')\n", "a pattern of modules"),
    ("model.type = 'DPO'\n", "the model DPO has no counterpart"),
    ("del train_dataloader\n", "not a training config of xtuner 0.1"),
]


@pytest.mark.parametrize(("more", "fault"), REFUSED, ids=[fault[:24] for _, fault in REFUSED])
def test_what_has_no_counterpart_is_refused_by_name_and_line(tmp_path: Path, more: str, fault: str) -> None:
    with pytest.raises(UserError) as error:
        imported(tmp_path, more)
    assert fault in str(error.value) and "my config.py" in str(error.value)


ODD = ["None", "'x'", "[]", "dict()", "-1", "1e400", "AdamW"]
SPOTS = [m for m in re.finditer(r"(?<![=!<>])=\s*([\w.'\"/-]+)(?=[,)\n])", HEAD) if m.group(1) != "dict"]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_value_anywhere_gives_a_recipe_or_one_clear_error(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "config.py"
    refused = 0
    for spot in SPOTS:
        path.write_text(HEAD[: spot.start(1)] + odd + HEAD[spot.end(1) :], encoding="utf-8")
        for compat in (False, True):
            try:
                import_xtuner(path, None, compat=compat)
            except UserError as error:
                assert "config.py" in str(error) or "prompt template" in str(error), str(error)
                refused += 1
    assert 0 < refused < 2 * len(SPOTS)


def test_names_of_runs() -> None:
    assert recipe_name(Path("a/qwen1_5 0.5b.py")) == "qwen1_5-0.5b"
    assert recipe_name(Path("-.py")) == "xtuner"
