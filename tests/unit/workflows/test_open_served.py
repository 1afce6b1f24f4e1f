"""A base and its adapters, opened to be served: beside the base or in it, and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.make_run import make_run, stir
from tunesmith.core.errors import UserError
from tunesmith.model.adapters import attach_lora, save_adapter
from tunesmith.model.generate import Generator
from tunesmith.model.requests import SamplingParams
from tunesmith.workflows import adapter_checks
from tunesmith.workflows.open_model import OpenModel, open_model
from tunesmith.workflows.open_served import open_served, pick_weights

PROMPT = list(range(50, 70))
WEIGHTS = "adapter_model.safetensors"


def answer(opened: OpenModel, adapter: str | None) -> torch.Tensor:
    """The log-probabilities that the generator gives the prompt's tokens."""
    generator = Generator(opened.model, max_length=64, bank=opened.bank)
    generator.add(PROMPT, SamplingParams(max_new_tokens=0, prompt_logprobs=0), adapter=adapter)
    found: list[float] = []
    while generator.has_work:
        for event in generator.step():
            found += [entry.logprob for entry in event.prompt_logprobs or ()]
    return torch.tensor(found)


def reference(path: Path | str) -> torch.Tensor:
    """What transformers and peft give them."""
    model = open_model(str(path), dtype=torch.float32, device="cpu").model
    return adapter_checks.log_probs(model, PROMPT)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-4


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) > 0.01


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "mine", tiny).path


def other_adapter(tiny: Path, folder: Path, *, dora: bool = False, std: float = 0.2) -> Path:
    base = open_model(str(tiny), dtype=torch.float32, device="cpu").model
    wrapped = attach_lora(
        base, rank=3, alpha=6, dropout=0.0, targets=["q_proj", "up_proj"], rslora=False, seed=5, dora=dora
    )
    stir(wrapped, std=std, seed=5, only="lora_B")
    save_adapter(wrapped, folder)
    return folder


def test_a_run_its_base_and_another_adapter_answer_side_by_side(
    tiny: Path, run: Path, tmp_path: Path
) -> None:
    other = other_adapter(tiny, tmp_path / "other")
    opened = open_served(str(run), adapters={"other": str(other)}, name="orders")
    assert opened.bank is not None and not opened.merged and opened.name == "orders"
    assert opened.bank.names == ("orders", "other") == tuple(opened.adapters)
    assert opened.adapters["orders"] == opened.adapter
    base, orders, others = reference(tiny), reference(run), reference(other)
    assert is_same(answer(opened, None), base)
    assert is_same(answer(opened, "orders"), orders) and differs(orders, base)
    assert is_same(answer(opened, "other"), others) and differs(others, base) and differs(others, orders)


def test_merged_where_it_is_asked_for(tiny: Path, run: Path) -> None:
    opened = open_served(str(run), merge=True)
    assert opened.bank is None and opened.merged and not opened.adapters
    assert is_same(answer(opened, None), reference(run))


def test_merged_where_it_must_be_and_said_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = other_adapter(tiny, tmp_path / "dora", dora=True)
    opened = open_served(str(dora))
    assert opened.merged and opened.bank is None
    assert "is merged into its base, which does not answer beside it: it is a DoRA" in capsys.readouterr().err
    assert is_same(answer(opened, None), reference(dora))
    with pytest.raises(UserError, match="other adapters cannot be loaded beside it"):
        open_served(str(dora), adapters={"more": str(dora)})


def test_a_base_takes_adapters_later(tiny: Path, run: Path) -> None:
    opened = open_served(str(tiny))
    assert opened.bank is not None and opened.bank.names == () and opened.adapter is None
    opened.bank.load("late", open_model(str(run), dtype=torch.float32, device="cpu").adapter)  # type: ignore[arg-type]
    assert is_same(answer(opened, "late"), reference(run))
    assert is_same(answer(opened, None), reference(tiny))


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_small_weights_keep_their_adapters(run: Path, weights: Any) -> None:
    opened = open_served(str(run), weights=weights)
    assert opened.weights == weights and opened.bank is not None
    assert differs(answer(opened, opened.name), answer(opened, None))


def test_a_run_over_a_run_has_the_first_in_its_base(tiny: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny)
    second = make_run(tmp_path / "second", first.path)
    opened = open_served(str(second.path))
    assert is_same(answer(opened, "second"), reference(second.path))
    assert is_same(answer(opened, None), reference(first.path))
    with pytest.raises(UserError, match="trained on another tuned run"):
        open_served(str(tiny), adapters={"second": str(second.path)})


def test_names_and_folders_that_cannot_be(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mine': the model itself has this name"):
        open_served(str(run), adapters={"mine": str(run)})
    with pytest.raises(UserError, match="there is no such folder"):
        open_served(str(run), adapters={"more": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="int8' are for a CPU"):
        pick_weights("int8", "auto", torch.device("cuda"))
    with pytest.raises(UserError, match="'bf16' and precision 'fp32' say different things"):
        pick_weights("bf16", "fp32", torch.device("cpu"))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_an_adapter_that_does_nothing_is_refused(
    tiny: Path, tmp_path: Path, merge: bool, scale: float
) -> None:
    other = other_adapter(tiny, tmp_path / "other")
    tensors = {n: t * scale if "lora_B" in n else t for n, t in load_file(other / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS)
    with pytest.raises(UserError, match="the adapter changes no"):
        open_served(str(other), merge=merge)


def test_what_is_not_peft_s_is_found(tiny: Path, run: Path) -> None:
    """The check itself: a bank with another adapter's matrices under the name."""
    opened = open_served(str(run))
    assert opened.bank is not None and opened.adapter is not None
    model = open_model(str(tiny), dtype=torch.float32, device="cpu").model
    bank = type(opened.bank)(model)
    adapter_checks.check_served(opened.model, opened.bank, opened.adapters, PROMPT)
    tensors = {n: t * 1.1 for n, t in load_file(opened.adapter / WEIGHTS).items()}
    changed = tiny.parent / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_bytes((opened.adapter / "adapter_config.json").read_bytes())
    save_file(tensors, changed / WEIGHTS)
    bank.load("mine", changed)
    with pytest.raises(UserError, match="the logits differ from peft's"):
        adapter_checks.check_like_peft(model, bank, opened.adapters, PROMPT)
    assert not hasattr(model, "peft_config")
