"""What servers publish, read leniently: every shape that the real ones and their mirrors answer with."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.hub.endpoint import Endpoint
from tunesmith.hub.listing import RemoteFile, check_name, check_paths, file_url, published

SHA256, SHA1 = "a" * 64, "b" * 40
HUB = Endpoint("https://huggingface.co", "hub")
MODELSCOPE = Endpoint("https://www.modelscope.cn", "modelscope")


def test_file_urls() -> None:
    name = "数据/a b#1.json"
    quoted = "%E6%95%B0%E6%8D%AE/a%20b%231.json"
    assert file_url(HUB, "model", "o/n", "refs/pr/1", name) == (
        f"https://huggingface.co/o/n/resolve/refs%2Fpr%2F1/{quoted}"
    )
    assert (
        file_url(HUB, "dataset", "o/n", "main", "x") == "https://huggingface.co/datasets/o/n/resolve/main/x"
    )
    assert file_url(MODELSCOPE, "dataset", "o/n", "master", "a b") == (
        "https://www.modelscope.cn/api/v1/datasets/o/n/repo?Revision=master&FilePath=a+b"
    )


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"etag": f'"{SHA1}"', "content-length": "7"}, RemoteFile("x", 7, git_sha1=SHA1, tag=SHA1)),
        (
            {"x-linked-etag": f'"{SHA256}"', "x-linked-size": "9", "etag": "z", "location": "/"},
            RemoteFile("x", 9, sha256=SHA256, tag=SHA256),
        ),
        ({"etag": f'W/"{SHA1}"', "content-length": "7", "content-encoding": "gzip"},
         RemoteFile("x", None, git_sha1=SHA1, tag=SHA1)),
        ({"etag": '"d41d8cd98f00b204"', "content-range": "bytes 5-9/10", "content-length": "5"},
         RemoteFile("x", 10, tag="d41d8cd98f00b204")),
        ({"etag": '"../../x"', "content-length": "no"}, RemoteFile("x")),
        ({}, RemoteFile("x")),
    ],
)  # fmt: skip
def test_what_headers_tell(headers: dict[str, str], expected: RemoteFile) -> None:
    assert published("x", headers) == expected


def test_a_hash_of_the_listing_is_not_overruled() -> None:
    file = RemoteFile("x", None, git_sha1=SHA1).filled(RemoteFile("x", 3, sha256=SHA256))
    assert file == RemoteFile("x", 3, git_sha1=SHA1)


@pytest.mark.parametrize(
    "bad", ["", "/x", "../x", "a/../x", "a/./x", "a//x", "a/", "x\0", "x\n", "n" * 1001, "ok/x"]
)
def test_paths_that_are_refused(bad: str) -> None:
    with pytest.raises(TunesmithError, match="is refused"):
        check_paths(["ok", bad], "server")


def test_paths_that_are_fine() -> None:
    check_paths(["a b", "数据/x", "..x", "a/..b", "-rf", "a/b/c", ".gitattributes", "x\\y"], "server")


@pytest.mark.parametrize("name", ["o/n", "gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d"])
def test_names(name: str) -> None:
    check_name(name, "model")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b/c", "/a", "a/", "o/..n", "o/n?x", "o n", "-a/b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UserError, match="no id of a model"):
        check_name(name, "model")
