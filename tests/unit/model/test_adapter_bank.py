"""Many adapters in one pass, each against peft alone; what is refused; memory that comes back."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests import tiny_models
from tests.make_run import stir
from tunesmith.core.errors import UserError
from tunesmith.model import adapter_bank
from tunesmith.model.adapter_bank import AdapterBank, Span
from tunesmith.model.adapter_slots import slot_of
from tunesmith.model.fast_linear import use_blocks

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": None}
    return tiny_models.make(wide=False, seed=seed, **sizes, tie_word_embeddings=tied).to(dtype)


def make(folder: Path, seed: int, model: Any = None, **settings: Any) -> Path:
    """An adapter that peft itself wrote."""
    plain: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(base() if model is None else model, LoraConfig(**(plain | settings)))
    stir(wrapped, std=0.2, seed=seed, only="lora_")
    wrapped.save_pretrained(str(folder))
    return folder


MIXED: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 4},
    "attention": {"r": 9, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "target_modules": ["k_proj", "down_proj", "up_proj"],
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 32},
        "layers_to_transform": [1],
    },
    "head": {"r": 3, "target_modules": ["lm_head", "o_proj"]},
}
NAMES = tuple(MIXED)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: make(tmp_path / name, i, **MIXED[name]) for i, name in enumerate(NAMES)}


def by_peft(folder: Path | None, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [T, V] of tokens that do not see each other."""
    model = base(dtype=dtype)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.inference_mode():
        return model(input_ids=ids[:, None]).logits[:, 0]


def logits(model: Any, bank: AdapterBank, spans: list[Span], ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), bank.selected(spans):
        return model(input_ids=ids[:, None]).logits[:, 0]


def check_mixed(folders: dict[str, Path], spans: list[Span], dtype: torch.dtype, **bounds: float) -> None:
    model = base(dtype=dtype)
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.load(name, folder)
    ids = torch.arange(sum(count for _, count in spans)) % 90 + 3
    found = logits(model, bank, spans, ids)
    with torch.inference_mode():
        plain = model(input_ids=ids[:, None]).logits[:, 0]
    end = 0
    for name, count in spans:
        rows = slice(end, end := end + count)
        expected = plain if name is None else by_peft(folders[name], ids, dtype)
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, **({"atol": 0.0} if name is None else bounds))  # fmt: skip
        assert name is None or (expected[rows] - plain[rows]).abs().max() > 0.05


SHORT: list[Span] = [(name, n) for n in (1, 2, 3) for name in (*NAMES, None)]


@pytest.mark.parametrize(
    "spans",
    [
        SHORT,
        [("everywhere", 5)],
        [(None, 4), ("head", 1)],
        [*SHORT, ("attention", 20), ("patterns", 30), (None, 20), ("head", 1), (None, 2), ("everywhere", 16)],
    ],
    ids=["all-short", "one", "one-and-base", "with-long-ones"],
)
def test_every_row_has_its_own_adapter(folders: dict[str, Path], spans: list[Span]) -> None:
    check_mixed(folders, spans, torch.float32, atol=2e-5)


def test_bf16_weights_with_fp32_adapters(folders: dict[str, Path]) -> None:
    check_mixed(folders, SHORT, torch.bfloat16, atol=0.06)


