"""OpenAI's Responses API: answers as a list of items (messages and function calls), whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from tunesmith.serve import sse
from tunesmith.serve.errors import ApiError
from tunesmith.serve.jobs import Job, ServedModel, chat_job
from tunesmith.serve.responses_input import PARAMS, ResponsesRequest, as_chat
from tunesmith.serve.shapes import Json, chat_logprobs
from tunesmith.serve.text import Piece
from tunesmith.serve.tool_calls import CallDelta


def response_job(body: ResponsesRequest, model: ServedModel) -> Job:
    """Raises ApiError for what cannot be done as asked."""
    try:
        return chat_job(as_chat(body), model)
    except ApiError as error:
        error.param = PARAMS.get(error.param or "", error.param)
        raise


class ResponseShape:
    """Builds one response; whole or streamed, it is put together by the same steps."""

    def __init__(self, body: ResponsesRequest, model: ServedModel) -> None:
        self._model, self._logprobs = model, body.logprobs
        self._response = _empty_response(body, model)
        self._items: list[Json] = self._response["output"]
        self._open: Json | None = None
        self._finish: str | None = None
        self._events: list[bytes] = []
        self._sequence = 0

    # -- as answering asks for it --------------------------------------------------------------------

    def whole(self, pieces: Sequence[Piece], job: Job) -> Json:
        self.feed(0, pieces[0])
        self._complete(job)
        return self._response

    def begin(self) -> bytes:
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind, response=self._response)
        return self._taken()

    def feed(self, index: int, piece: Piece) -> bytes:
        if piece.text or piece.tokens:
            self._add_text(piece)
        for call in piece.calls:
            self._add_call(call)
        if piece.finish_reason is not None:
            self._finish = piece.finish_reason
            if not self._items:
                self._open_message()
            self._close("incomplete" if self._finish == "length" else "completed")
        return self._taken()

    def end(self, job: Job) -> bytes:
        self._complete(job)
        self._tell(f"response.{self._response['status']}", response=self._response)
        return self._taken()

    def fail(self, error: ApiError) -> bytes:
        self._response |= {
            "status": "failed",
            "error": {"code": "server_error", "message": error.message},
        }
        self._tell("response.failed", response=self._response)
        return self._taken()

    # -- items ---------------------------------------------------------------------------------------

    def _add_text(self, piece: Piece) -> None:
        if self._open is None or self._open["type"] != "message":
            self._open_message()
        assert self._open is not None
        part = self._open["content"][0]
        logprobs = chat_logprobs(piece.tokens, self._model.detokenizer) if self._logprobs else []
        part["text"] += piece.text
        part["logprobs"] += logprobs
        self._tell_item("response.output_text.delta", content_index=0, delta=piece.text, logprobs=logprobs)

    def _open_message(self) -> None:
        self._open_item("msg", type="message", role="assistant", content=[])
        assert self._open is not None
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._tell_item("response.content_part.added", content_index=0, part=part)
        self._open["content"].append(part)

    def _add_call(self, call: CallDelta) -> None:
        if call.name is not None:
            self._open_item("fc", type="function_call", call_id=call.id, name=call.name, arguments="")
        assert self._open is not None
        if call.arguments:
            self._open["arguments"] += call.arguments
            self._tell_item("response.function_call_arguments.delta", delta=call.arguments)

    def _open_item(self, prefix: str, **fields: Any) -> None:
        self._close("completed")
        self._open = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress"} | fields
        self._items.append(self._open)
        self._tell("response.output_item.added", output_index=len(self._items) - 1, item=self._open)

    def _close(self, status: str) -> None:
        if self._open is None:
            return
        if self._open["type"] == "message":
            part = self._open["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            self._tell_item("response.output_text.done", content_index=0, **done)
            self._tell_item("response.content_part.done", content_index=0, part=part)
        else:
            done = {"name": self._open["name"], "arguments": self._open["arguments"]}
            self._tell_item("response.function_call_arguments.done", **done)
        self._open["status"] = status
        self._tell("response.output_item.done", output_index=len(self._items) - 1, item=self._open)
        self._open = None

    def _complete(self, job: Job) -> None:
        usage = job.usage()
        self._response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if self._finish == "length":
            self._response["status"] = "incomplete"
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._response["status"] = "completed"
            self._response["completed_at"] = int(time.time())

    # -- events --------------------------------------------------------------------------------------

    def _tell_item(self, kind: str, **fields: Any) -> None:
        assert self._open is not None
        self._tell(kind, output_index=len(self._items) - 1, item_id=self._open["id"], **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        self._events.append(sse.encode(event, name=kind))

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)


def _empty_response(body: ResponsesRequest, model: ServedModel) -> Json:
    """The response before its first token, with every setting that it is computed with."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | given.get("text", {}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{"parameters": None, "strict": None} | tool for tool in given.get("tools", [])],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
