from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.e2e.train_helpers import write_recipe
from tests.small_disk import mounted
from tunesmith.core.errors import PlanRefused, UserError
from tunesmith.core.memory import HostMemory
from tunesmith.plan.memory import MemoryPlan
from tunesmith.plan.timeline import Moment
from tunesmith.recipe.load import check
from tunesmith.recipe.resolve import Facts, resolve, resolve_steps
from tunesmith.recipe.schema import Model, Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.workflows import plan as plan_module
from tunesmith.workflows.plan import refuse
from tunesmith.workflows.plan_files import planned_checkpoint
from tunesmith.workflows.plan_machine import Machine, card_facts, named_machine, this_machine
from tunesmith.workflows.plan_model import counted, find_model, size_of
from tunesmith.workflows.plan_recipe import NO_TOKENIZER, PlanOptions, plan_recipe
from tunesmith.workflows.plan_view import WIDTH, memory_table, plan_lines

FACTS = Facts(context_length=1024, device="cpu", threads=1, precision="fp32", serve_precision="fp32")
GIB = 1 << 30


def recipe(**sections: dict[str, Any]) -> Recipe:
    base = {"model": {"path": "x"}, "data": {"sources": [{"path": "a", "format": "text"}]}}
    return resolve_steps(resolve(check(base | sections, "r"), FACTS), 100)


# -- sizes ------------------------------------------------------------------------------------------------


