"""What gateway and engine say to each other when they are two processes: frames of plain data.

A frame is its body's length (4 bytes, big endian) and the body, a msgpack map with the key "kind". Nothing
in a frame is ever executed: what arrives is numbers, texts, lists and maps.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from operator import attrgetter
from typing import IO, Any

import msgpack

from tunesmith.core.errors import MissingExtra, PlanRefused, TunesmithError, UserError
from tunesmith.model.grammar import GrammarSpec
from tunesmith.model.requests import Logprobs, SamplingParams, TokenEvent
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus

Message = dict[str, Any]
LENGTH = struct.Struct(">I")


# -- frames ------------------------------------------------------------------------------------------


def encode(kind: str, **content: Any) -> bytes:
    """One frame. Token events and log-probabilities may stand anywhere in it; they become lists."""
    body: bytes = msgpack.packb({"kind": kind} | content, default=_listed)
    return LENGTH.pack(len(body)) + body


def read(file: IO[bytes]) -> Message | None:
    """The next frame's content; None at the end of the file, be it in the middle of a frame."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = file.read(length)
    return None if len(body) < length else _decode(body)


def receive(connection: socket.socket) -> Message | None:
    """As `read`, from the socket itself: what comes after the frame stays in it."""
    head = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = connection.recv(length, socket.MSG_WAITALL)
    return None if len(body) < length else _decode(body)


async def read_async(reader: asyncio.StreamReader) -> Message | None:
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return _decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _decode(body: bytes) -> Message:
    message: Message = msgpack.unpackb(body, strict_map_key=False)
    return message


# -- what is in them ---------------------------------------------------------------------------------

_EVENT_FIELDS = [entry.name for entry in fields(TokenEvent)]
_event_values = attrgetter(*_EVENT_FIELDS)
_LOGPROBS, _PROMPT = _EVENT_FIELDS.index("logprobs"), _EVENT_FIELDS.index("prompt_logprobs")


def _listed(value: Any) -> Any:
    """What msgpack does not know by itself."""
    if isinstance(value, TokenEvent):
        return _event_values(value)
    if isinstance(value, Logprobs):
        return value.token_id, value.logprob, value.top
    raise TypeError(f"{type(value).__name__} is not plain data")


def event_from(values: list[Any]) -> TokenEvent:
    if values[_LOGPROBS] is not None:
        values[_LOGPROBS] = _logprobs_from(values[_LOGPROBS])
    if values[_PROMPT] is not None:
        values[_PROMPT] = tuple(map(_logprobs_from, values[_PROMPT]))
    return TokenEvent(*values)


def _logprobs_from(values: Sequence[Any]) -> Logprobs:
    token_id, logprob, top = values
    return Logprobs(token_id, logprob, tuple((token, value) for token, value in top))


def ask_to_plain(ask: Ask) -> Message:
    return {"prompt": list(ask.prompt), "params": params_to_plain(ask.params), "adapter": ask.adapter}


def ask_from(plain: Message) -> Ask:
    return Ask(plain["prompt"], params_from(plain["params"]), plain["adapter"])


_DEFAULTS = asdict(SamplingParams())


def params_to_plain(params: SamplingParams) -> Message:
    """The parameters that are not at their defaults."""
    return {name: value for name, value in asdict(params).items() if value != _DEFAULTS[name]}


def params_from(plain: Message) -> SamplingParams:
    """Raises UserError for values that are not possible, as SamplingParams does."""
    typed = dict(plain)
    if "stop_ids" in plain:
        typed["stop_ids"] = tuple(plain["stop_ids"])
    if "grammar" in plain:
        typed["grammar"] = GrammarSpec(**plain["grammar"])
    return SamplingParams(**typed)


def status_to_plain(status: EngineStatus) -> Message:
    return asdict(status)


def status_from(plain: Message) -> EngineStatus:
    return EngineStatus(**plain | {"adapters": tuple(plain["adapters"])})


# -- errors ------------------------------------------------------------------------------------------

# An error arrives as the first of these that it is; any other one as EngineError.
_KNOWN: tuple[type[Exception], ...] = (
    MissingExtra,
    UserError,
    PlanRefused,
    TunesmithError,
    EngineBusy,
    EngineError,
    ModuleNotFoundError,
    OSError,
)


def error_to_plain(error: BaseException) -> Message:
    known = next((kind for kind in _KNOWN if isinstance(error, kind)), None)
    what = str(error) if known else f"{type(error).__name__}: {error}"
    plain: Message = {"class": (known or EngineError).__name__, "what": what, "hint": None}
    if isinstance(error, TunesmithError):
        plain |= {"what": error.what, "hint": error.hint}
    if isinstance(error, ModuleNotFoundError):
        plain["name"] = error.name
    if isinstance(error, OSError):
        plain["os"] = [error.errno, error.strerror or str(error), _text(error.filename)]
    return plain


def error_from(plain: Mapping[str, Any]) -> Exception:
    """The error that `error_to_plain` described, of the same class where that is one of ours."""
    kind = next((known for known in _KNOWN if known.__name__ == plain["class"]), EngineError)
    if issubclass(kind, TunesmithError):
        # Without the subclass's own __init__, which makes the sentence from other arguments.
        error = kind.__new__(kind)
        TunesmithError.__init__(error, plain["what"], plain["hint"])
        return error
    if kind is ModuleNotFoundError:
        return ModuleNotFoundError(plain["what"], name=plain["name"])
    if kind is OSError:
        return OSError(*plain["os"])
    return kind(plain["what"])


def _text(name: Any) -> str | None:
    return None if name is None else str(name)
