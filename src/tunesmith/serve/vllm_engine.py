"""vLLM's server behind the Engine protocol, in an environment or container of its own.

Its requests and answers: vLLM's vllm/entrypoints/openai/completion (0.32) and vllm/entrypoints/serve/lora.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient, NetError
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.limits import check_adapter
from tunesmith.model.requests import MAX_LOGPROBS, FinishReason, Logprobs, SamplingParams, TokenEvent
from tunesmith.model.weights import ADAPTER_CONFIG, is_adapter, read_json_file
from tunesmith.serve.driver import Command, finish_of
from tunesmith.serve.engine import Ask, EngineError

BASE = "base"
GIB = 1024**3
# vLLM's own list of possible --max-lora-rank.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_LORAS = 8
# Beside weights and cache on the card, where it is not known: CUDA's context, activations, CUDA graphs.
UNKNOWN_GPU_BYTES = 3 * GIB
BLOCK = 16  # tokens of a block of its cache
MOST_UTILIZATION = 0.92
ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class VllmPlan:
    """Arguments that follow from the model and the card.

    gpu_memory_utilization: share of the card that vLLM takes; None on a CPU, which kv_cache_gib is for.
    """

    max_length: int
    max_concurrent: int
    gpu_memory_utilization: float | None = None
    kv_cache_gib: int | None = None
    max_lora_rank: int | None = None
    max_loras: int = MAX_LORAS
    dtype: str = "auto"

    def args(self) -> list[str]:
        args = ["--max-model-len", str(self.max_length), "--max-num-seqs", str(self.max_concurrent)]
        args += ["--dtype", self.dtype, "--max-logprobs", str(MAX_LOGPROBS)]
        if self.gpu_memory_utilization is not None:
            args += ["--gpu-memory-utilization", f"{self.gpu_memory_utilization:.4f}"]
        if self.max_lora_rank is not None:
            args += ["--enable-lora", "--max-lora-rank", str(self.max_lora_rank)]
            args += ["--max-loras", str(self.max_loras), "--max-cpu-loras", str(max(self.max_loras, 32))]
        return args


def plan_vllm(
    *,
    weight_bytes: int,
    kv_bytes_per_token: int,
    max_length: int,
    max_concurrent: int,
    gpu_bytes: int | None = None,
    free_gpu_bytes: int | None = None,
    other_bytes: int | None = None,
    max_lora_rank: int | None = None,
    dtype: str = "auto",
) -> VllmPlan:
    """The arguments for a model of `weight_bytes` on a card of `gpu_bytes`, `free_gpu_bytes` of them free.

    All bytes are those of one card, of which several may share the model. gpu_bytes None: a CPU. other_bytes:
    beside weights and cache, adapters included; None: UNKNOWN_GPU_BYTES. max_lora_rank: of adapters, those
    that are loaded later too; None: there are none. dtype: as vLLM calls it.

    Raises UserError when weights and one request of max_length do not fit.
    """
    other = UNKNOWN_GPU_BYTES if other_bytes is None else other_bytes
    one = kv_bytes_per_token * math.ceil(max_length / BLOCK) * BLOCK
    if gpu_bytes is None:
        cache = max(1, math.ceil(min(max_concurrent, 8) * one / GIB))
        return VllmPlan(max_length, max_concurrent, None, cache, max_lora_rank, dtype=dtype)
    usable = min(
        free_gpu_bytes if free_gpu_bytes is not None else gpu_bytes, int(gpu_bytes * MOST_UTILIZATION)
    )
    least = weight_bytes + other + one
    if usable < least:
        blocks = max(0, usable - weight_bytes - other) // (BLOCK * kv_bytes_per_token)
        fits = blocks * BLOCK
        raise UserError(
            f"vLLM: weights, {other / GIB:.1f} GiB of work space and a request of {max_length} tokens "
            f"need {least / GIB:.1f} GiB; of the card {usable / GIB:.1f} GiB are free",
            hint=f"give --max-length {fits}" if fits >= 256 else "take a smaller model or a larger card",
        )
    wanted = weight_bytes + other + max_concurrent * one
    share = math.floor(min(usable, wanted) / gpu_bytes * 10_000) / 10_000
    return VllmPlan(max_length, max_concurrent, share, None, max_lora_rank, dtype=dtype)


def lora_rank(rank: int) -> int:
    """The least of vLLM's ranks that holds `rank`. Raises UserError for more than its largest."""
    found = next((one for one in LORA_RANKS if one >= rank), None)
    if found is None:
        raise UserError(f"vLLM: an adapter of rank {rank} is above its largest, {LORA_RANKS[-1]}")
    return found


