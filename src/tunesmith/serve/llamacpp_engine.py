"""llama.cpp's server behind the Engine protocol: a GGUF file, token ids in and out.

Its requests and answers: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient, NetError
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.requests import Logprobs, SamplingParams, TokenEvent
from tunesmith.serve.driver import Command, finish_of
from tunesmith.serve.engine import Ask, EngineError
from tunesmith.serve.text import Detokenizer

# Our order of sampling: the temperature changes the probabilities that top_k and top_p then look at.
SAMPLERS = ["penalties", "temperature", "top_k", "top_p"]
RANDOM_SEED = 2**32 - 1  # llama.cpp's word for "draw one"
JSON_OPTIONS = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
LLGUIDANCE = "%llguidance {}\n"
# Bytes that are no character by themselves, those first that no UTF-8 text has; not every vocabulary has all.
NO_CHARACTERS = (*range(0xFF, 0xF4, -1), 0xC0, 0xC1, *range(0x80, 0xC0))
# A token's log-probability is looked for among so many of the likeliest, then among all.
FIRST_LOOK = 100


@dataclass
class LlamaCppDriver:
    """`program` (llama-server, or what takes its options) on the GGUF file `model`.

    max_length: tokens of a prompt and its answer; slots: answers computed at once. loras: name and GGUF file
    of the adapters, all loaded at the start.
    """

    program: Sequence[str]
    model: Path
    detokenizer: Detokenizer
    max_length: int
    slots: int = 8
    threads: int | None = None
    gpu_layers: int | None = None
    loras: Mapping[str, Path] = field(default_factory=dict)
    name: str = "llama-server"
    health: str = "/health"
    _knows_llguidance: bool = False

    def command(self, port: int, key: str) -> Command:
        args = [*self.program, "--model", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        args += ["--ctx-size", str(self.max_length * self.slots), "--parallel", str(self.slots)]
        if self.threads is not None:
            args += ["--threads", str(self.threads), "--threads-batch", str(self.threads)]
        if self.gpu_layers is not None:
            args += ["--n-gpu-layers", str(self.gpu_layers)]
        for path in self.loras.values():
            args += ["--lora", str(path)]
        if self.loras:
            args.append("--lora-init-without-apply")
        return Command(args, {"LLAMA_API_KEY": key})

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.loras)

    async def load_adapter(self, client: EventClient, name: str, folder: Path) -> None:
        raise UserError(
            f"llama-server cannot load '{name}' while it runs: it takes its adapters at the start",
            hint="start it with this adapter, or use the local engine or vLLM",
        )

    async def unload_adapter(self, client: EventClient, name: str) -> None:
        raise UserError(
            f"llama-server cannot unload '{name}' while it runs", hint="start it again without this adapter"
        )

    async def prepare(self, client: EventClient) -> None:
        """Find out whether this build has llguidance, which regular expressions and Lark need."""
        body = {"prompt": "a", "n_predict": 1, "grammar": f"{LLGUIDANCE}start: /a/"}
        try:
            await client.post("/completion", body)
            self._knows_llguidance = True
        except NetError as error:
            if error.status is None:
                raise
            self._knows_llguidance = False

    def check(self, ask: Ask) -> None:
        params = ask.params
        if params.prompt_logprobs is not None:
            raise UserError(
                "llama-server gives no log-probabilities of the prompt", hint="use the local engine or vLLM"
            )
        if params.presence_penalty or params.frequency_penalty:
            raise UserError(
                "presence_penalty and frequency_penalty: llama-server counts the prompt's tokens too, which "
                "is not what they mean here",
                hint="leave them at 0, or use the local engine",
            )
        if params.grammar and params.grammar.kind in ("regex", "lark") and not self._knows_llguidance:
            raise UserError(
                f"a {params.grammar.kind} grammar: this llama-server was built without llguidance",
                hint="build it with -DLLAMA_LLGUIDANCE=ON, or ask for a JSON schema",
            )

    # -- one answer ------------------------------------------------------------------------------------

    async def answer(self, client: EventClient, ask: Ask) -> AsyncGenerator[TokenEvent, None]:
        body = self._body(ask)
        given: list[int] = []
        async for data in client.events("/completion", body):
            chunk = _checked(data)
            missing = int(chunk["tokens_predicted"]) - len(given) - len(chunk["tokens"])
            held = await self._held_back(client, [*ask.prompt, *given], chunk, missing, body)
            for token_id in (*held, *chunk["tokens"]):
                logprobs = await self._logprobs(client, ask, given, token_id, chunk)
                given.append(token_id)
                finish = finish_of(ask, token_id, len(given))
                yield TokenEvent(0, token_id, finish, logprobs)
                if finish is not None:
                    return
            if chunk["stop"]:
                yield TokenEvent(0, None, "length" if chunk["stop_type"] == "limit" else "stop")
                return

    def _body(self, ask: Ask) -> dict[str, Any]:
        params = ask.params
        body: dict[str, Any] = {
            "prompt": list(ask.prompt),
            "n_predict": params.max_new_tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "samplers": SAMPLERS,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": 0.0,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": self.max_length,
            "seed": RANDOM_SEED if params.seed is None else params.seed % RANDOM_SEED,
            "ignore_eos": not params.stop_ids,
            "logit_bias": [[token, bias] for token, bias in params.logit_bias.items()],
            "lora": [{"id": i, "scale": float(n == ask.adapter)} for i, n in enumerate(self.loras)],
        }
        if params.logprobs is not None:
            body["n_probs"] = max(1, params.logprobs)
        return body | _grammar(params.grammar, llguidance=self._knows_llguidance)

    async def _held_back(
        self,
        client: EventClient,
        before: list[int],
        chunk: dict[str, Any],
        missing: int,
        body: dict[str, Any],
    ) -> list[int]:
        """The tokens that a chunk counts but does not name.

        While the text ends within a character, llama-server sends nothing; what it sends then names the
        last token alone. Those before it are found by the chunk's text; where the answer ends within a
        character, or greedy decoding wrote bytes that are none, by asking again. Of drawn bytes that are
        none, which token it was is lost: one that shows the same stands for it.
        """
        if missing <= 0:
            return []
        again = body | {"prompt": before, "stream": False, "n_predict": missing}
        if not chunk["tokens"]:
            return [int(token) for token in (await client.post("/completion", again))["tokens"][:missing]]
        last = int(chunk["tokens"][-1])
        text = {"content": chunk["content"], "add_special": False, "parse_special": False}
        usual = [int(token) for token in (await client.post("/tokenize", text))["tokens"]]
        if len(usual) == missing + 1 and usual[-1] == last:
            return usual[:-1]
        split = await asyncio.to_thread(self._split, chunk["content"].encode(), missing, last)
        if split is not None:
            return split
        # The bytes are no characters, so the text shows replacements for them.
        if body["temperature"] == 0:
            repeated = (await client.post("/completion", again | {"n_predict": missing + 1}))["tokens"]
            return [int(token) for token in repeated[:missing]]
        return [self._no_character] * missing

    def _split(self, text: bytes, count: int, last: int) -> list[int] | None:
        """`count` tokens whose bytes, with those of `last` after them, are `text`."""
        end = self._bytes(last)
        return _parts(text.removesuffix(end), count, self._by_bytes) if text.endswith(end) else None

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        size = len(self.detokenizer.tokenizer)
        return {self._bytes(number): number for number in reversed(range(size))}

    @cached_property
    def _no_character(self) -> int:
        """A token that shows as a replacement character."""
        known = (self._by_bytes.get(bytes([number])) for number in NO_CHARACTERS)
        return next((token for token in known if token is not None), 0)

    def _bytes(self, token_id: int) -> bytes:
        """A token's bytes, also of SentencePiece's byte tokens, which are written <0xNN>."""
        name = self.detokenizer.tokenizer.convert_ids_to_tokens(token_id) or ""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return bytes(self.detokenizer.piece(token_id)[1])

    async def _logprobs(
        self, client: EventClient, ask: Ask, given: list[int], token_id: int, chunk: dict[str, Any]
    ) -> Logprobs | None:
        if ask.params.logprobs is None:
            return None
        entry = next((e for e in chunk.get("completion_probabilities", []) if e["id"] == token_id), None)
        if entry is not None:
            return _plain(entry, ask.params.logprobs)
        return await self._looked_up(client, [*ask.prompt, *given], token_id, ask)

    async def _looked_up(self, client: EventClient, before: list[int], token_id: int, ask: Ask) -> Logprobs:
        """Of a token within a character, for which llama-server gives none: by the likeliest after `before`.

        A letter is forced there, because nothing is told of an answer that ends within a character.
        """
        letter = int((await client.post("/tokenize", {"content": "a", "add_special": False}))["tokens"][0])
        body = self._body(Ask(before, SamplingParams(max_new_tokens=1), ask.adapter))
        body |= {"stream": False, "logit_bias": [[letter, 1e4]]}
        for number in (FIRST_LOOK, len(self.detokenizer.tokenizer)):
            answer = await client.post("/completion", body | {"n_probs": number})
            top = answer["completion_probabilities"][0]["top_logprobs"]
            entry = next((one for one in top if one["id"] == token_id), None)
            if entry is not None:
                return _plain(entry | {"top_logprobs": top}, ask.params.logprobs or 0)
        raise EngineError(f"llama-server gives no log-probability of token {token_id}")


def _checked(data: str) -> dict[str, Any]:
    """A chunk of an answer. Raises EngineError where it is an error."""
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise EngineError(str(chunk["error"].get("message", chunk["error"])))
    return chunk


def _grammar(spec: GrammarSpec | None, *, llguidance: bool) -> dict[str, Any]:
    """The request's fields for a grammar; JSON by llguidance where the build has it, without white space.

    Models write white space without end where they may, and the libraries in llama.cpp bound it differently.
    """
    if spec is None:
        return {}
    if spec.kind == "choice":
        return {"grammar": _choice(json.loads(spec.text))}
    if spec.kind == "lark":
        return {"grammar": LLGUIDANCE + spec.text}
    if spec.kind == "regex":
        return {"grammar": f"{LLGUIDANCE}start: /{_slashed(spec.text)}/"}
    schema = {"type": "object"} if spec.kind == "json_object" else json.loads(spec.text)
    if not llguidance or not isinstance(schema, dict):
        return {"json_schema": schema}
    return {"grammar": f"{LLGUIDANCE}start: %json {json.dumps(schema | {'x-guidance': JSON_OPTIONS})}"}


def _choice(choices: Sequence[str]) -> str:
    """A grammar in llama.cpp's form (GBNF) whose language is `choices`."""
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _slashed(pattern: str) -> str:
    """A regular expression between slashes: those in it escaped, unless they are already."""
    parts = pattern.split("\\\\")  # an escaped backslash escapes nothing
    return "\\\\".join(part.replace("\\/", "/").replace("/", "\\/") for part in parts)


def _plain(entry: Mapping[str, Any], num_top: int) -> Logprobs:
    top = tuple((int(one["id"]), float(one["logprob"])) for one in entry["top_logprobs"][:num_top])
    return Logprobs(int(entry["id"]), float(entry["logprob"]), top)


def _parts(text: bytes, count: int, by_bytes: Mapping[bytes, int]) -> list[int] | None:
    """`count` tokens whose bytes are `text`, the longest first; None where there are none such."""
    if count == 0:
        return [] if not text else None
    for size in range(len(text), 0, -1):
        token = by_bytes.get(text[:size])
        rest = _parts(text[size:], count - 1, by_bytes) if token is not None else None
        if token is not None and rest is not None:
            return [token, *rest]
    return None
