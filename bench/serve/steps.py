"""What one decode step costs, computed in different ways in one process, turn and turn about.

    python bench/serve/steps.py MODEL_FOLDER --rows 1,8,32 --context 200 --threads 2
    python bench/serve/steps.py MODEL_FOLDER --ways bf16,bf16+1,bf16+8,bf16+8/2 --threads 1 --clock cpu

Every row has `context` tokens in its cache and gets one more: embedding, layers, attention, head, greedy
choice. Ways: eager and compiled transformers (fp32; compiled with a static cache, one graph a batch size),
the same pass converted for OpenVINO (fp32; keys and values of the context as inputs), and this project's
kernels with each format of weights, and without kernels. FORMAT+N: with N adapters, the rows taking them in
turns; FORMAT+N/M: only every M-th row has one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import make_adapters
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tunesmith.model import attention, cpu_kernels
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.fast_decode import make_forward
from tunesmith.model.fast_linear import fast_head, use_blocks
from tunesmith.model.kv_cache import CacheLayout, Chunk, KVCache
from tunesmith.model.load import load_model
from tunesmith.model.pages import PAGE, pages_for
from tunesmith.model.served_weights import pack_weights

Step = Callable[[], Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FORMATS = ("fp32", "bf16", "int8", "nf4")
WAYS = ("eager", "compiled", "torch", *FORMATS)  # and "openvino", where that package is installed


def model_of(folder: Path) -> Any:
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu")).eval()
    model.config._attn_implementation = "sdpa"
    return model


def eager(folder: Path, context: int) -> Callable[[int], Step]:
    model = model_of(folder)

    def step_of(rows: int) -> Step:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.full((rows, context), 5), past_key_values=cache, logits_to_keep=1)
        ids = torch.full((rows, 1), 7)

        def step() -> Tensor:
            logits = model(input_ids=ids, past_key_values=cache).logits
            cache.crop(-1)
            return logits[:, -1].argmax(-1)

        return step

    return step_of


def compiled(folder: Path, context: int) -> Callable[[int], Step]:
    torch._inductor.config.freezing = True
    model = model_of(folder)
    forward = torch.compile(model.forward, dynamic=False)

    def step_of(rows: int) -> Step:
        cache = StaticCache(config=model.config, max_cache_len=-(-(context + 64) // 64) * 64)
        model(input_ids=torch.full((rows, context), 5), past_key_values=cache, logits_to_keep=1)
        ids, place = torch.full((rows, 1), 7), torch.full((rows, 1), context)
        lengths = [(layer, layer.cumulative_length.clone()) for layer in cache.layers]

        def step() -> Tensor:
            logits = forward(input_ids=ids, position_ids=place, past_key_values=cache).logits
            for layer, length in lengths:
                layer.cumulative_length.copy_(length)
            return logits[:, -1].argmax(-1)

        return step

    return step_of


class _Past:
    """A layout with `past` keys and values [R, Hkv, context, Dh] of every layer, one after the other."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.past = past

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = [part[0].transpose(0, 1)[:, :, None] for part in (q, k, v)]
        keys = torch.cat([self.past[2 * layer], rows[1]], 2)
        values = torch.cat([self.past[2 * layer + 1], rows[2]], 2)
        groups = rows[0].unflatten(1, (keys.shape[1], -1))[:, :, :, 0]
        seen = torch.nn.functional.scaled_dot_product_attention(groups, keys, values, scale=scale)
        return seen.flatten(1, 2)[None]