@dataclass
class VllmDriver:
    """`program` (vllm, or a Python and what runs it) on the model folder `model`.

    container: an image in place of `program`, run by docker with the model and the adapters mounted where
    they are; its port is published on loopback. adapters_at_start: name and folder, loaded before the first
    request; others come and go while it runs where the plan has a max_lora_rank. extra: more arguments.
    """

    program: Sequence[str]
    model: Path
    plan: VllmPlan
    container: str | None = None
    mounts: Sequence[Path] = ()
    extra: Sequence[str] = ()
    adapters_at_start: Mapping[str, Path] = field(default_factory=dict)
    name: str = "vLLM"
    health: str = "/health"

    def __post_init__(self) -> None:
        self._loaded: dict[str, Path] = dict(self.adapters_at_start)

    def command(self, port: int, key: str) -> Command:
        env = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        if self.plan.max_lora_rank is not None:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.plan.kv_cache_gib is not None:
            env["VLLM_CPU_KVCACHE_SPACE"] = str(self.plan.kv_cache_gib)
        options = ["--served-model-name", BASE, "--generation-config", "vllm", *self.plan.args()]
        options += ["--disable-log-stats", *self.extra]
        if self.container is None:
            where = ["--host", "127.0.0.1", "--port", str(port)]
            return Command([*self.program, "serve", str(self.model), *where, *options], env)
        return Command(self._docker(port, env, options), env)

    def _docker(self, port: int, env: Mapping[str, str], options: Sequence[str]) -> list[str]:
        """`docker run` in the foreground: what ends it ends the container (--init passes signals on)."""
        args = ["docker", "run", "--rm", "--init", "--gpus", "all", "--ipc", "host"]
        args += ["--publish", f"127.0.0.1:{port}:8000"]
        for name in env:
            args += ["--env", name]  # the value comes from our environment: arguments are public
        for folder in dict.fromkeys((self.model, *self.mounts, *self._loaded.values())):
            args += ["--volume", f"{folder}:{folder}:ro"]
        where = ["--host", "0.0.0.0", "--port", "8000"]
        return [*args, self.container or "", "--model", str(self.model), *where, *options]

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    async def prepare(self, client: EventClient) -> None:
        """Load the adapters: after a restart also those that had come while it ran."""
        for name, folder in self._loaded.items():
            await self._load(client, name, folder)

    async def load_adapter(self, client: EventClient, name: str, folder: Path) -> None:
        self._check_adapter(name, folder)
        await self._load(client, name, folder, again=name in self._loaded)
        self._loaded[name] = folder

    async def _load(self, client: EventClient, name: str, folder: Path, *, again: bool = False) -> None:
        body = {"lora_name": name, "lora_path": str(folder.absolute()), "load_inplace": again}
        await _call(client, "/v1/load_lora_adapter", body, f"the adapter '{name}' in {folder}")

    def _check_adapter(self, name: str, folder: Path) -> None:
        if self.plan.max_lora_rank is None:
            raise UserError(
                f"the adapter '{name}' cannot be loaded: vLLM was started without adapters",
                hint="start it with one, or with --live-adapters",
            )
        if name == BASE:
            raise UserError(f"an adapter cannot be called '{BASE}'", hint="give it another name")
        if not is_adapter(folder):
            raise UserError(f"{folder}: holds no {ADAPTER_CONFIG}", hint="give an adapter folder")
        config = read_json_file(folder / ADAPTER_CONFIG)
        rank = int(config.get("r", 0))
        if rank > self.plan.max_lora_rank:
            raise UserError(
                f"{folder}: its rank {rank} is above the {self.plan.max_lora_rank} that vLLM was started for",
                hint="start it again with this adapter",
            )
        if config.get("modules_to_save"):
            raise UserError(
                f"{folder}: vLLM serves no adapter with modules_to_save ({config['modules_to_save']})",
                hint="export it with --to merged, or use the local engine",
            )

    async def unload_adapter(self, client: EventClient, name: str) -> None:
        check_adapter(name, self._loaded)
        await _call(client, "/v1/unload_lora_adapter", {"lora_name": name}, f"the adapter '{name}'")
        del self._loaded[name]

    def check(self, ask: Ask) -> None:
        if ask.params.grammar is not None and ask.params.grammar.kind == "lark":
            return  # its own libraries say what they do not take
        bias = ask.params.logit_bias.values()
        if any(not -100 <= value <= 100 for value in bias):
            raise UserError("logit_bias: vLLM takes values of -100 to 100")

    # -- one answer ------------------------------------------------------------------------------------

    async def answer(self, client: EventClient, ask: Ask) -> AsyncGenerator[TokenEvent, None]:
        body = _body(ask)
        if ask.params.prompt_logprobs is not None:  # vLLM tells them of whole answers only
            choice = (await client.post("/v1/completions", body))["choices"][0]
            for event in _events(ask, choice, 0, _prompt_logprobs(ask, choice)):
                yield event
            return
        count = 0
        async for data in client.events("/v1/completions", body | {"stream": True}):
            if data == "[DONE]":
                return
            for choice in _checked(data)["choices"]:
                for event in _events(ask, choice, count):
                    count += event.token_id is not None
                    yield event


