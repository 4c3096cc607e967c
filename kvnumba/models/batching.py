"""Continuous batching: several requests through one model and one paged cache, a few tokens of each at a time."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvnumba import arguments
from kvnumba.caches.paged import PagedKVCache
from kvnumba.errors import CacheFull
from kvnumba.models.sampling import sample

logger = logging.getLogger("kvnumba")

PREEMPTIONS = ("recompute", "swap")


class Decoder(Protocol):
    """What the batcher asks of a model."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def window_left(self) -> int:
        """The widest `window_left` with which the model attends, -1 if it sees everything."""

    def check_request(self, prompt: Any, max_new_tokens: int, temperature: float) -> tuple[np.ndarray, int]:
        """The prompt as (n,) int64 and the number of new tokens, checked."""

    def next_logits(
        self, cache: PagedKVCache, seq_ids: Sequence[int], token_ids: Sequence[Any]
    ) -> np.ndarray:
        """Append tokens to sequences, and register them: (B, vocab_size) at each one's last.

        Raises CacheFull, with nothing changed, where there are too few free blocks.
        """


@dataclass(eq=False)
class Request:
    """One prompt and what has become of it.

    Attributes
    ----------
    request_id : int
    prompt : (n,) int64
    max_new_tokens : int
    generated : list of int
        New tokens so far.
    num_cached_tokens : int
        Tokens that were found in the cache when the request was admitted last.
    preemptions : int
        How often it has made room for others.
    finished : bool
    """

    request_id: int
    prompt: np.ndarray
    max_new_tokens: int
    temperature: float
    rng: np.random.Generator
    cache_salt: str
    generated: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    preemptions: int = 0
    finished: bool = False
    seq_id: int = -1
    swapped: bool = False
    computed: int = 0  # tokens whose keys and values are in the cache, or swapped out

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.generated)

    def pending(self, count: int | None = None) -> np.ndarray:
        """The next tokens to run through the model, all or `count` of them."""
        tokens = np.concatenate([self.prompt, np.array(self.generated, np.int64)])
        return tokens[self.computed :][:count]


