"""The manifest of a bundle: canonical, and nothing in it leads outside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.hub.bundle_manifest import Entry, Item, Manifest, Piece, parse_manifest

HASH = "a" * 64


def manifest() -> Manifest:
    pieces = (Piece("wheels/b.whl.part001", 6, HASH), Piece("wheels/b.whl.part002", 1, "b" * 64))
    files = {
        "wheels/a.whl": Entry("wheels/a.whl", 5, HASH),
        "wheels/b.whl": Entry("wheels/b.whl", 7, HASH, pieces),
    }
    return Manifest((Item("wheels", "python", "wheels", {"python": "3.11"}, tuple(files)),), files, "0.1.0")


def test_reads_back_as_the_same_bytes() -> None:
    text = manifest().text()
    found = parse_manifest(text.encode(), "m")
    assert found == manifest() and found.text() == text
    assert found.sha256 == manifest().sha256 and len(found.sha256) == 64


def test_sums_name_the_manifest_first_and_every_file_on_disk() -> None:
    lines = manifest().sums().splitlines()
    assert lines[0] == f"{manifest().sha256}  manifest.json"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "wheels/a.whl",
        "wheels/b.whl.part001",
        "wheels/b.whl.part002",
    ]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", "a\\b", "a\nb", "a/", "..", "."]
)
@pytest.mark.parametrize("place", ["file", "piece", "root"])
def test_paths_that_lead_outside_are_refused(path: str, place: str) -> None:
    if place == "root" and path == "":
        pytest.skip("an empty root is the top of the bundle")
    value: dict[str, Any] = json.loads(manifest().text())
    if place == "file":
        value["files"][path] = value["files"]["wheels/a.whl"]
    elif place == "piece":
        value["files"]["wheels/b.whl"]["pieces"][0]["path"] = path
    else:
        value["items"][0]["root"] = path
    with pytest.raises(UserError, match="not one inside the bundle"):
        parse_manifest(json.dumps(value).encode(), "m")


def broken(**changes: Any) -> bytes:
    return json.dumps(json.loads(manifest().text()) | changes).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (manifest().text().encode()[:-10], "damaged"),
        (broken(format=2), "reads format 1"),
        (broken(format="x"), "does not exist"),
        (broken(files={"a": {"bytes": -1, "sha256": HASH}}), "is not one"),
        (broken(files={"a": {"bytes": True, "sha256": HASH}}), "is not one"),
        (broken(files={"a": {"bytes": 1, "sha256": "A" * 64}}), "is not one"),
        (broken(files={}), "which has no hash"),
    ],
)
def test_a_broken_manifest_is_a_clear_error(content: bytes, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_manifest(content, "dir/manifest.json")
    assert caught.value.what.startswith("dir/manifest.json: ") and caught.value.hint


def test_pieces_must_add_up() -> None:
    value = json.loads(manifest().text())
    value["files"]["wheels/b.whl"]["pieces"].pop()
    with pytest.raises(UserError, match="do not add up"):
        parse_manifest(json.dumps(value).encode(), "m")
