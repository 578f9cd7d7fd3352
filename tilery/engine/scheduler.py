"""Who computes how many tokens in the next step.

There are no phases. Each running request has `num_computed` tokens that catch up with `num_tokens` (plus drafts), and a
step hands out the token budget by four rules:

1. Every running request gets at least one token per step, so a long prompt never stalls the others. Requests that
   decode are served before those that prefill; a prefill takes what is left, in chunks.
2. One order decides everything else: priority, raised by one level per `aging_seconds` of waiting, then arrival. Since
   all requests age alike, `priority + arrival / aging_seconds` orders them the same at any time and is computed once.
3. When no block is free, the asker drops its drafts; if that is not enough, the last running request in that order
   loses its blocks and goes back to the queue, to be recomputed (a cached prefix may survive). The first is never
   preempted, so there is always progress.
4. Waiting requests are admitted in that order while there is room for all their tokens; the first that does not fit
   ends admission, so that nothing small overtakes it for ever.

The driver's loop is: `schedule`, run the model, `advance` each item, `finish` what has ended. Nothing is added, aborted
or preempted between `schedule` and the last `advance` of that step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from tilery.engine.config import EngineConfig
from tilery.engine.kv_cache import KVCache
from tilery.engine.messages import ErrorKind, FinishReason
from tilery.engine.request import Request, RequestState

_by_order = attrgetter("order")
_is_prefilling = attrgetter("is_prefilling")


class RequestRefused(Exception):
    """The request was not accepted; `kind` says whose fault that is, `message` what to do."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class ScheduledItem(msgspec.Struct, frozen=True, eq=False):
    """Compute positions [start, start + length) of a request; the last `num_drafts` of them are drafts to verify."""

    request: Request
    start: int
    length: int
    num_drafts: int
    yields_token: bool
    """The chunk reaches the newest token, so that its logits choose the next one."""


class Schedule(msgspec.Struct, frozen=True, eq=False):
    """One step: decoding requests, then prefilling ones, then newly admitted ones."""

    items: tuple[ScheduledItem, ...]
    preempted: tuple[Request, ...]
    """Running requests that lost their blocks and wait again."""

    @property
    def num_tokens(self) -> int:
        return sum(item.length for item in self.items)


@dataclass(slots=True)
class SchedulerStats:
    """Counters from the scheduler's start."""

    preemptions: int = 0
    refused: int = 0
    prefix_query_tokens: int = 0
    """Tokens of requests looked up in the prefix cache; re-admission after preemption does not count."""
    prefix_hit_tokens: int = 0


