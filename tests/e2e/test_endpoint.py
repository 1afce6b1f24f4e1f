"""The endpoint that a workflow starts for itself: it asks for a key, ends with its block, and fails loudly."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tunesmith.core.errors import TunesmithError
from tunesmith.workflows.endpoint import ask, same_tokens, serving

ROW = {
    "messages": [
        {"role": "system", "content": "Extract the order as JSON."},
        {"role": "user", "content": "Two <|im_end|> lamps, please."},
        {"role": "assistant", "content": '{"quantity":2}'},
    ]
}


def test_it_answers_with_its_key_only_and_ends_with_its_block(tiny: Path, tmp_path: Path) -> None:
    with serving(str(tiny), log=tmp_path / "serve.log") as endpoint:
        assert httpx.get(f"{endpoint.url}/v1/models").status_code == 401
        answer = ask(endpoint, [ROW], max_tokens=4)[0]
        assert same_tokens(endpoint, tiny, [ROW])
    assert (answer.question, answer.expected) == ("Two <|im_end|> lamps, please.", '{"quantity":2}')
    assert not answer.correct
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint.url}/health")
    assert endpoint.api_key not in (tmp_path / "serve.log").read_text(encoding="utf-8")


def test_other_tokens_are_noticed(tiny: Path, tmp_path: Path) -> None:
    """A tokenizer folder whose template differs from the served one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "Dear model: " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "other")
    with serving(str(tiny), log=tmp_path / "serve.log") as endpoint:
        assert not same_tokens(endpoint, tmp_path / "other", [ROW])


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    wanted = pytest.raises(TunesmithError, match=r"did not start[\s\S]*no-such-model")
    with wanted as caught, serving("no-such-model", log=tmp_path / "serve.log"):
        pass
    assert str(tmp_path / "serve.log") in str(caught.value.hint)
