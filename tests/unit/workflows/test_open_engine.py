"""An engine opened from a description."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tunesmith.workflows import open_engine as module
from tunesmith.workflows.engine_wants import EngineWants


def test_the_tokenizer_is_read_for_grammars_once_the_engine_is_ready(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request with a grammar would wait for it."""
    monkeypatch.setattr(module, "PREPARE_AFTER_S", 0.01)
    engine, _ = module.open_engine(EngineWants(path=str(tiny)))
    grammars = engine._generator._grammars
    end = time.monotonic() + 60
    while "_made_tokenizer" not in vars(grammars) and time.monotonic() < end:
        time.sleep(0.02)
    engine.close(grace_s=0)
    assert "_made_tokenizer" in vars(grammars)