def test_a_size_from_the_configuration_is_that_of_the_model(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    whole = sum(p.numel() for p in model.parameters())
    found = size_of(recipe(method={"type": "full"}), AutoConfig.from_pretrained(tiny))
    assert found.parameters == found.trained_parameters == found.base_parameters == whole
    assert found.stored_bytes == 4 * whole
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    small = size_of(recipe(method={"rank": 4}), AutoConfig.from_pretrained(tiny))
    assert small.trained_parameters == trained and small.base_parameters == whole
    assert planned_checkpoint(recipe(), small) == trained * 12


def test_weights_of_four_bits_are_counted_whole(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    lora, qlora = (size_of(recipe(method={"type": kind}), config) for kind in ("lora", "qlora"))
    assert lora.parameters == qlora.parameters


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"memory": "low"},
        {"optimizer": "adamw-offload", "precision": "bf16-pure"},
        {"optimizer": "adamw-8bit"},
    ],
    ids=["plain", "low", "offload", "8bit"],
)
def test_a_planned_checkpoint_has_the_size_of_a_written_one(
    train: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    full = recipe(method={"type": "full"}, train=train)
    dtype = torch.bfloat16 if full.train.precision == "bf16-pure" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    planned = planned_checkpoint(full, counted(model))
    engine = SingleEngine(model, Supervised(), full)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.begin(1e-3, seed=0)
    engine.update(divide_by=1.0, max_norm=None)
    engine.write(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written == pytest.approx(planned, rel=0.02)


# -- models without weights -------------------------------------------------------------------------------


def only_config(tiny: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    return folder


def test_a_configuration_alone_is_planned_for_its_largest_batch(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, only_config(tiny, tmp_path / "bare"))
    plan = plan_recipe(path, ["data.packing=true"])
    assert plan.work.steps == 30 and plan.work.tokens is None and plan.subject.data is None
    assert plan.work.batch_tokens == 2 * 192 and plan.memory is not None
    text = "\n".join(plan_lines(plan))
    assert NO_TOKENIZER in text.replace("\n           ", " ") and plan.as_dict()["data"] is None


def test_a_size_of_the_table_needs_no_folder(tiny: Path) -> None:
    found = find_model(Model(path="Qwen1.5 0.5B"))
    assert found.name == "qwen1.5-0.5b" and found.tokenizer is None
    with pytest.raises(UserError, match="qwen"):
        find_model(Model(path="qwen9-5b"))


def test_what_is_here_is_taken_before_the_table(tiny: Path, tmp_path: Path) -> None:
    found = find_model(Model(path=str(tiny)))
    assert found.tokenizer == tiny and found.cache is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    assert find_model(Model(path=str(adapter))).config.hidden_size == 64
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    with pytest.raises(UserError, match="circle"):
        find_model(Model(path=str(adapter)))


def test_a_hub_model_that_cannot_be_fetched_has_the_shape_of_its_size() -> None:
    found = find_model(Model(path="Qwen/Qwen1.5-0.5B-Chat", offline=True))
    assert found.config.vocab_size == 151936 and "could not be fetched" in found.note
    with pytest.raises(UserError, match="not whole in the cache"):
        find_model(Model(path="nobody/nothing", offline=True))


# -- machines ---------------------------------------------------------------------------------------------


def memory(allocated: int, *, device: Any = "cuda", host: int = 0) -> MemoryPlan:
    moments = (
        Moment(phase="forward", num_bytes=allocated, parts={"weights": allocated}),
        Moment(phase="update", num_bytes=allocated // 2, parts={"gradients": allocated // 2}),
    )
    extra = {"context_bytes": GIB // 2, "margin_bytes": GIB} if device == "cuda" else {}
    return MemoryPlan(
        device=device,
        moments=moments,
        live_bytes=allocated,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        host_bytes=host,
        host_by_phase={"update": host},
        **extra,
    )


def test_a_card_holds_tensors_context_and_margin() -> None:
    card = replace(named_machine("rtx3090"), capacity_bytes=10 * GIB)
    assert card.verdict(memory(8 * GIB)) == "fits"  # 8 + 0.5 + 1 of 10
    assert card.verdict(memory(9 * GIB)) == "tight"  # 10.5, but 9.5 without the margin
    assert card.verdict(memory(10 * GIB)) == "does not fit"
    assert card.verdict(None) == "unknown"


def test_host_memory_of_this_machine_counts_beside_its_cards() -> None:
    host = HostMemory(total_bytes=4 * GIB, free_bytes=4 * GIB, limited=False)
    card = replace(named_machine("rtx3090", gpus=2), host=host, capacity_bytes=10 * GIB)
    assert card.verdict(memory(GIB, host=GIB)) == "fits"
    assert card.verdict(memory(GIB, host=3 * GIB)) == "does not fit"


def test_a_cpu_holds_every_process_with_its_program() -> None:
    machine = replace(
        this_machine("cpu", processes=2), capacity_bytes=10 * GIB, free_bytes=8 * GIB, base_bytes=GIB
    )
    assert machine.needed_bytes(memory(2 * GIB, device="cpu")) == 6 * GIB
    assert machine.verdict(memory(2 * GIB, device="cpu")) == "fits"
    assert machine.verdict(memory(7 * GIB // 2, device="cpu")) == "tight"
    assert machine.verdict(memory(5 * GIB, device="cpu")) == "does not fit"


def test_old_cards_take_fp16() -> None:
    assert card_facts(named_machine("v100-16"), 2048).precision == "fp16"
    assert card_facts(named_machine("rtx3090", gpus=2), 2048).processes == 2


# -- the plan ---------------------------------------------------------------------------------------------


def test_counts_samples_and_course_of_a_recipe(tiny: Path, tmp_path: Path) -> None:
    plan = plan_recipe(write_recipe(tmp_path, tiny), ["train.lr=0.5"], PlanOptions(rows=1))
    (row,) = plan.samples
    learned = "".join(span.text for span in row.spans if span.supervised)
    assert learned.endswith("<|im_end|>") and "Add" not in learned and row.row == 1
    assert sum(len(span.text) for span in row.spans) > len(learned) and row.tokens == len(row.ids)
    found = plan.as_dict()
    assert found["work"]["steps"] == 30 and found["data"]["train_rows"] + found["data"]["eval_rows"] == 48
    assert found["duration"]["train_s"] > 0 and found["works"] and found["verdict"] == "fits"
    assert any("train.lr is 0.5" in warning["what"] for warning in found["warnings"])
    assert json.loads(json.dumps(found)) == found


def test_every_line_fits_a_narrow_terminal(tiny: Path, tmp_path: Path) -> None:
    plan = plan_recipe(write_recipe(tmp_path, tiny), [])
    long = [line for line in plan_lines(plan) if len(line) > WIDTH and str(tmp_path) not in line]
    assert not long, long


def test_the_table_marks_the_fullest_phase() -> None:
    head, weights, gradients, total = memory_table(memory(3 * GIB))
    assert head.split() == ["GiB", "forward*", "update"]
    assert weights.split() == ["weights", "3.00", "-"] and gradients.split() == ["gradients", "-", "1.50"]
    assert total.split() == ["in", "all", "3.00", "1.50"]


def test_a_plan_that_does_not_fit_is_refused_with_what_does(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny)
    settings = ["method.type=full", "method.dropout=0", "train.precision=auto", "model.path=qwen2.5-7b"]
    options = PlanOptions(gpu="rtx3090")
    plan = plan_recipe(path, settings, options)
    assert plan.verdict == "does not fit" and not plan.works and plan.remedy is not None
    assert plan.remedy.fix is not None
    with pytest.raises(PlanRefused, match="of memory") as caught:
        refuse(plan)
    assert caught.value.exit_code == 3 and "+   type: lora" in str(caught.value.hint)
    again = plan_recipe(path, settings + plan.remedy.fix.set_arguments, options)
    assert again.works


def test_a_disk_too_small_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny)
    with mounted(tmp_path / "disk", mib=4) as disk:
        plan = plan_recipe(path, [f"output_dir={disk}"])
        assert not plan.disk.fits and not plan.works
        assert plan_recipe(path, [f"output_dir={disk}"], PlanOptions(gpu="3090")).works
    with pytest.raises(PlanRefused, match="of disk") as caught:
        refuse(plan)
    assert "keep_checkpoints" in str(caught.value.hint)


def test_a_model_that_cannot_be_traced_is_planned_without_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNESMITH_DEBUG", raising=False)

    def broken(*args: Any, **how: Any) -> Any:
        raise NotImplementedError("no such operation on fake tensors")

    monkeypatch.setattr(plan_module, "plan_memory", broken)
    plan = plan_recipe(write_recipe(tmp_path, tiny), [])
    assert plan.memory is None and plan.verdict == "unknown" and plan.works
    assert "memory is not predicted: the step cannot be followed (NotImplementedError: no" in plan.unknown[0]
    refuse(plan)


def test_options_that_override_the_recipe_say_so(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny)
    plan = plan_recipe(path, [], PlanOptions(gpu="3090"))
    assert any("hardware.device: cpu is not used" in note for note in plan.subject.notes)
    machine: Machine = plan.subject.machine
    assert machine.name == "rtx3090" and not machine.here and plan.duration is not None
    assert plan.duration.source == "card table"
    with pytest.raises(UserError, match="--gpus 2"):
        plan_recipe(path, [], PlanOptions(gpus=2))
