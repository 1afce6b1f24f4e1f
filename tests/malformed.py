"""Malformed requests from a seed: good ones to which something was done, in their fields or on the wire."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SHORT = {"max_tokens": 2, "temperature": 0.5}
GOOD: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "stop": ["x"], "logprobs": 1, "seed": 1} | SHORT),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7]], "echo": True, "n": 2, "best_of": 3} | SHORT),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "u"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1.5},
        }
        | SHORT,
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "u"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "stream": True,
            "stream_options": {"include_usage": True},
            "presence_penalty": 1,
            "repetition_penalty": 1.1,
        }
        | SHORT,
    ),
    (
        "POST",
        "/v1/responses",
        {
            "model": "tiny",
            "input": [{"role": "user", "content": "u"}],
            "instructions": "i",
            "max_output_tokens": 2,
            "tools": [FUNCTION | {"type": "function"}],
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
        },
    ),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "dimensions": 8, "encoding_format": "float"}),
    ("POST", "/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "u"}]}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True, "add_special_tokens": False}),
    ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    ("POST", "/admin/adapters", {"name": "x", "path": "y"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}),
    ("DELETE", "/admin/adapters/x", None),
    ("GET", "/v1/models/tiny", None),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 1e-320, "", " ", "a", "tiny",
    "null", "5", "\0", "\x1b[0m", "\ufffe", "\U000f0000", "🙂" * 50, "<|im_end|>", "<tool_call>", "x" * 5000,
    "{{ 7 * 7 }}", "{% for x in y %}", "../../etc/passwd", "\u202e", "e\u0301", [], [[]], [[[]]], [None], ["a", 1],
    [5, "a"], [0] * 200, {}, {"a": {}}, {"type": "text"}, {"type": "function"}, {"$ref": "#"}, {"type": ["string"]},
    {"": ""}, {"__proto__": 1}, {"role": "user", "content": "a"}, [{"role": "user"}], [{}], {"5": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"pattern": "(("}, {"enum": []}, {"minItems": 10**9},
]  # fmt: skip
TYPES = ["application/json"] * 30 + [
    "text/plain",
    "",
    "application/json; charset=latin-1",
    "a/b;;=",
    "multipart/form-data",
]

JSON = ("content-type", "application/json")
BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer GOODKEY\r\ncontent-type: application/json\r\n"
LENGTHS = ["-1", "+5", "0x10", "5, 5", "5, 6", "", " ", "1e3", "9" * 30, "9" * 5000, "99999999999", "\t5"]
ODD_HEADERS = [
    ("host", "["), ("host", ""), ("host", "a/b"), ("host", "evil.example"), ("origin", "http://evil.example"),
    ("origin", "null"), ("x-forwarded-for", "1.2.3.4, x"), ("x-forwarded-proto", "nonsense"), ("forwarded", "for="),
    ("x-request-id", "<script>"), ("x-request-id", "x" * 3000), ("traceparent", "00-zz-zz-01"), ("te", "trailers"),
    ("expect", "100-continue"), ("expect", "the unexpected"), ("upgrade", "websocket"), ("connection", "upgrade"),
    ("connection", "close, keep-alive, x"), ("accept", "\xff"), ("accept-encoding", "br;q=x"), ("range", "bytes=0-1"),
    ("x-api-key", "wrong"), ("cookie", "=;=;="), ("content-encoding", "gzip"), ("if-match", "*"),
]  # fmt: skip
LINES = [
    b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
    b"get /health HTTP/1.1\r\nhost: x\r\n\r\n", b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"CONNECT a:443 HTTP/1.1\r\nhost: x\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET //evil.example/%2e%2e HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n", b"GET /health HTTP/1.1\r\n x\r\n\r\n",
    b"GET /health HTTP/1.1\nhost: x\n\n", b"GET /health HTTP/1.1\r\nhost: x\r\na: b\rc\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n: y\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\xff" * 3000, b"", b"A" * 200_000, b"HTTP/1.1 200 OK\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"sec-websocket-version: 13\r\n\r\n",
]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """kind: what was done to it. raw: what is sent in place of all the rest; cut: and then no more."""

    kind: str
    method: str = "POST"
    path: str = "/v1/completions"
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    raw: bytes | None = None
    cut: bool = False

    def wire(self, key: str) -> bytes:
        """As it is sent; `key` is the good one."""
        if self.raw is not None:
            return self.raw.replace(b"GOODKEY", key.encode())
        lines = {"host": "localhost", "authorization": f"Bearer {key}"} | dict(self.headers)
        lines["content-length"] = str(len(self.content))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + self.content


class Malformed:
    """The same requests for the same seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def request(self) -> Request:
        """One whose headers and body any HTTP client could send."""
        draw, kind = self._draw, "fields"
        method, path, body = copy.deepcopy(draw.choice(GOOD))
        for _ in range(draw.randint(1, 3)):
            body = self._changed(body)
        content = b"" if body is None else json.dumps(body).encode()
        if draw.random() < 0.2:
            content, kind = self._broken(content), "bytes"
        if draw.random() < 0.05:
            method, kind = draw.choice(["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"]), "method"
        if draw.random() < 0.05:
            path, kind = path + draw.choice(["/", "//", "?a=b", "%00", "%ff", "/..", "x" * 300]), "path"
        content_type = draw.choice(TYPES)
        return Request(kind, method, path, content, (("content-type", content_type),) if content_type else ())

    def any(self) -> Request:
        """Like `request`, or one of which the key, the headers, the length or the protocol are wrong."""
        deeds = [self._key, self._head, self._chunked, self._length, self._line, self._nothing]
        return self._draw.choice(deeds)() if self._draw.random() < 0.25 else self.request()

    def _key(self) -> Request:
        wrong = [
            "Bearer",
            "Bearer  ",
            "Bearer x",
            "Basic eDp5",
            "bearer " + "k" * 9000,
            "\xe9\xff",
            "x" * 5000,
        ]
        return Request("key", content=BODY, headers=(JSON, ("authorization", self._draw.choice(wrong))))

    def _head(self) -> Request:
        draw = self._draw
        odd = [
            *((f"x-{number}", "y") for number in range(draw.choice([1, 150]))),
            ("x-long", "z" * draw.choice([10, 40_000, 90_000])),
        ]
        odd += draw.sample(ODD_HEADERS, 2)
        return Request("headers", content=BODY, headers=(JSON, *odd))

    def _chunked(self) -> Request:
        """Chunks that lie about their size, or never end."""
        draw = self._draw
        size = draw.choice(
            [f"{len(BODY):x}", "-1", "zz", "", "0x5", "f" * 40, "3", "fffff", "5;" + "x" * 9000]
        )
        end = draw.choice([b"\r\n0\r\n\r\n", b"\r\n0\r\n", b"", b"\r\n0\r\nx: y\r\n\r\n", b"0\r\n\r\n"])
        more = draw.choice(["", "", "content-length: 5\r\n", "transfer-encoding: chunked\r\n"])
        coding = draw.choice(["chunked", "chunked", "Chunked", "gzip, chunked", "identity", "chunked, x"])
        head = f"{HEAD}transfer-encoding: {coding}\r\n{more}\r\n{size}\r\n"
        return Request("chunks", raw=head.encode() + BODY + end, cut=True)

    def _length(self) -> Request:
        """A body that is shorter or longer than it is said to be."""
        draw = self._draw
        said = draw.choice(LENGTHS + [str(len(BODY) + by) for by in (-20, -1, 1, 500)])
        body = draw.choice([BODY, b"", BODY + BODY, BODY + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
        more = draw.choice(["", "", "content-length: 3\r\n", "expect: 100-continue\r\n"])
        return Request("length", raw=f"{HEAD}content-length: {said}\r\n{more}\r\n".encode() + body, cut=True)

    def _line(self) -> Request:
        """What is no request, or one of another protocol."""
        return Request("protocol", raw=self._draw.choice(LINES), cut=True)

    def _nothing(self) -> Request:
        """A request that breaks off anywhere."""
        whole = f"{HEAD}content-length: {len(BODY)}\r\n\r\n".encode() + BODY
        return Request("broken off", raw=whole[: self._draw.randrange(len(whole))], cut=True)

    def _changed(self, value: Any) -> Any:
        """The value with one thing in it, at any depth, replaced, taken away or added."""
        draw = self._draw
        if isinstance(value, dict) and value and draw.random() < 0.95:
            key = draw.choice(list(value))
            deed = draw.random()
            if deed < 0.12:
                del value[key]
            elif deed < 0.2:
                value[
                    draw.choice(["extra", "", "stream", "n", "echo", "tools", "messages", "prompt", "strict"])
                ] = self._odd()
            else:
                value[key] = self._changed(value[key]) if draw.random() < 0.6 else self._odd()
            return value
        if isinstance(value, list) and value and draw.random() < 0.7:
            place = draw.randrange(len(value))
            value[place] = self._changed(value[place])
            return value
        return self._odd()

    def _odd(self) -> Any:
        return copy.deepcopy(self._draw.choice(ODD))

    def _broken(self, content: bytes) -> bytes:
        draw, raw = self._draw, bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randint(0, len(raw))
            deed = draw.randrange(5)
            if deed == 0:
                del raw[at : at + draw.randint(1, 20)]
            elif deed == 1:
                raw[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
            elif deed == 2:
                raw[at:at] = draw.choice(
                    [b"NaN", b"1e999", b"\\ud800", b"\\u0000", b"9" * 5000, b"[" * 3000, b"//"]
                )
            elif deed == 3:
                raw[at:at] = raw[: draw.randint(0, 40)]
            else:
                raw[:] = raw[at:] + raw[:at]
        return bytes(raw)


def fault(status: int, content_type: str, text: str) -> str | None:
    """What is wrong with an answer to a malformed request; None for a refusal or an answer as they must be."""
    if status >= 500:
        return f"{status}: {text}"
    if content_type.startswith("text/event-stream"):
        whole = text.endswith("\n\n") and '"server_error"' not in text
        return None if whole else f"the stream ends with {text[-500:]!r}"
    if status < 400:
        return None
    try:
        error = json.loads(text)["error"]
        good = (
            set(error) == {"message", "type", "param", "code"}
            and 0 < len(error["message"]) <= 1000
            and len(error["param"] or "") <= 200
        )
    except (ValueError, TypeError, KeyError):
        good = False
    return None if good else f"{status} without an error object: {text[:500]!r}"
