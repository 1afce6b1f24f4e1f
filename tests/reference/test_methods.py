"""Every kind of adapter against peft and bitsandbytes used plainly, and against the published formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.make_run import stir
from tests.reference.conftest import make_documents, make_model, one_batch
from tests.reference.test_loss_curves import assert_same_curve, our_losses, padded, plain_loop
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora, merge_adapter
from tunesmith.model.noise import EmbeddingNoise
from tunesmith.model.quant import quantize
from tunesmith.train.loop import Trainer
from tunesmith.train.metrics import loss_curve
from tunesmith.train.objective import Supervised

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
PEFT: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NEW = [510, 511]


def by_peft(model: Any, **settings: Any) -> Any:
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(**(PEFT | settings)))


# -- qlora -------------------------------------------------------------------------------------------------


def dequantized(layer: Any) -> Tensor:
    """The weight [O, I] that an NF4 layer multiplies with."""
    import bitsandbytes

    weight: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


LEVELS = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


@pytest.mark.parametrize(("kind", "double_quant"), [("llama-tied", True), ("qwen2", True), ("qwen2", False)])
def test_qlora_equals_a_plain_loop_with_bitsandbytes_and_peft(
    kind: str, double_quant: bool, tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    pytest.importorskip("bitsandbytes")
    make_model(kind).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    plain = plain_loop(by_peft(theirs))
    ours = make_model(kind)
    assert quantize(ours, device="cpu", compute_dtype=torch.float32, double_quant=double_quant) == 14
    ours = attach_lora(ours, **LORA, seed=7)
    assert_same_curve(our_losses(ours, make_trainer), plain, 1e-5)


def test_nf4_is_the_nearest_of_sixteen_levels_of_each_block_s_largest() -> None:
    """QLoRA, section 3 and appendix E: the levels, for blocks of 64, constants unquantised."""
    pytest.importorskip("bitsandbytes")
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    model: Any = make_model("qwen2")
    weight = model.model.layers[1].mlp.down_proj.weight.detach().double().clone()
    quantize(model, device="cpu", compute_dtype=torch.float32, double_quant=False)
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest).sub(levels[:, None, None]).abs().argmin(0)
    expected = (levels[nearest] * largest).reshape(weight.shape)
    found = dequantized(model.model.layers[1].mlp.down_proj).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert (found - weight).abs().max() > 1e-3


# -- variants of lora --------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "modules": ({"modules_to_save": ["input_layernorm", "mlp"]},) * 2,
    "head": ({"modules_to_save": ["lm_head"]},) * 2,
    "tokens": (
        {"new_token_ids": NEW},
        {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_a_plain_loop_with_peft(name: str, make_trainer: Callable[..., Trainer]) -> None:
    ours, theirs = VARIANTS[name]
    plain = plain_loop(by_peft(make_model("qwen2"), **theirs))
    model = attach_lora(make_model("qwen2"), **(LORA | ours), seed=7)
    assert_same_curve(our_losses(model, make_trainer), plain, 1e-5)


def test_tied_rows_of_new_tokens_equal_a_plain_loop(make_trainer: Callable[..., Trainer]) -> None:
    plain = plain_loop(by_peft(make_model("llama-tied"), trainable_token_indices={"embed_tokens": NEW}))
    model = attach_lora(make_model("llama-tied"), **LORA, new_token_ids=NEW, seed=7)
    assert_same_curve(our_losses(model, make_trainer), plain, 1e-5)


def test_whole_tied_embeddings_equal_a_plain_loop(make_trainer: Callable[..., Trainer]) -> None:
    """Embeddings and head stay one matrix: both names together train what a shared matrix trains."""
    plain_model = by_peft(make_model("llama-tied"))
    plain_model.get_input_embeddings().weight.requires_grad_(True)
    plain = plain_loop(plain_model)
    model = attach_lora(make_model("llama-tied"), **LORA, modules_to_save=["embed_tokens"], seed=7)
    assert_same_curve(our_losses(model, make_trainer), plain, 1e-5)


def dora_weight(layer: Any) -> Tensor:
    """m · (W + s·B·A) / ‖W + s·B·A‖, the norm of every row (arXiv:2402.09353, equation 5), in float64."""
    moved = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)


def test_dora_is_its_formula_trained_and_merged() -> None:
    model = attach_lora(make_model("qwen2"), **LORA, dora=True, seed=7)
    stir(model, std=0.1, seed=0, only="lora_")
    layer: Any = model.get_base_model().model.layers[1].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = dora_weight(layer)
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T, rtol=0, atol=1e-5)
    merged = merge_adapter(model).model.layers[1].mlp.up_proj.weight.double()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_lora_plus_equals_a_plain_loop_with_peft_s_optimizer(make_trainer: Callable[..., Trainer]) -> None:
    lr, ratio, steps, documents = 1e-3, 8.0, 12, make_documents(3)
    theirs = by_peft(make_model("qwen2")).train()
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    ids, labels, mask = padded(documents)
    plain = []
    for _ in range(steps):
        logits = theirs(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.append(float(loss.detach()))
    settings = {"lr": lr, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None}
    trainer = make_trainer(
        attach_lora(make_model("qwen2"), **LORA, seed=7),
        lambda step: [one_batch(documents)],
        steps=steps,
        train=settings,
        method={"lora_plus_ratio": ratio},
    )
    trainer.run()
    assert_same_curve(list(loss_curve(trainer.task.run.events).values()), plain, 1e-5)


# -- NEFTune -----------------------------------------------------------------------------------------------


def test_neftune_is_uniform_noise_of_alpha_over_the_root_of_the_document_s_size() -> None:
    """arXiv:2310.05914, algorithm 1, with the length of each document, not of the pack."""
    alpha, documents = 5.0, make_documents(6)
    model: Any = make_model("qwen2")
    attention.install(model)
    EmbeddingNoise(alpha).install(model)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    batch = one_batch(documents)

    def embedded() -> Tensor:
        Supervised().total(model, batch)
        return seen.pop()

    model.eval()
    clean = embedded()
    model.train()
    with torch.no_grad():
        assert torch.equal(embedded(), clean)
    torch.manual_seed(3)
    noise = embedded() - clean
    torch.manual_seed(3)
    assert torch.equal(embedded() - clean, noise)
    at = 0
    for ids, _ in documents:
        part = noise[at : at + len(ids)]
        bound = alpha / (len(ids) * part.shape[1]) ** 0.5
        assert 0.97 * bound < part.abs().max() <= bound * 1.001
        assert abs(part.std() / bound - 3**-0.5) < 0.05  # a uniform distribution's
        at += len(ids)


def test_neftune_equals_a_plain_loop_on_whole_documents() -> None:
    """Gradients flow through the noise as through a constant."""
    model: Any = make_model("llama-tied")
    attention.install(model)
    EmbeddingNoise(5.0).install(model)
    model.train()
    ids, labels = make_documents(1, seed=4)[0]
    torch.manual_seed(11)
    Supervised().total(model, one_batch([(ids, labels)])).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain: Any = make_model("llama-tied").train()
    torch.manual_seed(11)
    embedded = plain.model.embed_tokens(torch.from_numpy(ids)[None])
    noise = torch.rand_like(embedded).mul_(2).sub_(1) * 5.0 / (len(ids) * embedded.shape[-1]) ** 0.5
    logits = plain(inputs_embeds=embedded + noise).logits[0, :-1]
    wanted = torch.from_numpy(labels)[1:]
    F.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


# -- freezing ----------------------------------------------------------------------------------------------


def test_frozen_layers_equal_a_plain_loop(make_trainer: Callable[..., Trainer]) -> None:
    def frozen() -> nn.Module:
        model = make_model("qwen2")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_tokens" not in name and "layers.0" not in name)
        return model

    plain = plain_loop(frozen())
    assert_same_curve(our_losses(frozen(), make_trainer), plain, 1e-5)
