"""`tunesmith serve --api-key-file`: a key that is on no command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.serve import _key_of
from tunesmith.core.errors import UserError


def test_the_key_is_the_files_one_line(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert _key_of(file) == "s3cret"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_an_empty_file_is_no_open_server(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(UserError, match="--api-key-file"):
        _key_of(file)
    with pytest.raises(UserError, match="No such file"):
        _key_of(tmp_path / "nowhere")
