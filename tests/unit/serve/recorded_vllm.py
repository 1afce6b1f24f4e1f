"""NOT vLLM: a small program that answers over HTTP as vLLM 0.32 does, for tests where that does not install.

Options, routes, fields and texts are those of vLLM's source (entrypoints/openai/completion/serving.py,
entrypoints/serve/lora, middleware/authenticate.py). Its "model" counts: the token after t is 3 t + 1 (plus
the length of an adapter's name) modulo 1000. Token 999 as a prompt's first makes it abort the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

VOCAB = 1000
BASE = "base"


def next_token(token: int, model: str) -> int:
    return (3 * token + 1 + (0 if model == BASE else len(model))) % VOCAB


def logprobs_of(token: int, count: int) -> dict[str, float]:
    """The chosen token first, then others, as vLLM orders them."""
    others = {f"token_id:{(token + n) % VOCAB}": -1.0 - n for n in range(1, count + 1)}
    return {f"token_id:{token}": -1.5} | others


class Handler(BaseHTTPRequestHandler):
    adapters: ClassVar[dict[str, str]] = {}
    seen: ClassVar[list[dict[str, Any]]] = []
    given: argparse.Namespace

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, b"")
        elif self.path == "/seen":
            self._send(200, json.dumps(Handler.seen).encode())
        else:
            self._send(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._send(401, json.dumps({"error": "Unauthorized"}).encode())
            return
        routes = {
            "/v1/completions": self._complete,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }
        routes[self.path](body)

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, kind: str, message: str) -> None:
        error = {"message": message, "type": kind, "param": None, "code": status}
        self._send(status, json.dumps({"error": error}).encode())

    def _load(self, body: dict[str, Any]) -> None:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace"):
            self._error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        elif not os.path.isfile(os.path.join(path, "adapter_config.json")):  # noqa: PTH113, PTH118
            self._error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        else:
            self.adapters[name] = path
            self._send(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), "text/plain")

    def _unload(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if self.adapters.pop(name, None) is None:
            self._error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        else:
            self._send(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), "text/plain")

    def _complete(self, body: dict[str, Any]) -> None:
        Handler.seen.append(body)
        if body["model"] != BASE and body["model"] not in self.adapters:
            self._error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        elif len(body["prompt"]) + body["max_tokens"] > self.given.max_model_len:
            self._error(400, "BadRequestError", "This model's maximum context length is exceeded.")
        elif body.get("stream"):
            self._stream(body)
        else:
            self._whole(body)

    def _tokens(self, body: dict[str, Any]) -> Any:
        token = body["prompt"][-1]
        for number in range(body["max_tokens"]):
            token = next_token(token, body["model"])
            stop = token in body["stop_token_ids"]
            last = number == body["max_tokens"] - 1
            yield token, "stop" if stop else "length" if last else None
            if stop:
                return

    def _choice(self, body: dict[str, Any], tokens: list[int], finish: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x" * len(tokens), "logprobs": None}
        choice |= {"finish_reason": finish, "stop_reason": tokens[-1] if finish == "stop" else None}
        choice["token_ids"] = tokens
        if body.get("logprobs") is not None:
            tops = [logprobs_of(token, body["logprobs"]) for token in tokens]
            choice["logprobs"] = {
                "text_offset": list(range(len(tokens))),
                "token_logprobs": [-1.5] * len(tokens),
                "tokens": [f"token_id:{token}" for token in tokens],
                "top_logprobs": tops,
            }
        return choice

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        waiting: list[int] = []
        for token, finish in self._tokens(body):
            waiting.append(token)
            if body["prompt"][0] == 999:
                finish = "abort"
            if finish is None and len(waiting) < 2 and token % 2:  # vLLM may put several into a chunk
                continue
            time.sleep(self.given.delay_s)
            chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
            self._event(json.dumps(chunk | {"choices": [self._choice(body, waiting, finish)]}))
            waiting = []
            if finish == "abort":
                return
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _whole(self, body: dict[str, Any]) -> None:
        pairs = list(self._tokens(body))
        choice = self._choice(body, [token for token, _ in pairs], pairs[-1][1])
        if body.get("prompt_logprobs") is not None:
            count = body["prompt_logprobs"]
            choice["prompt_logprobs"] = [None] + [
                {
                    name.removeprefix("token_id:"): {"logprob": value, "rank": 1, "decoded_token": "x"}
                    for name, value in logprobs_of(token, count).items()
                }
                for token in body["prompt"][1:]
            ]
        answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        self._send(200, json.dumps(answer | {"choices": [choice]}).encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--generation-config", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--delay-s", type=float, default=0.0)
    given, rest = parser.parse_known_args()
    print("options:", rest, flush=True)
    if not os.path.isdir(given.model):  # noqa: PTH112
        sys.exit(f"OSError: {given.model} is not a local folder")
    Handler.given = given
    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
