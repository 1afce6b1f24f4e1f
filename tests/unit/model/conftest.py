"""The tokenizer that the tests of chat templates share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def smol_tokenizer(smol: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol)


@pytest.fixture
def tokenizer(smol_tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """SmolLM2's; a test may set another template (and must copy it to change anything else)."""
    own = smol_tokenizer.chat_template
    yield smol_tokenizer
    smol_tokenizer.chat_template = own