class _Converted(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model, attention.lm_head(model)

    def forward(self, ids: Tensor, positions: Tensor, *past: Tensor) -> Tensor:
        return self.head(attention.hidden_states(self.model, ids, positions, _Past(past))[0])


def openvino(folder: Path, context: int) -> Callable[[int], Step]:
    import openvino

    model = model_of(folder)
    attention.install(model, max_length=context + 1)
    config = model.config
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def step_of(rows: int) -> Step:
        shape = (rows, config.num_key_value_heads, context, config.head_dim)
        with torch.inference_mode(mode=False), torch.no_grad():
            past = [torch.randn(shape) for _ in range(2 * config.num_hidden_layers)]
            given = (torch.full((1, rows), 7), torch.full((1, rows), context), *past)
            graph = openvino.convert_model(_Converted(model), example_input=given)
        for place, tensor in zip(graph.inputs, given, strict=True):
            place.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
        graph.validate_nodes_and_infer_types()
        request = core.compile_model(graph, "CPU").create_infer_request()
        for number, tensor in enumerate(given):
            request.set_input_tensor(number, openvino.Tensor(tensor.numpy(), shared_memory=True))

        def step() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data).argmax(-1)

        return step

    return step_of


def with_adapters(model: Any, folder: Path, count: int, rank: int) -> AdapterBank:
    bank = AdapterBank(model)
    with tempfile.TemporaryDirectory() as made:
        for name, path in make_adapters(folder, Path(made), count=count, rank=rank).items():
            bank.load(name, path)
    return bank


def ours(folder: Path, context: int, way: str, rank: int) -> Callable[[int], Step]:
    way, _, adapters = way.partition("+")
    count, _, every = adapters.partition("/")
    model = model_of(folder)
    attention.install(model, max_length=context + 1)
    kernels = None if way == "torch" else cpu_kernels.load()
    if way == "torch":
        use_blocks(model)
        forward = lambda *given: attention.hidden_states(model, *given)  # noqa: E731
    else:
        pack_weights(model, way)  # type: ignore[arg-type]
        forward = make_forward(model)
    head = fast_head(attention.lm_head(model))
    bank = with_adapters(model, folder, int(count or 0), rank)

    def step_of(rows: int) -> Step:
        each = pages_for(context + 1)
        cache = KVCache(rows * each, kernels)
        chunks = [Chunk(range(1 + r * each, 1 + (r + 1) * each), context, 1) for r in range(rows)]
        fill(cache, model, rows * each)
        ids = torch.full((1, rows), 7)
        names = [
            bank.names[r % len(bank.names)] if bank.names and r % int(every or 1) == 0 else None
            for r in range(rows)
        ]

        def step() -> Tensor:
            layout = CacheLayout(cache, chunks, dtype=torch.float32, device=torch.device("cpu"))
            with bank.selected([(name, 1) for name in names]):
                hidden = forward(ids, layout.positions[None], layout)[0]
            return head(hidden).argmax(-1)

        return step

    return step_of


def fill(cache: KVCache, model: Any, num_pages: int) -> None:
    """Keys and values that are numbers, in every layer."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    some = torch.randn(1, config.num_key_value_heads, num_pages * PAGE, head)
    for layer in range(config.num_hidden_layers):
        for pages in cache.at(layer, some, some):
            pages[1:] = some[0].transpose(0, 1).reshape(pages[1:].shape)


def make(way: str, folder: Path, context: int, rank: int) -> Callable[[int], Step]:
    makers = {"eager": eager, "compiled": compiled, "openvino": openvino}
    return makers[way](folder, context) if way in makers else ours(folder, context, way, rank)


def measure(steps: dict[str, Step], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each step, the ways taking turns, for about so many seconds."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for way, step in steps.items():
            begin = clock()
            step()
            times[way].append((clock() - begin) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of rows")
    parser.add_argument("--rank", type=int, default=8, help="of adapters")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of this process alone")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        ways = {way: make(way, given.model, given.context, given.rank) for way in given.ways.split(",")}
        for rows in map(int, given.rows.split(",")):
            steps = {way: step_of(rows) for way, step_of in ways.items()}
            for step in steps.values():
                for _ in range(2):
                    step()
            for way, times in measure(steps, given.seconds, CLOCKS[given.clock]).items():
                best, middle = min(times), statistics.median(times)
                found = {"way": way, "rows": rows, "best_ms": round(best, 2), "median_ms": round(middle, 2)}
                found |= {"tokens_per_s": round(rows * 1e3 / middle, 1), "steps": len(times)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