class ContinuousBatcher:
    """Runs requests together, as in Orca (Yu et al., 2022) and vLLM: each step is one ragged forward pass.

    A step first decodes one token of every running request whose prompt is done, then gives what is left of its
    budget to prompts in chunks (Sarathi, Agrawal et al., 2023), running ones before waiting ones. When blocks
    run out, the request that was admitted last makes room and waits in front of the others. Each request gets
    the tokens that it would get alone.

    Parameters
    ----------
    decoder : IncrementalDecoder, or a model of Hugging Face as `kvnumba.integrations.transformers.PackedDecoder`
    cache : PagedKVCache
        Of the decoder's shape, as its `make_cache` makes it. Sequences that others began in it are left alone.
    max_tokens_per_step : int
        Tokens of all requests that run through the model at once.
    preemption : {"recompute", "swap"}
        How a request makes room for others. "recompute" forgets its keys and values, but for blocks that stay cached,
        and computes them again later; "swap" moves them to host memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        *,
        max_tokens_per_step: int = 256,
        preemption: str = "recompute",
    ) -> None:
        if preemption not in PREEMPTIONS:
            raise ValueError(f"preemption: expected one of {', '.join(PREEMPTIONS)}; got {preemption!r}")
        self.decoder = decoder
        self.cache = cache
        self.max_tokens_per_step = arguments.integer("max_tokens_per_step", max_tokens_per_step, minimum=1)
        self.preemption = preemption
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission
        self._numbers = itertools.count()

    def submit(
        self,
        prompt: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        cache_salt: str = "",
    ) -> Request:
        """Line up a prompt, to be continued as `IncrementalDecoder.generate` would.

        Parameters
        ----------
        prompt : sequence of int, or bytes
            At least one token.
        max_new_tokens, temperature, seed
            As in `IncrementalDecoder.generate`.
        cache_salt : str
            As in `PagedKVCache.add_sequence`.

        Raises
        ------
        CacheFull
            The cache could not hold the prompt and all new tokens even if there were no other request.
        ValueError, TypeError
            An argument is not as above.
        """
        tokens, max_new_tokens = self.decoder.check_request(prompt, max_new_tokens, temperature)
        needed = -(-(len(tokens) + max(max_new_tokens - 1, 0)) // self.cache.block_size)
        if needed > self.cache.num_blocks:
            raise CacheFull(f"the request needs {needed} blocks, the cache has {self.cache.num_blocks}")
        request = Request(
            next(self._numbers),
            tokens,
            max_new_tokens,
            temperature,
            np.random.default_rng(seed),
            cache_salt,
            finished=max_new_tokens == 0,
        )
        if not request.finished:
            self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Run one batch through the model; returns the requests that it finished.

        Raises
        ------
        CacheFull
            Sequences that are not the batcher's leave too little room even for one request.
        """
        self._admit()
        if not self.running:
            return []
        while True:
            batch = self._schedule()
            try:
                logits = self.decoder.next_logits(
                    self.cache,
                    [request.seq_id for request, _ in batch],
                    [request.pending(count) for request, count in batch],
                )
                break
            except CacheFull:
                if len(self.running) <= 1:
                    raise
                self._preempt(self.running[-1])
        finished = []
        for (request, count), row in zip(batch, logits, strict=True):
            request.computed += count
            if request.computed == request.length and self._is_last(request, row):
                self.running.remove(request)
                self.cache.finish_sequence(request.seq_id)
                request.finished = True
                finished.append(request)
        return finished

    def run(self) -> None:
        """`step` until every request is finished."""
        while self.waiting or self.running:
            self.step()

    def _schedule(self) -> list[tuple[Request, int]]:
        """Which running requests go on, and by how many tokens; decoding first, so that no prompt delays it."""
        batch = []
        budget = self.max_tokens_per_step
        for request in sorted(self.running, key=lambda request: request.length - request.computed > 1):
            count = min(request.length - request.computed, budget)
            if count:
                batch.append((request, count))
                budget -= count
        return batch

    def _admit(self) -> None:
        """Begin waiting requests as long as there are tokens in the budget and blocks for their prompts."""
        budget = self.max_tokens_per_step - sum(request.length - request.computed for request in self.running)
        while self.waiting and (budget > 0 or not self.running):
            request = self.waiting[0]
            to_come = sum(self._blocks(other.length) - self._blocks(other.computed) for other in self.running)
            # the request may need fewer blocks: how much of its prompt is cached is not known yet
            if self.running and to_come + self._blocks(request.length) > self.cache.num_free_blocks:
                return
            try:
                self._begin(request)
            except CacheFull:
                if self.running:
                    return
                raise
            self.running.append(self.waiting.popleft())
            budget -= request.length - request.computed

    def _begin(self, request: Request) -> None:
        """Give a request a sequence, which begins with what is cached or swapped out of its tokens."""
        if request.swapped:
            self.cache.swap_in(request.seq_id)
            request.swapped = False
            return
        request.seq_id = self.cache.add_sequence(
            request.pending(), cache_salt=request.cache_salt, window_left=self.decoder.window_left
        )
        request.computed = request.num_cached_tokens = self.cache.seq_len(request.seq_id)

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks away. It waits in front of all others to get some again."""
        if self.preemption == "swap":
            self.cache.swap_out(request.seq_id)
            request.swapped = True
        else:
            self.cache.finish_sequence(request.seq_id)
            request.computed = 0
        request.preemptions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)
        logger.debug("request %d makes room: %s", request.request_id, self.preemption)

    def _blocks(self, length: int) -> int:
        return -(-length // self.cache.block_size)

    def _is_last(self, request: Request, logits: np.ndarray) -> bool:
        """Choose a request's next token. Returns whether the request is finished with it."""
        token = sample(logits, request.temperature, request.rng)
        if token in self.decoder.eos_token_ids:
            return True
        request.generated.append(token)
        return len(request.generated) == request.max_new_tokens
