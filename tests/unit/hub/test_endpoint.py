"""Endpoints as users write them, and where tokens go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.hub.endpoint import Endpoint, default_endpoints, parse_endpoint


@pytest.fixture(autouse=True)
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")


@pytest.mark.parametrize(
    ("text", "place", "layout"),
    [
        ("hub", "https://huggingface.co", "hub"),
        ("hf-mirror", "https://hf-mirror.com", "hub"),
        ("https://your.mirror:8443/hub/", "https://your.mirror:8443/hub", "hub"),
        ("modelscope", "https://www.modelscope.cn", "modelscope"),
        ("https://modelscope.cn", "https://modelscope.cn", "modelscope"),
        ("modelscope:http://127.0.0.1:9", "http://127.0.0.1:9", "modelscope"),
    ],
)
def test_parse(text: str, place: str, layout: str) -> None:
    assert parse_endpoint(text) == Endpoint(place, layout)  # type: ignore[arg-type]


def test_folder(tmp_path: Path) -> None:
    assert parse_endpoint(str(tmp_path)) == Endpoint(str(tmp_path), "folder")
    assert parse_endpoint(f"file://{tmp_path}") == Endpoint(str(tmp_path), "folder")


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "nowhere", "http://", "http://x:port", "http://[::1", "modelscope:x"]
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(UserError, match="is no URL"):
        parse_endpoint(text)


def test_default_is_the_environment_or_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_endpoints() == ["https://huggingface.co"]
    monkeypatch.setenv("HF_ENDPOINT", "https://your.mirror")
    assert default_endpoints() == ["https://your.mirror"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub", {"Authorization": "Bearer hf_secret"}),
        ("https://trusted.mirror/", {"Authorization": "Bearer hf_secret"}),
        ("http://trusted.mirror", {}),
        ("http://huggingface.co", {}),
        ("https://huggingface.co.evil", {}),
        ("hf-mirror", {}),
        ("modelscope", {"Cookie": "m_session_id=ms_secret"}),
        ("modelscope:https://evil", {}),
        ("modelscope:https://trusted.mirror", {}),
        ("modelscope:http://www.modelscope.cn", {}),
    ],
)
def test_each_token_goes_to_its_host_alone(
    text: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://trusted.mirror")
    assert parse_endpoint(text).secrets() == expected


def test_token_of_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert parse_endpoint("hub").secrets() == {}
    (tmp_path / "token").write_text("hf_stored\n")
    assert parse_endpoint("hub").secrets() == {"Authorization": "Bearer hf_stored"}
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert parse_endpoint("hub").secrets() == {}


def test_text_for_people_holds_no_password() -> None:
    assert str(parse_endpoint("https://user:pass@your.mirror/x?key=1")) == "https://your.mirror/x"
