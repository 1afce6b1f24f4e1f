"""OpenAI's completions over openvino-genai's ContinuousBatchingPipeline, greedy: a peer of the benchmark.

    ENVS/openvino/bin/python bench/serve/openvino_server.py EXPORT --port 8010 --threads 2

The package has no server of its own (OpenVINO Model Server is a separate program). One thread steps the
pipeline; a thread for each connection turns ids into text and writes it. EXPORT: what `optimum-cli export
openvino` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from tokenizers import Tokenizer

MODEL = "bench"


@dataclass
class Request:
    """ids [L] of the prompt; pieces: new ids after each step, then None."""

    ids: list[int]
    config: genai.GenerationConfig
    pieces: queue.SimpleQueue[list[int] | None] = field(default_factory=queue.SimpleQueue)
    handle: Any = None
    gone: bool = False


class Engine:
    def __init__(self, folder: Path, *, threads: int, cache_gb: int, most: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = cache_gb, most
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._pipeline = genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._eos = self._pipeline.get_config().stop_token_ids
        self._new: queue.SimpleQueue[Request] = queue.SimpleQueue()
        threading.Thread(target=self._run_or_end, daemon=True).start()

    def submit(self, prompt: str, max_tokens: int, ignore_eos: bool) -> Request:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = max_tokens, False, ignore_eos
        config.stop_token_ids = self._eos
        request = Request(self.tokenizer.encode(prompt).ids, config)
        self._new.put(request)
        return request

    def _run_or_end(self) -> None:
        """Nobody waits for a pipeline that has failed: the process ends with it."""
        try:
            self._run()
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _run(self) -> None:
        running: list[Request] = []
        number = 0
        while True:
            while not running or not self._new.empty():
                request = self._new.get()
                ids = ov.Tensor(np.array([request.ids], dtype=np.int64))
                request.handle = self._pipeline.add_request(number, ids, request.config)
                running.append(request)
                number += 1
            self._pipeline.step()
            running = [request for request in running if self._told(request)]

    def _told(self, request: Request) -> bool:
        """Hand on what is new; True while more is to come."""
        if request.gone:
            request.handle.cancel()
            return False
        while request.handle.can_read():
            for output in request.handle.read().values():
                request.pieces.put(list(output.generated_ids))
        more: bool = request.handle.get_status() == genai.GenerationStatus.RUNNING
        if not more:
            request.pieces.put(None)
        return more


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or body.get("temperature") != 0:
            return self._json(400, {"error": {"message": "only /v1/completions with temperature 0"}})
        request = self.engine.submit(
            body["prompt"], body.get("max_tokens", 16), body.get("ignore_eos", False)
        )
        try:
            return self._stream(request) if body.get("stream") else self._whole(request)
        except OSError:
            request.gone = True

    def _whole(self, request: Request) -> None:
        ids = [one for piece in iter(request.pieces.get, None) for one in piece]
        self._json(200, self._chunk(self.engine.tokenizer.decode(ids), "length") | self._usage(request, ids))

    def _stream(self, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        ids: list[int] = []
        told = ""
        for piece in iter(request.pieces.get, None):
            ids += piece
            text = self.engine.tokenizer.decode(ids)
            if len(text) > len(told) and not text.endswith("\ufffd"):
                self._event(self._chunk(text[len(told) :], None))
                told = text
        self._event(self._chunk(self.engine.tokenizer.decode(ids)[len(told) :], "length"))
        self._event(self._usage(request, ids) | {"choices": []})
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish_reason}
        return {"object": "text_completion", "model": MODEL, "choices": [choice]}

    def _usage(self, request: Request, ids: list[int]) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": len(request.ids), "completion_tokens": len(ids)}}

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # read at birth; of five, most of 32 clients who come at once are turned away


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-gb", type=int, default=1)
    parser.add_argument("--most", type=int, default=32, help="requests computed at the same time")
    given = parser.parse_args()
    Handler.engine = Engine(given.folder, threads=given.threads, cache_gb=given.cache_gb, most=given.most)
    Server(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
