"""Fold an adapter into its base, write the model, read it back, and prove that it answers as before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from tunesmith.core.errors import RunFailed
from tunesmith.export.check import Check
from tunesmith.export.probes import probe_logits, relative_difference, rounding_noise
from tunesmith.model.adapters import merge_adapter
from tunesmith.model.load import load_model
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import weight_files

# fp32 has a unit roundoff of 6e-8. W·x + s·B·(A·x) and (W + s·B·A)·x add the same products in another
# order: 2e-5 of the largest logit was the most seen on 30 layers, a wrong scale or layer gives 1e-2 and more.
FP32_BOUND = 1e-4
# Rounded weights may move the logits as far as random noise of one rounding does, with room for chance.
NOISE_FACTOR = 4.0


def write_merged(
    adapted: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    trust_remote_code: bool = False,
) -> list[Check]:
    """Merge the fp32 PeftModel `adapted` and write the plain model to `folder` as `dtype`.

    Returns the checks, all passed: merged against adapter, and the files read back against adapter.
    Raises RunFailed when one does not hold; `folder` must then not be published. `adapted` is used up.
    """
    merged, reference, check = merge_checked(adapted, prompts)
    stored = write_plain(
        merged,
        folder,
        dtype=dtype,
        prompts=prompts,
        reference=reference,
        trust_remote_code=trust_remote_code,
    )
    return [check, stored]


def merge_checked(adapted: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, list[Tensor], Check]:
    """The fp32 PeftModel `adapted` folded into a plain model, its logits before, and how they compare.

    Raises RunFailed when they differ by more than the order of additions explains. `adapted` is used up.
    """
    reference = probe_logits(adapted, prompts)
    merged = merge_adapter(adapted)
    difference = relative_difference(reference, probe_logits(merged, prompts))
    source = "fp32: the same products added in another order"
    return merged, reference, _hold(Check("merged weights against adapter", difference, FP32_BOUND, source))


def write_plain(
    model: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    reference: list[Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Check:
    """Write the fp32 `model` to `folder` as `dtype`, read it back, and compare with `reference` logits.

    Raises RunFailed when they disagree by more than rounding explains. `model` is changed to `dtype`.
    """
    reference = probe_logits(model, prompts) if reference is None else reference
    rounded = {name for name, p in model.named_parameters() if not torch.equal(p.to(dtype).float(), p)}
    model.to(dtype)
    model.config.dtype = dtype
    # transformers refuses to save settings that it finds odd; the caller writes this file itself.
    model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
    check_files(model, folder)
    stored = load_model(folder, dtype=torch.float32, device="cpu", trust_remote_code=trust_remote_code)
    return _hold(_stored_check(stored, rounded, reference, dtype, prompts))


def check_files(model: Any, folder: Path) -> None:
    """Raise RunFailed unless the tensors in the files are the model's, bit for bit, and finite."""
    state = model.state_dict()
    for path in weight_files(folder):
        for name, tensor in load_file(path).items():
            if not torch.equal(tensor, state[name]):
                raise RunFailed(
                    f"the export was refused: '{name}' in {path.name} is not what was written",
                    hint="check the disk (dmesg, smartctl), or write to another with --output",
                )
            if not bool(torch.isfinite(tensor).all()):
                raise RunFailed(
                    f"the export was refused: '{name}' is not finite as {str(tensor.dtype)[6:]}",
                    hint="fp16 ends at 65504: take --dtype bf16; else export an earlier --checkpoint",
                )


def _stored_check(
    stored: Any,
    rounded: set[str],
    reference: list[Tensor],
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
) -> Check:
    found = probe_logits(stored, prompts)
    name = "files read back against the trained weights"
    difference = relative_difference(reference, found)
    if not rounded:
        return Check(name, difference, FP32_BOUND, "no weight was rounded")
    unit_roundoff = torch.finfo(dtype).eps / 2
    with rounding_noise(stored, rounded, unit_roundoff):
        noise = relative_difference(found, probe_logits(stored, prompts))
    source = (
        f"{NOISE_FACTOR:g} times what noise of one rounding (u = {unit_roundoff:g}) in the same weights does"
    )
    return Check(name, difference, NOISE_FACTOR * noise + FP32_BOUND, source)


def _hold(check: Check) -> Check:
    if check.passed:
        return check
    raise RunFailed(
        f"the export was refused: {check.name}: logits differ by {check.difference:.2g} of the largest, "
        f"more than the bound {check.bound:.2g} ({check.source})",
        hint="export another --checkpoint, or take --dtype fp32; please report it if that does not help",
    )
