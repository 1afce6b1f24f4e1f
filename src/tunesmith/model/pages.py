"""The pages of a key/value cache: who uses which, and which tokens' keys and values a full one holds.

A page has room for `PAGE` tokens of one sequence. Several sequences that begin alike use the same full pages.
A page that nobody uses any more keeps what it holds until its room is needed, oldest first, so that a later
sequence with the same beginning need not be computed again. Nothing here knows of tensors.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

PAGE = 16
# No page of a pool: its memory stays zero, and tables are filled up with it.
EMPTY_PAGE = 0
KEY_BYTES = 16


def pages_for(num_tokens: int) -> int:
    """How many pages hold `num_tokens`."""
    return -(-num_tokens // PAGE)


class PagePool:
    """Pages 1 to `num_pages`: each is free, used by one or more sequences, or idle (unused, remembered)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # What was used last is used again first, so that memory never touched stays untouched.
        self._free: list[int] = []
        self._first_untouched = 1
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Keys of a pool cannot be foreseen: nobody can make two prompts that pass for each other.
        self._secret = os.urandom(KEY_BYTES)

    @property
    def num_available(self) -> int:
        """Pages that `take` can still give."""
        untouched = self.num_pages + 1 - self._first_untouched
        return len(self._free) + untouched + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def key(self, before: bytes, tokens: Sequence[int]) -> bytes:
        """What a full page of `tokens` is found by; `before`: the key of the page before it.

        The first page's `before` says what else its contents depend on (the adapter).
        """
        digest = blake2b(before, digest_size=KEY_BYTES, key=self._secret)
        digest.update(array("q", tokens).tobytes())
        return digest.digest()

    def take(self) -> int | None:
        """A page for one new user, its old contents forgotten; None when all are in use."""
        if self._free:
            page = self._free.pop()
        elif self._first_untouched <= self.num_pages:
            page = self._first_untouched
            self._first_untouched += 1
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._users[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page published under `key`, with one more user; None when no page has these tokens."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] += 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Say that a used page is full and what it holds. A page of the same tokens that is known stays."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """One user less for each of a sequence's pages. forget: what they hold must not be found again."""
        # The last page first: a beginning is worth more than what follows it, and useless without it nothing.
        for page in reversed(pages):
            if forget:
                self._forget(page)
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
