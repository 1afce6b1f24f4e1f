"""Who takes part in the next forward pass, with how many tokens, and in which cache pages.

Requests run in the order in which they came. Those that produce tokens go first, one token each; prompts
share a budget of tokens, so that a long one delays the others by a chunk and no longer. When no page is
left, the newest running request gives up its own and goes back to the front of the line: it is computed
again later, from its prompt and what it has produced. Nothing here knows of tensors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tunesmith.model.pages import PAGE, PagePool, pages_for


@dataclass(eq=False, slots=True)
class Request:
    """A sequence that grows. `tokens` are its prompt and what it has produced.

    The keys and values of its first `computed` tokens are in `pages`. root: what its pages' contents depend
    on besides tokens (the adapter). keys: of its first full pages, as far as they were needed. times: how
    often it began to run. num_cached: tokens of its prompt that it found in the cache.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    root: bytes = b""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    times: int = 0
    num_cached: int = 0

    @property
    def num_left(self) -> int:
        """Tokens to compute until the next one can be chosen; 0 only after a pass that ends with the last."""
        return len(self.tokens) - self.computed

    @property
    def num_produced(self) -> int:
        return len(self.tokens) - self.num_prompt

    def num_reusable(self) -> int:
        """Most tokens that may come from cached pages. The last is always computed: it gives the logits."""
        return len(self.tokens) - 1


R = TypeVar("R", bound=Request)


class Scheduler(Generic[R]):
    """A line of waiting requests, those running, and the pages they use.

    max_concurrent: most requests running. prefill_tokens: most prompt tokens of a pass. Counters:
    prompt_tokens of requests that began to run, cached_tokens of these that a page had already, preempted.
    """

    def __init__(self, pool: PagePool, *, max_concurrent: int, prefill_tokens: int) -> None:
        self.pool = pool
        self.max_concurrent = max_concurrent
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[R] = deque()
        # In the order of their ids: whoever is preempted is the newest, and comes back before any newer.
        self.running: list[R] = []
        self.prompt_tokens = self.cached_tokens = self.preempted = 0
        # Who was last refused, and the spare pages then: asking for the same again is in vain.
        self._refused: tuple[R | None, int] = (None, 0)

    def add(self, request: R) -> None:
        """Put a request in line; all the tokens that it will ever put into the cache fit the pool."""
        self.waiting.append(request)

    def remove(self, request: R, *, forget: bool = False) -> None:
        """Take a request out; its full pages stay to be found, unless it is said to `forget` them."""
        if request not in self.running:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self._give_up(request, forget=forget)

    def plan(self) -> list[tuple[R, int]]:
        """The requests of the next pass and how many tokens each brings, those of one token first.

        Their pages have room for these tokens. Empty only when there is no work.
        """
        self._admit()
        while self.running:
            self._make_room_for_one_each()
            chunks = [(request, 1) for request in self.running if request.num_left == 1]
            chunks += self._prompt_chunks()
            if chunks:
                return sorted(chunks, key=lambda chunk: chunk[1] > 1)
            # Prompts have taken all pages and none can go on.
            self._preempt()
        return []

    def advance(self, chunks: list[tuple[R, int]]) -> None:
        """Count the tokens of a pass as computed, and publish the pages that it filled."""
        for request, count in chunks:
            first = request.computed // PAGE
            request.computed += count
            for index in range(first, request.computed // PAGE):
                self.pool.publish(request.pages[index], self._key(request, index))

    def _make_room_for_one_each(self) -> None:
        """Pages for a token of every request that brings just one; the oldest get theirs first."""
        at = 0
        while at < len(self.running):
            request = self.running[at]
            if request.num_left == 1 and not self._hold(request, len(request.tokens)):
                self._preempt()  # perhaps this very request
            else:
                at += 1

    def _admit(self) -> None:
        """Let requests begin while there are pages for their tokens, and one more for each that runs."""
        while self.waiting and len(self.running) < self.max_concurrent:
            request, spare = self.waiting[0], self._num_spare()
            if self.running and self._refused[0] is request and spare <= self._refused[1]:
                return
            self._reuse(request)
            if self.running and self._num_missing(request) > self._num_spare():
                self._give_up(request)
                self._refused = (request, spare)
                return
            self.waiting.popleft()
            self.running.append(request)
            request.times += 1
            if request.times == 1:
                self.prompt_tokens += request.num_prompt
                self._count_cached(request, request.computed)

    def _count_cached(self, request: R, num_tokens: int) -> None:
        request.num_cached += num_tokens
        self.cached_tokens += num_tokens

    def _num_spare(self) -> int:
        """Pages that are left when all prompts that run have theirs, and each request one more."""
        promised = sum(self._num_missing(request) for request in self.running)
        return self.pool.num_available - promised - len(self.running)

    def _prompt_chunks(self) -> list[tuple[R, int]]:
        chunks: list[tuple[R, int]] = []
        budget = self.prefill_tokens
        coming: set[bytes] = set()
        for request in self.running:
            if budget == 0:
                break
            if request.num_left == 1:
                continue
            before = request.computed
            self._reuse(request)
            if request.times == 1:
                self._count_cached(request, request.computed - before)
            count = min(request.num_left, budget, self._room(request))
            if count == 0 or self._is_coming(request, coming):
                continue
            self._hold(request, request.computed + count)
            chunks.append((request, count))
            budget -= count
            filled = range(request.computed // PAGE, (request.computed + count) // PAGE)
            coming.update(self._key(request, index) for index in filled)
        return chunks

    def _is_coming(self, request: R, coming: set[bytes]) -> bool:
        """True when this pass computes the request's next page for another: waiting a pass saves the page."""
        index = len(request.pages)
        if not coming or request.computed != index * PAGE or request.num_reusable() < (index + 1) * PAGE:
            return False
        return self._key(request, index) in coming

    def _reuse(self, request: R) -> None:
        """Take the pages that follow from the cache, as far as it has them."""
        while request.computed == len(request.pages) * PAGE:
            if request.computed + PAGE > request.num_reusable():
                return
            page = self.pool.find(self._key(request, len(request.pages)))
            if page is None:
                return
            request.pages.append(page)
            request.computed += PAGE

    def _key(self, request: R, index: int) -> bytes:
        """The key of the request's page `index`, which its tokens fill."""
        for at in range(len(request.keys), index + 1):
            before = request.keys[at - 1] if at else request.root
            request.keys.append(self.pool.key(before, request.tokens[at * PAGE : (at + 1) * PAGE]))
        return request.keys[index]

    def _num_missing(self, request: R) -> int:
        return max(0, pages_for(len(request.tokens)) - len(request.pages))

    def _room(self, request: R) -> int:
        """Tokens that could be computed next with the pages that are left."""
        return (len(request.pages) + self.pool.num_available) * PAGE - request.computed

    def _hold(self, request: R, num_tokens: int) -> bool:
        """Take pages until `num_tokens` fit; False, and nothing taken, when there are too few."""
        missing = pages_for(num_tokens) - len(request.pages)
        if missing > self.pool.num_available:
            return False
        for _ in range(missing):
            page = self.pool.take()
            assert page is not None
            request.pages.append(page)
        return True

    def _preempt(self) -> None:
        request = self.running.pop()
        self._give_up(request)
        self.waiting.appendleft(request)
        self.preempted += 1

    def _give_up(self, request: R, *, forget: bool = False) -> None:
        self.pool.release(request.pages, forget=forget)
        request.pages.clear()
        request.computed = 0
