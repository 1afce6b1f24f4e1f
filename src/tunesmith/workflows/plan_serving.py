"""What a machine can serve of a model: how many tokens, and how many requests of a length at a time.

By each engine's own rules: of ours what `model.kv_cache` and `workflows.open_engine` do, of vLLM what its dry
run counts, of llama.cpp what `serve.llamacpp_engine` asks of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB, bytes_text
from tunesmith.model.config import context_length, token_bytes
from tunesmith.model.generator import PREFILL_TOKENS
from tunesmith.model.kv_cache import cache_room
from tunesmith.model.pages import PAGE, pages_for
from tunesmith.plan.cards import Card
from tunesmith.plan.decoder import Shape, shape_of
from tunesmith.plan.generation import (
    VLLM_BLOCK,
    VLLM_VERSIONS,
    CardKind,
    VllmRun,
    VllmVersion,
    card_kind,
    default_batch,
    layer_bytes,
    vllm_activation,
    vllm_graphs,
    vllm_non_torch,
    vllm_spread,
    vllm_version,
)
from tunesmith.plan.model_weights import model_weights
from tunesmith.plan.serving import (
    FORMATS,
    GGUF_FORMATS,
    Weight,
    adapter_bytes,
    fused,
    gguf_bytes,
    held_bytes,
    local_weight_bytes,
    sharded,
    weight_bytes,
)
from tunesmith.recipe.serving import Serve
from tunesmith.workflows.engine_wants import served_length

Engine = Literal["local", "vllm", "llamacpp"]
# Outputs that the CPU kernels keep together with AVX-512; half with AVX2, which no common size feels.
PANEL = 32
LOCAL_FORMATS = {"cpu": ("fp32", "bf16", "fp16", "int8", "nf4"), "cuda": ("fp32", "bf16", "fp16", "nf4")}
LOCAL_ON_GPU = {"nf4": "nf4-dq"}
VLLM_FORMATS = tuple(name for name in FORMATS if name != "nf4-dq")
LLAMACPP_BATCH = 512  # tokens of its physical batch (--ubatch-size)
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What one card (or the machine's memory) holds while it serves, and what that suffices for.

    parts: bytes beside the cache. cache_tokens: as many as the engine sets up for `requests` of max_length;
    most_tokens: as many as there is room for, between low_tokens and high_tokens; most_requests: how many of
    max_length are in them. total_bytes: of one card, `cards` of which share the model.
    """

    engine: Engine
    device: Literal["cpu", "cuda"]
    weights: str
    cards: int
    total_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    token_bytes: int
    max_length: int
    requests: int
    cache_tokens: int
    most_tokens: int
    low_tokens: int
    high_tokens: int
    block: int

    @property
    def most_requests(self) -> int:
        return self.most_tokens // (-(-self.max_length // self.block) * self.block)

    @property
    def fits(self) -> bool:
        """Whether the engine starts and answers one request of max_length."""
        return self.most_requests > 0

    @property
    def cache_bytes(self) -> int:
        return self.cache_tokens * self.token_bytes

    def as_dict(self) -> dict[str, Any]:
        found = {"fits": self.fits, "most_requests": self.most_requests, "cache_bytes": self.cache_bytes}
        return asdict(self) | {"parts": dict(self.parts)} | found

    def sentence(self) -> str:
        """For people, in one line."""
        length = f"{self.max_length:,} tokens"
        if not self.fits:
            needed = bytes_text(self.max_length * self.token_bytes + sum(self.parts.values()))
            return (
                f"after training: {self.engine} has no room for a request of {length}: it needs {needed} of "
                f"{bytes_text(self.total_bytes)}"
            )
        where = "this machine" if self.device == "cpu" else "this card"
        where, verb = (where, "serves") if self.cards == 1 else (f"{self.cards} of these cards", "serve")
        return (
            f"after training: {where} {verb} {self.most_requests:,} requests of {length} at a time "
            f"({self.engine}, {self.weights})"
        )

    def rows(self) -> list[tuple[str, str]]:
        """A table for people: names and figures."""
        found = [(name, bytes_text(size)) for name, size in self.parts.items() if size]
        found.append(("keys and values of a token", bytes_text(self.token_bytes)))
        span = f"{self.most_tokens:,}"
        if self.low_tokens != self.high_tokens:
            span += f" ({self.low_tokens:,} to {self.high_tokens:,})"
        found.append(("tokens that fit", span))
        found.append((f"requests of {self.max_length:,} tokens", f"{self.most_requests:,}"))
        return found


