from __future__ import annotations

import pytest

from tunesmith.core.errors import UserError
from tunesmith.model.limits import Limits

LIMITS = Limits(max_length=10, vocab_size=100, cache_tokens=8)


def test_what_fits_passes_to_the_last_token() -> None:
    LIMITS.check([0, 99], max_new_tokens=7, biased={99: 1.0})
    LIMITS.check([5] * 8, max_new_tokens=1)
    # An answer ends where the context does: what is asked for beyond that needs no room.
    Limits(max_length=9, vocab_size=100, cache_tokens=8).check([5], max_new_tokens=1000)
    Limits(max_length=10, vocab_size=100).check([5] * 10, max_new_tokens=1000)


@pytest.mark.parametrize(
    ("prompt", "asked", "words"),
    [
        ([], {}, "no tokens"),
        ([5] * 11, {}, "11 tokens, the context 10"),
        ([5, 100, 101], {}, "the prompt: token 100 is not"),
        ([-1], {}, "the prompt: token -1 is not"),
        ([5], {"biased": [3, 100]}, "logit_bias: token 100"),
        ([5, 5], {"max_new_tokens": 8}, "may reach 9 tokens, the cache has room for 8"),
        ([5] * 9, {}, "may reach 9 tokens"),
    ],
)
def test_what_cannot_be_done_is_named(prompt: list[int], asked: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LIMITS.check(prompt, **asked)  # type: ignore[arg-type]
