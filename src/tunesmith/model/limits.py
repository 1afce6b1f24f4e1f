"""What a model can be asked at all, whoever computes the answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import UserError


def check_adapter(name: str | None, loaded: Collection[str]) -> None:
    """Raise UserError, naming those that are there, for an adapter that is not; None is the base."""
    if name is not None and name not in loaded:
        raise UserError(f"no adapter '{name}' is loaded", hint=f"loaded: {', '.join(loaded) or 'none'}")


@dataclass(frozen=True, slots=True)
class Limits:
    """max_length: most tokens of a prompt and its answer together; vocab_size: ids are below it.

    cache_tokens: what the cache holds of one request at the most; 0: unknown.
    """

    max_length: int
    vocab_size: int
    cache_tokens: int = 0

    def check(self, prompt: Sequence[int], *, max_new_tokens: int = 0, biased: Collection[int] = ()) -> None:
        """Raise UserError for a prompt that cannot be continued; biased: token ids that a bias names."""
        if not prompt:
            raise UserError("the prompt has no tokens", hint="give at least one")
        if len(prompt) > self.max_length:
            raise UserError(f"the prompt has {len(prompt)} tokens, the context {self.max_length}")
        self._check_tokens("the prompt", prompt)
        self._check_tokens("logit_bias", biased)
        # The last new token is not put into the cache: nothing follows it.
        most = max(len(prompt), min(len(prompt) + max_new_tokens, self.max_length) - 1)
        if 0 < self.cache_tokens < most:
            raise UserError(
                f"prompt and answer may reach {most} tokens, the cache has room for {self.cache_tokens}",
                hint="ask for fewer new tokens, or give the server a larger cache",
            )

    def _check_tokens(self, what: str, tokens: Collection[int]) -> None:
        if not tokens or (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            return
        bad = next(token for token in tokens if not 0 <= token < self.vocab_size)
        raise UserError(f"{what}: token {bad} is not in the vocabulary of {self.vocab_size} tokens")
