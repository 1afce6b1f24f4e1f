"""Events that stay whole, whatever a client takes for the end of a line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.serve.replay import Api
from tunesmith.serve.sse import encode

ODD = "a\u2028b\u2029c\x85d\x0be\x1cf\r\n\U0001f327 g"


def test_an_event_is_one_line_for_every_reader_of_lines() -> None:
    text = encode({"text": ODD, ODD: 1}, name="x").decode()
    assert text.count("\n") == 3 and text.endswith("\n\n")
    name, data = text.strip().splitlines()
    assert name == "event: x"
    assert json.loads(data.removeprefix("data: ")) == {"text": ODD, ODD: 1}
    # What nobody takes for an end stays as short as it is.
    assert encode("Köln 北京") == 'data: "Köln 北京"\n\n'.encode()


def test_a_stream_gives_such_text_as_the_whole_answer_does(smol: Path) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 99}
    here = Api(smol, [ODD, ODD])
    whole = here.post("/v1/completions", body).json()["choices"][0]["text"]
    streamed = here.events("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in streamed) == whole == ODD