def plan_serving(
    config: Any,
    *,
    total_bytes: int | None = None,
    card: Card | None = None,
    device: Literal["cpu", "cuda"] = "cuda",
    context_bytes: int = 0,
    precision: str = "auto",
    max_length: int | Literal["auto"] = "auto",
    requests: int | None = None,
    engine: Engine = "local",
    adapters: int = 0,
    adapter_rank: int = 16,
    cards: int = 1,
    vllm_release: tuple[int, int] | None = None,
    weights: Sequence[Weight] | None = None,
) -> ServingPlan:
    """The plan of serving the model of a transformers configuration; no weights are read.

    card, or total_bytes of a card or of a machine's memory, context_bytes of them CUDA's. precision: how the
    weights are stored: of our engine fp32, bf16, fp16, int8, nf4; of vLLM also fp8, GPTQ's and AWQ's; of
    llama.cpp f16, q8_0, q4_k_m … requests: at a time; None: the default of `tunesmith serve`. adapters: so
    many of adapter_rank beside the base. cards: that share every layer (vLLM). vllm_release: such as (0, 32);
    None: the rules of the newest, between the figures of all. weights: the model's, where they are known
    already. Raises UserError for what an engine does not have, and a max_length beyond the model's.
    """
    if card is not None:
        total_bytes, context_bytes = int(card.usable_gib * GIB), int(card.context_mib * (1 << 20))
    if total_bytes is None:
        raise ValueError("plan_serving: give card or total_bytes")
    _check(engine, device, cards)
    kind = card_kind(card) if card is not None else CardKind(num_bytes=total_bytes)
    asked = _Asked(
        config=config,
        shape=shape_of(config),
        weights=list(weights) if weights is not None else model_weights(config),
        total=total_bytes,
        context=context_bytes if device == "cuda" else 0,
        card=kind,
        device=device,
        stored=_stored(engine, device, precision, card),
        length=served_length(max_length, context_length(config)),
        requests=requests or Serve().max_concurrent,
        adapters=adapters,
        rank=adapter_rank,
        cards=cards,
    )
    if engine == "vllm":
        return _vllm(asked, vllm_release)
    return _local(asked) if engine == "local" else _llamacpp(asked)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    config: Any
    shape: Shape
    weights: list[Weight]
    total: int
    context: int
    card: CardKind
    device: Literal["cpu", "cuda"]
    stored: str
    length: int
    requests: int
    adapters: int
    rank: int
    cards: int

    def plan(
        self,
        engine: Engine,
        parts: Mapping[str, int],
        token: int,
        block: int,
        tokens: tuple[int, int, int, int],
    ) -> ServingPlan:
        """tokens: set up, possible, and the interval of the possible; each cut to whole blocks."""
        setup, most, low, high = (max(0, count // block * block) for count in tokens)
        return ServingPlan(
            engine=engine,
            device=self.device,
            weights=self.stored,
            cards=self.cards,
            total_bytes=self.total,
            parts=parts,
            token_bytes=token,
            max_length=self.length,
            requests=self.requests,
            cache_tokens=setup,
            most_tokens=most,
            low_tokens=low,
            high_tokens=high,
            block=block,
        )


def _check(engine: Engine, device: str, cards: int) -> None:
    if engine != "vllm" and cards > 1:
        raise UserError(f"engine '{engine}': computes on one card, not {cards}", hint="take engine vllm")
    if engine == "vllm" and device == "cpu":
        raise UserError("engine 'vllm': is planned for cards only", hint="take engine local or llamacpp")


def _stored(engine: Engine, device: str, wanted: str, card: Card | None) -> str:
    """The format of the weights. Raises UserError for one that the engine does not have."""
    known = {"local": LOCAL_FORMATS[device], "vllm": VLLM_FORMATS, "llamacpp": GGUF_FORMATS}[engine]
    if wanted == "auto":
        modern = card is None or card.capability >= BF16_CAPABILITY
        plain = "fp32" if engine == "local" and device == "cpu" else "bf16" if modern else "fp16"
        return "f16" if engine == "llamacpp" else plain
    if wanted not in known:
        raise UserError(
            f"precision '{wanted}': the engine '{engine}' does not store weights so on this device",
            hint=f"it has {', '.join(known)}",
        )
    return wanted


# -- our own engine ----------------------------------------------------------------------------------


def _local(asked: _Asked) -> ServingPlan:
    stored = _local_weights(asked)
    # fp32; adapters that answer in one pass are joined, a copy.
    bank = adapter_bytes(asked.weights, asked.rank, 4) * asked.adapters * (2 if asked.adapters > 1 else 1)
    each = 4 if asked.stored == "fp32" else 2
    token, length = token_bytes(asked.config, each), asked.length
    free = max(0, asked.total - asked.context - stored - bank)
    # The engine takes room for one request in any case.
    most = max(length, cache_room(asked.device, stored, free) // token)
    setup = max(length, min(asked.requests * length, most))
    one_pass = _pass_bytes(asked, each, setup)
    if length * token + one_pass > free:
        most = 0
    parts = {"weights": stored, "adapters": bank, "CUDA context": asked.context, "a pass": one_pass}
    return asked.plan("local", parts, token, PAGE, (pages_for(setup) * PAGE, most, most, most))


def _local_weights(asked: _Asked) -> int:
    if asked.device == "cpu":
        return local_weight_bytes(asked.weights, asked.stored, device="cpu", panel=PANEL)
    return weight_bytes(asked.weights, FORMATS[LOCAL_ON_GPU.get(asked.stored, asked.stored)], held_bytes)


def _pass_bytes(asked: _Asked, each: int, cached: int) -> int:
    """Of one pass: a layer over a chunk of prompts and a token of each request, copied pages, logits.

    A CPU computes in fp32, and its kernels read the pages where they lie but for a prompt's. cached: tokens.
    """
    shape, tokens = asked.shape, PREFILL_TOKENS + asked.requests
    on_gpu = asked.device == "cuda"
    computed = each if on_gpu else 4
    copied = min(asked.requests * asked.length, cached) if on_gpu else asked.length
    logits = asked.requests * shape.vocab * (computed + 4)
    return layer_bytes(shape, tokens, computed) + 2 * copied * shape.key * each + logits


# -- vLLM --------------------------------------------------------------------------------------------


def _vllm(asked: _Asked, release: tuple[int, int] | None) -> ServingPlan:
    each = 4 if asked.stored == "fp32" else 2
    version = vllm_version(*release) if release else VLLM_VERSIONS[-1]
    runs = {one: _vllm_run(asked, one, each) for one in ((version,) if release else VLLM_VERSIONS)}
    held = sharded(asked.weights, asked.cards, asked.shape.kv_heads) if asked.cards > 1 else asked.weights
    parts = {one.name: _vllm_parts(asked, held, run) for one, run in runs.items()}
    token = asked.shape.token_bytes(each, asked.cards)
    rooms = {name: asked.total - sum(found.values()) for name, found in parts.items()}
    spread = {one.name: vllm_spread(run) for one, run in runs.items()}
    low = min(rooms[name] - spread[name] for name in rooms)
    high = max(rooms[name] + spread[name] for name in rooms)
    most = rooms[version.name] // token
    tokens = (most, most, low // token, high // token)
    return asked.plan("vllm", parts[version.name], token, VLLM_BLOCK, tokens)


def _vllm_run(asked: _Asked, version: VllmVersion, each: int) -> VllmRun:
    tokens = default_batch(asked.card)[0] if version.chunked else max(2048, asked.length)
    return VllmRun(
        version=version,
        card=asked.card,
        tokens=tokens,
        sequences=asked.requests,
        each=each,
        tensor_parallel=asked.cards,
    )


def _vllm_parts(asked: _Asked, held: Sequence[Weight], run: VllmRun) -> dict[str, int]:
    rotary = asked.shape.context * asked.shape.head_dim * run.each
    stored = weight_bytes(fused(held, ["qkv", "gate_up"]), FORMATS[asked.stored], held_bytes)
    return {
        "weights": stored + rotary,
        "adapters": adapter_bytes(held, asked.rank, run.each) * asked.adapters,
        "dry run": vllm_activation(asked.shape, run).num_bytes,
        "CUDA graphs": vllm_graphs(run),
        "other than torch": vllm_non_torch(run),
        "left to others": asked.total - int(run.version.utilization * asked.total),
    }


# -- llama.cpp ---------------------------------------------------------------------------------------


def _llamacpp(asked: _Asked) -> ServingPlan:
    """Keys and values in fp16 for max_length tokens of every slot; fp32 logits of a whole batch."""
    shape = asked.shape
    parts = {
        "weights": gguf_bytes(asked.weights, asked.stored),
        "adapters": adapter_bytes(asked.weights, asked.rank, 2) * asked.adapters,
        "CUDA context": asked.context,
        "a batch": LLAMACPP_BATCH * 4 * (shape.vocab + shape.hidden),
    }
    token = shape.token_bytes(2)
    most = (asked.total - sum(parts.values())) // token
    return asked.plan("llamacpp", parts, token, 1, (asked.requests * asked.length, most, most, most))