def test_layers_of_other_kinds(folders: dict[str, Path]) -> None:
    """Layers whose class is changed afterwards, and layers that are no nn.Linear at all."""

    class Eights(nn.Module):
        """Weights rounded to eighths, as a quantised layer has."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.register_buffer("rounded", (layer.weight * 8).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rounded: Any = self.rounded
            return x @ (rounded.float() / 8).T

    model = base()
    for layer in model.model.layers:
        layer.mlp.up_proj = Eights(layer.mlp.up_proj)
    bank = AdapterBank(model)
    use_blocks(model)
    bank.load("a", folders["everywhere"])
    ids = torch.arange(5, 13)
    found = logits(model, bank, [(None, 4), ("a", 4)], ids)
    reference = base()
    wrapped = PeftModel.from_pretrained(reference, str(folders["everywhere"])).eval()
    with torch.no_grad():
        for layer in reference.model.layers:
            weight = layer.mlp.up_proj.base_layer.weight
            weight.copy_((weight * 8).round() / 8)
        expected = wrapped(input_ids=ids[:, None]).logits[:, 0]
    torch.testing.assert_close(found[4:], expected[4:], rtol=0, atol=2e-5)


def test_conv1d_layers_of_gpt2(tmp_path: Path) -> None:
    def gpt2() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)).eval()

    folder = make(tmp_path / "a", 1, gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = gpt2()
    bank = AdapterBank(model)
    bank.load("a", folder)
    ids = torch.arange(5, 13)
    expected = PeftModel.from_pretrained(gpt2(), str(folder)).eval()(input_ids=ids[:, None]).logits[:, 0]
    torch.testing.assert_close(logits(model, bank, [("a", 8)], ids), expected, rtol=0, atol=2e-5)


def test_an_adapter_on_a_tied_head_leaves_the_embeddings(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", 1, base(tied=True), target_modules=["lm_head"])
    model, ids = base(tied=True), torch.arange(5, 13)
    bank = AdapterBank(model)
    bank.load("a", folder)
    expected = PeftModel.from_pretrained(base(tied=True), str(folder)).eval()(input_ids=ids[:, None]).logits
    torch.testing.assert_close(logits(model, bank, [("a", 8)], ids), expected[:, 0], rtol=0, atol=2e-5)


def test_one_layer_outside_a_pass(folders: dict[str, Path]) -> None:
    """The head, whose rows are not those of the pass."""
    model = base()
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.load(name, folder)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = model.lm_head(hidden)
        same = bank.add_(model.lm_head, hidden, plain.clone(), [("attention", 2), (None, 1)])
        found = bank.add_(model.lm_head, hidden, plain.clone(), [("head", 2), (None, 1)])
    saved = load_file(folders["head"] / WEIGHTS)
    a, b = (saved[f"base_model.model.lm_head.lora_{which}.weight"] for which in "AB")
    assert torch.equal(same, plain) and torch.equal(found[2], plain[2])
    torch.testing.assert_close(found[:2], plain[:2] + hidden[:2] @ a.T @ b.T * (8 / 3))


def test_slots_add_what_the_hook_adds(folders: dict[str, Path]) -> None:
    """For those who compute q, k and v in one product."""
    model = base()
    bank = AdapterBank(model)
    assert slot_of(nn.Linear(2, 2)) is None
    bank.load("a", folders["everywhere"])
    part, x = model.model.layers[0].self_attn, torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    spans: list[Span] = [("a", 1), (None, 2), ("a", 1)]
    layers = (part.q_proj, part.k_proj, part.v_proj)
    with torch.inference_mode():
        joined = torch.nn.functional.linear(x, torch.cat([layer.weight for layer in layers]))
        plain, start = joined.clone(), 0
        with bank.selected(spans):
            expected = torch.cat([layer(x) for layer in layers], 1)
            for layer in layers:
                slot = slot_of(layer)
                assert slot is not None and slot.active
                slot.add_(x, joined[:, start : start + layer.out_features])
                start += layer.out_features
    torch.testing.assert_close(joined, expected)
    assert torch.equal(joined[1:3], plain[1:3]) and not torch.allclose(joined[0], plain[0])
    assert not any(layer.adapter_slot.active for layer in layers)


def test_another_adapter_s_infinity_stays_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    shutil.copytree(folders["everywhere"], loud)
    tensors = load_file(loud / WEIGHTS)
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, loud / WEIGHTS)
    model = base()
    bank = AdapterBank(model)
    bank.load("loud", loud)
    bank.load("a", folders["attention"])
    ids = torch.arange(5, 8)
    found = logits(model, bank, [("loud", 1), ("a", 1), (None, 1)], ids)
    assert not found[0].isfinite().all()
    torch.testing.assert_close(found[1], by_peft(folders["attention"], ids)[1], rtol=0, atol=2e-5)
    assert torch.equal(found[2], logits(model, bank, [(None, 3)], ids)[2])


def test_a_wrong_number_of_tokens_is_a_bug(folders: dict[str, Path]) -> None:
    model = base()
    bank = AdapterBank(model)
    bank.load("a", folders["everywhere"])
    with pytest.raises(RuntimeError, match="3 tokens in a pass of 4"):
        logits(model, bank, [("a", 4)], torch.arange(3))
    assert torch.equal(logits(model, bank, [], torch.arange(3)), by_peft(None, torch.arange(3)))


def test_names_and_versions(folders: dict[str, Path]) -> None:
    model = base()
    bank = AdapterBank(model)
    with pytest.raises(UserError, match="no adapter 'a' is loaded") as caught:
        bank.version("a")
    assert caught.value.hint == "loaded: none"
    bank.load("a", folders["everywhere"])
    bank.load("b", folders["attention"])
    ids, spans = torch.arange(5, 9), [("a", 2), ("b", 2)]
    before, versions = logits(model, bank, spans, ids), {bank.version(name) for name in bank.names}
    bank.load("a", folders["patterns"])
    assert bank.names == ("b", "a") and len({bank.version("a"), *versions}) == 3
    after = logits(model, bank, spans, ids)
    torch.testing.assert_close(after[:2], by_peft(folders["patterns"], ids)[:2], rtol=0, atol=2e-5)
    torch.testing.assert_close(after[2:], before[2:], rtol=0, atol=2e-5)
    bank.unload("a")
    for call in (lambda: bank.unload("a"), lambda: logits(model, bank, spans, ids)):
        with pytest.raises(UserError, match="no adapter 'a'") as caught:
            call()
        assert caught.value.hint == "loaded: b"


def test_few_of_many_do_not_pay_for_all(folders: dict[str, Path]) -> None:
    """Adapters that are not in the pass stand in its matrices only while they are few."""
    model = base()
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.load(name, folder)
    ids = torch.arange(5, 9)
    for spans, together in (
        ([(name, 1) for name in NAMES], set(NAMES)),
        ([("everywhere", 1), ("attention", 1), ("head", 2)], set(NAMES)),
        ([("patterns", 1), ("head", 3)], {"patterns", "head"}),
        ([("everywhere", 4)], {"patterns", "head"}),
    ):
        logits(model, bank, spans, ids)
        assert set(bank._joined[0]) == together


def test_a_thousand_loads_and_unloads_leave_nothing(folders: dict[str, Path]) -> None:
    model = base()
    bank = AdapterBank(model)
    bank.load("stays", folders["attention"])
    ids = torch.arange(5, 9)

    def turns(count: int) -> tuple[int, int]:
        for _ in range(count):
            bank.load("a", folders["everywhere"])
            logits(model, bank, [("a", 2), ("stays", 1), (None, 1)], ids)
            bank.unload("a")
        gc.collect()
        return sum(torch.is_tensor(thing) for thing in gc.get_objects()), resident_kib()

    tensors, kib = turns(50)
    more_tensors, more_kib = turns(1000)
    # Fewer where garbage of earlier tests went meanwhile.
    assert more_tensors <= tensors and bank.names == ("stays",)
    # One of these adapters has 30 KiB: a thousand that stayed would be 30 MiB. The C heap settles at 4 MiB more.
    assert more_kib - kib < 15000, f"{more_kib - kib} KiB more"


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def fill(value: float, only: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensor.fill_(value) for name, tensor in tensors.items() if only in name]


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not-lora": (lambda f: edit(f, peft_type="IA3"), "peft_type is IA3; only LORA adapters are read"),
    "dora": (lambda f: edit(f, use_dora=True), "it is a DoRA adapter"),
    "modules": (lambda f: edit(f, modules_to_save=["lm_head"]), "whole modules of its own"),
    "tokens": (lambda f: edit(f, trainable_token_indices=[5]), "embedding rows of its own"),
    "bias": (lambda f: edit(f, bias="all"), "trained biases"),
    "lora-bias": (lambda f: edit(f, lora_bias=True), "it has biases"),
    "start": (lambda f: edit(f, init_lora_weights="pissa"), "changed the base's weights at the start"),
    "replication": (lambda f: edit(f, layer_replication=[[0, 2]]), "the setting layer_replication"),
    "newer": (lambda f: edit(f, use_twist=True), "use_twist, which the installed peft does not know"),
    "rank": (lambda f: edit(f, r=300), "its rank is 300, the highest served is 256"),
    "other-rank": (lambda f: edit(f, r=5), r"is \[4, 32\] where the model needs \[5, 32\]"),
    "no-target": (lambda f: edit(f, target_modules=["c_attn"]), "none of the model's linear layers"),
    "fewer-targets": (lambda f: edit(f, target_modules=["q_proj"]), "no place for 24 tensors"),
    "lacks": (lambda f: edit_tensors(f, lambda t: t.pop(FIRST)), "it lacks 1 tensors, such as .*q_proj"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({FIRST: torch.ones(4, 8)})), r"is \[4, 8\] where"),
    "infinite": (lambda f: edit_tensors(f, fill(float("inf"), "up_proj")), "not finite numbers"),
    "zero": (lambda f: edit_tensors(f, fill(0.0, "lora_B")), "changes nothing"),
    "pickle": (to_pickle, "its weights are pickles"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "the file is damaged"),
    "gone": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "empty": (lambda f: (f / CONFIG).unlink(), "the file is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(folders: dict[str, Path], case: str) -> None:
    spoil, reason = REFUSED[case]
    bank = AdapterBank(base())
    bank.load("a", folders["everywhere"])
    before = bank.version("a")
    shutil.copytree(folders["everywhere"], bad := folders["everywhere"].parent / "bad")
    spoil(bad)
    with pytest.raises(UserError, match=reason) as caught:
        bank.load("a", bad)
    assert str(bad) in caught.value.what
    assert (bank.names, bank.version("a")) == (("a",), before)


def test_a_head_s_own_weights_are_copies_of_the_base_s(folders: dict[str, Path]) -> None:
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(folders["head"] / WEIGHTS)
    edit_tensors(folders["head"], lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    bank = AdapterBank(base())
    bank.load("a", folders["head"])
    edit_tensors(folders["head"], fill(0.5, name))
    with pytest.raises(UserError, match=r"it brings weights of its own .*lm_head"):
        bank.load("a", folders["head"])


def test_a_higher_rank_where_it_is_wanted(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", 0, target_modules=["q_proj"], r=2, rank_pattern={"q_proj": 12})
    with pytest.raises(UserError, match="its rank is 12, the highest served is 8"):
        AdapterBank(base(), max_rank=8).load("a", folder)
    AdapterBank(base(), max_rank=12).load("a", folder)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_other_bases_are_refused_and_copies_are_not(folders: dict[str, Path], tmp_path: Path) -> None:
    one, other = saved(base(), tmp_path / "one"), saved(base(seed=1), tmp_path / "other")
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    model = LlamaForCausalLM.from_pretrained(one)
    bank = AdapterBank(model)
    folder = folders["everywhere"]
    for named in (str(one), str(copy), "someone/tiny", str(tmp_path / "gone"), None):
        edit(folder, base_model_name_or_path=named)
        bank.load("a", folder)
    edit(folder, base_model_name_or_path=str(other))
    with pytest.raises(UserError, match=f"it was trained on '{other}', not on '{one}'"):
        bank.load("a", folder)
    model.name_or_path = "/cache/models--Owner--Tiny-1B/snapshots/abc"
    edit(folder, base_model_name_or_path="Mirror/tiny-1b")
    bank.load("a", folder)
    edit(folder, base_model_name_or_path="Owner/Tiny-2B")
    with pytest.raises(UserError, match="it was trained on 'Owner/Tiny-2B', not on 'Owner/Tiny-1B'"):
        bank.load("a", folder)


def test_wrong_base_by_its_shapes(folders: dict[str, Path]) -> None:
    wide = LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4)  # fmt: skip
    with pytest.raises(
        UserError, match=r"does not fit the model: .*\[4, 32\] where the model needs \[4, 48\]"
    ):
        AdapterBank(LlamaForCausalLM(wide)).load("a", folders["everywhere"])


def test_only_plain_models_have_banks(folders: dict[str, Path]) -> None:
    wrapped = PeftModel.from_pretrained(base(), str(folders["everywhere"]))
    with pytest.raises(ValueError, match="plain model"):
        AdapterBank(wrapped)


def test_long_spans_have_products_of_their_own() -> None:
    """Neighbours of one adapter count together; the base's long spans are left out."""
    long = adapter_bank.LONG_SPAN
    spans: list[Span] = [("a", long - 1), ("a", 1), ("b", 1), (None, 1), ("a", 2), (None, long), ("b", 1)]
    runs = [(run.first, run.count, run.names) for run in adapter_bank._runs(spans) if run.names]
    assert runs == [(0, long, ("a",)), (long, 4, ("b", "a")), (2 * long + 4, 1, ("b",))]
