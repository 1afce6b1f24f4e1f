"""All decoder layers in one call against the same layers one after the other: equal, number for number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.test_fast_decode import KNOWN, model_of
from tunesmith.model import cpu_kernels
from tunesmith.model.cpu_kernels import Kernels
from tunesmith.model.fast_decode import make_forward
from tunesmith.model.kv_cache import CacheLayout, Chunk, KVCache
from tunesmith.model.served_weights import pack_weights

PAGES = [[1, 2], [3], [4, 5, 6]]
PROMPTS = [17, 9, 40]


@pytest.fixture
def kernels() -> Kernels:
    found = cpu_kernels.load()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def run(forward: Any, cache: KVCache, chunks: list[Chunk], ids: Tensor) -> Tensor:
    layout = CacheLayout(cache, chunks, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        return forward(ids, layout.positions[None], layout)


def decoded(model: Any, kernels: Kernels, dtype: torch.dtype | None) -> list[Tensor]:
    """The prompts in one pass, then three passes of a token for each of them."""
    forward, cache = make_forward(model), KVCache(6, kernels, dtype)
    made = torch.Generator().manual_seed(2)
    starts = [0, 0, 0]
    found = []
    for counts in (PROMPTS, *[[1, 1, 1]] * 3):
        chunks = [Chunk(*given) for given in zip(PAGES, starts, counts, strict=True)]
        found.append(run(forward, cache, chunks, torch.randint(300, (1, sum(counts)), generator=made)))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_one_call_gives_what_layer_after_layer_gives(
    kind: str, dtype: torch.dtype | None, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    pack_weights(model, "bf16")
    calls: list[int] = []
    own = Kernels.decode_layers
    monkeypatch.setattr(Kernels, "decode_layers", lambda *given: calls.append(1) or own(*given))
    together = decoded(model, kernels, dtype)
    assert len(calls) == 3
    monkeypatch.setattr(CacheLayout, "paged", lambda *_: None)
    assert all(map(torch.equal, together, decoded(model, kernels, dtype)))
    assert len(calls) == 3


def test_a_first_pass_of_single_tokens_has_no_pages_to_find_yet(kernels: Kernels) -> None:
    model = model_of("llama")
    pack_weights(model, "fp32")
    ids = torch.tensor([[7, 8]])
    one = [Chunk([1], 0, 1), Chunk([2], 0, 1)]
    found = run(make_forward(model), KVCache(2, kernels), one, ids)
    alone = [
        run(make_forward(model), KVCache(1, kernels), [Chunk([1], 0, 1)], ids[:, i : i + 1]) for i in (0, 1)
    ]
    assert torch.equal(found, torch.cat(alone, dim=1))