class Scheduler:
    """Raises `ValueError` for settings that make no sense. `max_model_len` counts prompt and output together."""

    def __init__(self, config: EngineConfig, cache: KVCache, max_model_len: int) -> None:
        if not config.aging_seconds > 0:
            raise ValueError(f"aging_seconds must be above 0 (inf switches ageing off), got {config.aging_seconds}.")
        self.config = config
        self.cache = cache
        self.max_model_len = max_model_len
        self.waiting: list[Request] = []
        """In order of service, as is `running`: queues are short, and inserting into a list is a memmove."""
        self.running: list[Request] = []
        self.stats = SchedulerStats()
        self._requests: dict[str, dict[int, Request]] = {}
        self._num_added = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queues a new request. Raises `RequestRefused` when it can never be served, or not now."""
        try:
            self._refuse_if_unservable(request)
        except RequestRefused:
            self.stats.refused += 1
            raise
        # The last token is never computed, so it needs no room in the cache.
        limit = min(self.max_model_len, self.cache.capacity + 1)
        if request.params.max_tokens is not None:
            limit = min(limit, request.num_prompt_tokens + request.params.max_tokens)
        request.token_limit = limit
        self._num_added += 1
        aged = request.priority + request.arrival_time / self.config.aging_seconds
        request.order = (aged, request.arrival_time, self._num_added)
        self._requests.setdefault(request.request_id, {})[request.index] = request
        insort(self.waiting, request, key=_by_order)

    def abort(self, request_id: str, index: int | None = None) -> list[Request]:
        """Ends one child, or all children, of a request; returns those that were unfinished (unknown ids: none)."""
        children = self._requests.get(request_id, {})
        aborted = [child for child in children.values() if index is None or child.index == index]
        for child in aborted:
            self.finish(child, FinishReason.ABORT)
        return aborted

    def schedule(self, now: float) -> Schedule:
        """Chooses the next step's work and gets the cache blocks for it. `now` only stamps first-scheduled times."""
        budget = self.config.max_batch_tokens
        items: dict[Request, ScheduledItem] = {}
        preempted: list[Request] = []

        behind = len(self.running)
        for request in sorted(self.running, key=_is_prefilling):  # a stable sort: decoding first, each in order
            behind -= 1
            if request.state is not RequestState.RUNNING:
                continue  # preempted a moment ago
            pending = request.num_tokens - request.num_computed
            if pending < 1:
                raise RuntimeError(f"Request {request.request_id} has no token to compute; it should have finished.")
            room = budget - behind  # one token is kept for each request behind
            length = min(pending, room)
            drafts = min(len(request.draft_token_ids), room - length)
            if drafts and not self.cache.allocate(request, request.num_computed + length + drafts):
                drafts = 0
            while not self.cache.allocate(request, request.num_computed + length + drafts):
                victim = self.running[-1]
                self._preempt(victim)
                preempted.append(victim)
                items.pop(victim, None)  # the budget it had got lies idle for this one step
                if victim is request:
                    break
            else:
                if drafts < len(request.draft_token_ids):
                    del request.draft_token_ids[drafts:]
                items[request] = ScheduledItem(
                    request, request.num_computed, length + drafts, drafts, length == pending
                )
                budget -= length + drafts

        while self.waiting and budget > 0 and not preempted and len(self.running) < self.config.max_running:
            request = self.waiting[0]
            # One block to spare, lest the next step preempt what this one admits.
            if not self.cache.fits(request, spare=1 if self.running else 0):
                break
            self._admit(request, now)
            pending = request.num_tokens - request.num_computed
            length = min(pending, budget)
            if not self.cache.allocate(request, request.num_computed + length):
                raise RuntimeError(f"Request {request.request_id} was admitted, but its blocks are not free.")
            items[request] = ScheduledItem(request, request.num_computed, length, 0, length == pending)
            budget -= length

        return Schedule(tuple(items.values()), tuple(preempted))

    def advance(
        self, item: ScheduledItem, num_valid: int, new_token_ids: Sequence[int], draft_token_ids: Sequence[int] = ()
    ) -> None:
        """Takes an item's result: `num_valid` positions are valid (all but rejected drafts), new tokens were chosen.

        `new_token_ids` is empty for a chunk that did not yield a token; otherwise accepted drafts and one more, or
        less where the request ends within them, in which case `finish` must follow. Drafts proposed for the next step
        are cut to those that can become output within `token_limit`.
        """
        request = item.request
        if request.state is not RequestState.RUNNING:
            raise RuntimeError(f"Request {request.request_id} is {request.state.value}, not running.")
        if not item.length - item.num_drafts <= num_valid <= item.length:
            raise ValueError(
                f"num_valid must be between {item.length - item.num_drafts} and {item.length}, got {num_valid}."
            )
        request.output_token_ids += new_token_ids
        num_tokens = request.num_tokens
        request.num_computed = min(item.start + num_valid, num_tokens)
        # A step with d drafts yields up to d + 1 tokens.
        request.draft_token_ids = list(draft_token_ids[: max(request.token_limit - num_tokens - 1, 0)])
        self.cache.commit(request)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a waiting or running request and frees its blocks, whose content stays cached."""
        queue = self.running if request.state is RequestState.RUNNING else self.waiting
        self._remove(queue, request)
        self.cache.free(request)
        request.state = RequestState.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.draft_token_ids = []
        siblings = self._requests[request.request_id]
        del siblings[request.index]
        if not siblings:
            del self._requests[request.request_id]

    def check(self) -> None:
        """Verifies every invariant, the cache's included; valid between steps. Raises `AssertionError`."""
        for queue, state in ((self.waiting, RequestState.WAITING), (self.running, RequestState.RUNNING)):
            assert queue == sorted(queue, key=_by_order), f"{state.value} requests are out of order"
            assert all(request.state is state for request in queue), f"a request in that queue is not {state.value}"
        listed = {child for children in self._requests.values() for child in children.values()}
        assert listed == {*self.waiting, *self.running}, "queues and index hold different requests"
        assert len(listed) == len(self.waiting) + len(self.running), "a request stands in two places"
        assert len(self.running) <= self.config.max_running, "more than max_running requests run"
        for request in self.waiting:
            held = (request.block_table, request.num_computed, request.num_committed, request.draft_token_ids)
            assert held == ([], 0, 0, []), f"{request.request_id} waits but holds something"
        for request in self.running:
            assert request.num_computed < request.num_tokens, f"{request.request_id} has nothing to compute"
            assert request.num_tokens < request.token_limit, f"{request.request_id} should have finished"
            assert request.num_tokens_with_drafts < request.token_limit, f"{request.request_id} has useless drafts"
            assert not (request.is_prefilling and request.draft_token_ids), f"{request.request_id} drafts in prefill"
        self.cache.check(self.running)

    def _refuse_if_unservable(self, request: Request) -> None:
        length, cache = request.num_prompt_tokens, self.cache
        kind, message = ErrorKind.INVALID, ""
        if length == 0:
            message = "The prompt is empty; send at least one token."
        elif length >= self.max_model_len:
            message = (
                f"The prompt has {length} tokens, but the context limit is {self.max_model_len} tokens and at least "
                "one must be left for the output; shorten the prompt."
            )
        elif cache.blocks_for(length) > cache.num_blocks:
            message = (
                f"The prompt has {length} tokens and needs {cache.blocks_for(length)} cache blocks of "
                f"{cache.block_size} tokens, but the cache has {cache.num_blocks}; shorten the prompt or raise "
                "cache_tokens."
            )
        elif request.index in self._requests.get(request.request_id, {}):
            message = f"Choice {request.index} of request {request.request_id} is already being served; use a new id."
        elif len(self.waiting) >= self.config.max_waiting:
            kind = ErrorKind.OVERLOADED
            message = (
                f"The queue is full: {len(self.waiting)} requests are waiting (max_waiting is "
                f"{self.config.max_waiting}); try again later."
            )
        if message:
            raise RequestRefused(kind, message)

    def _admit(self, request: Request, now: float) -> None:
        del self.waiting[0]
        insort(self.running, request, key=_by_order)
        request.state = RequestState.RUNNING
        cached = self.cache.start(request)
        if request.preemptions == 0:
            request.scheduled_time = now
            request.num_cached_tokens = cached
            if self.cache.enable_prefix:
                self.stats.prefix_query_tokens += request.num_tokens
                self.stats.prefix_hit_tokens += cached

    def _preempt(self, victim: Request) -> None:
        if len(self.running) == 1:
            raise RuntimeError(
                f"Request {victim.request_id} outgrew the cache: it has {victim.num_tokens} tokens and should have "
                f"finished at its token_limit of {victim.token_limit}."
            )
        self._remove(self.running, victim)
        self.cache.free(victim)
        victim.state = RequestState.WAITING
        victim.draft_token_ids = []
        victim.preemptions += 1
        self.stats.preemptions += 1
        insort(self.waiting, victim, key=_by_order)

    @staticmethod
    def _remove(queue: list[Request], request: Request) -> None:
        """Orders are unique, so bisection finds the very request."""
        position = bisect_left(queue, request.order, key=_by_order)
        if position == len(queue) or queue[position] is not request:
            raise RuntimeError(f"Request {request.request_id} is not in the queue of {request.state.value} requests.")
        del queue[position]