async def _call(client: EventClient, path: str, body: dict[str, Any], what: str) -> None:
    """A call whose answer is a sentence. Raises UserError for a refusal, EngineError for anything else."""
    try:
        await client.post_text(path, body)
    except NetError as error:
        if error.status is not None and error.status < 500:
            raise UserError(f"{what}: vLLM refuses it: {error}") from None
        raise EngineError(f"{what}: {error}") from None


def _body(ask: Ask) -> dict[str, Any]:
    params = ask.params
    body: dict[str, Any] = {
        "model": ask.adapter or BASE,
        "prompt": list(ask.prompt),
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        # The model's own end counts only where it is among the stop ids.
        "ignore_eos": True,
        "stop_token_ids": list(params.stop_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }
    if params.seed is not None:
        body["seed"] = params.seed
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.logprobs is not None:
        body["logprobs"] = params.logprobs
    if params.prompt_logprobs is not None:
        body["prompt_logprobs"] = params.prompt_logprobs
    return body | _structured(params.grammar)


def _structured(spec: GrammarSpec | None) -> dict[str, Any]:
    if spec is None:
        return {}
    if spec.kind == "json_object":
        wanted: dict[str, Any] = {"json_object": True}
    elif spec.kind in ("json_schema", "choice"):
        wanted = {"json" if spec.kind == "json_schema" else "choice": json.loads(spec.text)}
    else:
        wanted = {"regex" if spec.kind == "regex" else "grammar": spec.text}
    return {"structured_outputs": wanted}


def _checked(data: str) -> dict[str, Any]:
    """A chunk of an answer. Raises EngineError where it is an error."""
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise EngineError(str(chunk["error"].get("message", chunk["error"])))
    return chunk


def _events(
    ask: Ask, choice: Mapping[str, Any], count: int, prompt: tuple[Logprobs, ...] | None = None
) -> list[TokenEvent]:
    """The events of a part of an answer that has `count` tokens already; prompt: for its first event."""
    told: FinishReason | None = _finish(choice.get("finish_reason"))
    tokens = [int(token) for token in choice.get("token_ids") or ()]
    logprobs = _logprobs(ask.params, tokens, choice.get("logprobs"))
    events: list[TokenEvent] = []
    for number, token in enumerate(tokens):
        finish = finish_of(ask, token, count + number + 1)
        if number == len(tokens) - 1:
            finish = finish or told
        events.append(TokenEvent(0, token, finish, logprobs[number], prompt if number == 0 else None))
        if finish is not None:
            return events
    if told is not None:
        events.append(TokenEvent(0, None, told, None, None if tokens else prompt))
    return events


def _finish(reason: str | None) -> FinishReason | None:
    """vLLM's reasons: stop, length, abort, error, repetition."""
    if reason is None:
        return None
    if reason in ("stop", "repetition"):
        return "stop"
    if reason == "length":
        return "length"
    raise EngineError(f"vLLM ended the answer: {reason}")


def _logprobs(
    params: SamplingParams, tokens: Sequence[int], told: Mapping[str, Any] | None
) -> list[Logprobs | None]:
    if params.logprobs is None or told is None:
        return [None] * len(tokens)
    found: list[Logprobs | None] = []
    for token, own, top in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True):
        named = ((int(name.removeprefix(ID_PREFIX)), value) for name, value in top.items())
        found.append(Logprobs(token, own, _best(named, params.logprobs)))
    return found


def _prompt_logprobs(ask: Ask, choice: Mapping[str, Any]) -> tuple[Logprobs, ...]:
    """Of the prompt's tokens but the first, of which there is none."""
    told = choice["prompt_logprobs"][1:]
    found = []
    for token, entry in zip(ask.prompt[1:], told, strict=True):
        values = {int(name): float(one["logprob"]) for name, one in entry.items()}
        best = _best(values.items(), ask.params.prompt_logprobs or 0)
        found.append(Logprobs(token, values[token], best))
    return tuple(found)


def _best(pairs: Iterable[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest; vLLM adds the chosen token where it is none of them."""
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:count])
