"""Scheduler: refusals, order, budget, preemption, and random traffic through a simulated model in tiny caches."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tilery.engine.config import EngineConfig
from tilery.engine.kv_cache import KVCache
from tilery.engine.messages import ErrorKind, FinishReason, SamplingParams
from tilery.engine.request import Request, RequestState
from tilery.engine.scheduler import RequestRefused, Schedule, ScheduledItem, Scheduler


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 1000,
    budget: int = 16,
    max_running: int = 4,
    max_waiting: int = 100,
    aging_seconds: float = 10.0,
) -> Scheduler:
    config = EngineConfig(
        model="none",
        max_batch_tokens=budget,
        max_running=max_running,
        max_waiting=max_waiting,
        aging_seconds=aging_seconds,
    )
    return Scheduler(config, KVCache(num_blocks, block_size), max_model_len)


def make_request(
    name: str,
    length: int = 4,
    *,
    index: int = 0,
    first: int = 0,
    priority: int = 0,
    arrival: float = 0.0,
    max_tokens: int | None = 100,
    prompt_logprobs: int | None = None,
) -> Request:
    """Prompts share a prefix exactly if they have the same `first` token."""
    return Request(
        request_id=name,
        index=index,
        prompt_token_ids=list(range(first, first + length)),
        params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
        priority=priority,
        arrival_time=arrival,
    )


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def step(scheduler: Scheduler, drafts: int = 0) -> Schedule:
    """One step in which the model accepts all drafts and nothing ends."""
    schedule = scheduler.schedule(now=1.0)
    for item in schedule.items:
        tokens = [7] * (item.num_drafts + 1) if item.yields_token else []
        scheduler.advance(item, item.length, tokens, [8] * drafts if tokens else [])
    scheduler.check()
    return schedule


def plan(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(item.request.request_id, item.start, item.length) for item in schedule.items]


def names(requests: list[Request] | tuple[Request, ...]) -> list[str]:
    return [request.request_id for request in requests]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "The prompt is empty; send at least one token."),
        (
            200,
            "The prompt has 200 tokens, but the context limit is 200 tokens and at least one must be left for the "
            "output; shorten the prompt.",
        ),
        (
            129,
            "The prompt has 129 tokens and needs 33 cache blocks of 4 tokens, but the cache has 32; shorten the prompt "
            "or raise cache_tokens.",
        ),
    ],
)
def test_what_can_never_fit_is_refused(length: int, message: str) -> None:
    scheduler = make_scheduler(num_blocks=32, max_model_len=200)
    with pytest.raises(RequestRefused) as caught:
        scheduler.add(make_request("a", length))
    assert (caught.value.kind, caught.value.message, str(caught.value)) == (ErrorKind.INVALID, message, message)
    assert scheduler.stats.refused == 1
    assert not scheduler.has_unfinished
    scheduler.add(make_request("b", 128))
    scheduler.check()


def test_full_queue_refuses() -> None:
    scheduler = make_scheduler(max_waiting=2, max_running=1)
    add(scheduler, make_request("a"), make_request("b"))
    with pytest.raises(RequestRefused) as caught:
        scheduler.add(make_request("c"))
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert caught.value.message == "The queue is full: 2 requests are waiting (max_waiting is 2); try again later."
    step(scheduler)  # one of them runs now
    scheduler.add(make_request("c"))


def test_an_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"), make_request("a", index=1))
    with pytest.raises(RequestRefused, match="Choice 1 of request a is already being served; use a new id"):
        scheduler.add(make_request("a", index=1))
    scheduler.check()


def test_ageing_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"aging_seconds must be above 0 \(inf switches ageing off\), got 0"):
        make_scheduler(aging_seconds=0)


# ---- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "num_blocks", "limit"),
    [(5, 1000, 64, 9), (None, 50, 64, 50), (100, 50, 64, 50), (None, 1000, 8, 33), (100, 1000, 8, 33)],
)
def test_token_limit_is_the_least_of_three(
    max_tokens: int | None, max_model_len: int, num_blocks: int, limit: int
) -> None:
    """max_tokens, the context limit, and what the whole cache holds (its last token needs no room)."""
    scheduler = make_scheduler(num_blocks=num_blocks, max_model_len=max_model_len)
    request = make_request("a", 4, max_tokens=max_tokens)
    scheduler.add(request)
    while not request.at_limit:
        (item,) = scheduler.schedule(0.0).items
        assert item.start + item.length <= min(max_model_len - 1, scheduler.cache.capacity)
        scheduler.advance(item, item.length, [7] * (item.num_drafts + 1), [8, 8, 8])
    assert request.num_tokens == request.token_limit == limit
    scheduler.finish(request, FinishReason.LENGTH)
    assert (request.is_finished, request.finish_reason, scheduler.cache.num_used) == (True, FinishReason.LENGTH, 0)
    scheduler.check()


def test_drafts_are_cut_to_what_can_become_output() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=4)
    scheduler.add(request)
    (item,) = step(scheduler, drafts=3).items
    assert (item.num_drafts, request.draft_token_ids) == (0, [8, 8])  # three tokens may follow: two drafts and one
    (item,) = scheduler.schedule(0.0).items
    assert (item.start, item.length, item.num_drafts) == (4, 3, 2)
    scheduler.advance(item, 2, [8, 9], [8, 8])  # one draft accepted, one token to go
    assert (request.num_computed, request.num_tokens, request.draft_token_ids) == (6, 7, [])


def test_advance_checks_its_arguments() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add(request)
    (item,) = scheduler.schedule(0.0).items
    with pytest.raises(ValueError, match="num_valid must be between 4 and 4, got 3"):
        scheduler.advance(item, 3, [7])
    scheduler.finish(request, FinishReason.STOP, stop_reason=7)
    assert request.stop_reason == 7
    with pytest.raises(RuntimeError, match="Request a is finished, not running"):
        scheduler.advance(item, 4, [7])
    with pytest.raises(RuntimeError, match="Request a is not in the queue of finished requests"):
        scheduler.finish(request, FinishReason.STOP)


def test_a_driver_that_does_not_finish_requests_is_told() -> None:
    scheduler = make_scheduler(num_blocks=2)
    request = make_request("a", 8)
    scheduler.add(request)
    (item,) = scheduler.schedule(0.0).items
    scheduler.advance(item, 8, [7])
    with pytest.raises(RuntimeError, match=r"outgrew the cache.* at its token_limit of 9"):
        scheduler.schedule(0.0)
    request.num_computed = 9
    with pytest.raises(RuntimeError, match="Request a has no token to compute"):
        scheduler.schedule(0.0)


# ---- budget ------------------------------------------------------------------------------------------------------


def test_long_prompt_is_chunked_and_decoding_goes_on() -> None:
    scheduler = make_scheduler(budget=10)
    add(scheduler, make_request("a", 4), make_request("b", 3, first=50))
    assert plan(step(scheduler)) == [("a", 0, 4), ("b", 0, 3)]
    scheduler.add(make_request("long", 21, first=100, priority=-100))
    assert plan(step(scheduler)) == [("a", 4, 1), ("b", 3, 1), ("long", 0, 8)]
    assert plan(step(scheduler)) == [("a", 5, 1), ("b", 4, 1), ("long", 8, 8)]
    schedule = scheduler.schedule(0.0)
    assert plan(schedule) == [("a", 6, 1), ("b", 5, 1), ("long", 16, 5)]
    assert [item.yields_token for item in schedule.items] == [True, True, True]
    assert schedule.num_tokens == 7


def test_a_chunk_yields_no_token_before_the_last() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_request("a", 9))
    assert [step(scheduler).items[0].yields_token for _ in range(4)] == [False, False, True, True]


def test_everybody_gets_a_token_before_anybody_gets_drafts() -> None:
    scheduler = make_scheduler(budget=6, max_running=4)
    add(scheduler, make_request("a", 1), make_request("b", 1, first=10), make_request("c", 1, first=20))
    step(scheduler, drafts=3)
    scheduler.add(make_request("long", 40, first=100))
    assert plan(step(scheduler, drafts=3)) == [("a", 1, 4), ("b", 1, 1), ("c", 1, 1)]
    assert plan(step(scheduler, drafts=0)) == [("a", 5, 4), ("b", 2, 1), ("c", 2, 1)]
    assert plan(step(scheduler, drafts=3)) == [("a", 9, 1), ("b", 3, 1), ("c", 3, 1), ("long", 0, 3)]
    assert plan(step(scheduler)) == [("a", 10, 3), ("b", 4, 1), ("c", 4, 1), ("long", 3, 1)]


def test_at_most_max_running() -> None:
    scheduler = make_scheduler(max_running=2)
    add(scheduler, *(make_request(name, 1) for name in "abc"))
    assert plan(step(scheduler)) == [("a", 0, 1), ("b", 0, 1)]
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert plan(step(scheduler)) == [("b", 1, 1), ("c", 0, 1)]


# ---- order -------------------------------------------------------------------------------------------------------


def test_priority_then_arrival_then_order_of_adding() -> None:
    scheduler = make_scheduler(aging_seconds=1e9)
    add(
        scheduler,
        make_request("late", arrival=2.0),
        make_request("early", arrival=1.0),
        make_request("twin", arrival=1.0),
        make_request("urgent", arrival=3.0, priority=-1),
        make_request("patient", arrival=0.0, priority=1),
    )
    assert names(scheduler.waiting) == ["urgent", "early", "twin", "late", "patient"]


@pytest.mark.parametrize(("waited", "first"), [(9.9, "urgent"), (10.1, "old")])
def test_one_priority_level_is_worth_aging_seconds(waited: float, first: str) -> None:
    scheduler = make_scheduler(aging_seconds=10.0)
    add(scheduler, make_request("old", priority=1), make_request("urgent", priority=0, arrival=waited))
    assert scheduler.waiting[0].request_id == first


def test_nothing_overtakes_a_request_that_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=10)
    add(scheduler, make_request("a", 15, first=100))
    step(scheduler)
    add(scheduler, make_request("big", 28, first=200), make_request("small", 1, first=300))
    assert plan(step(scheduler)) == [("a", 15, 1)]
    assert names(scheduler.waiting) == ["big", "small"]
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert plan(step(scheduler)) == [("big", 0, 16)]
    assert plan(step(scheduler)) == [("big", 16, 12), ("small", 0, 1)]


def test_admission_leaves_one_block_unless_nothing_runs() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, make_request("a", 8), make_request("b", 8, first=50))
    assert plan(step(scheduler)) == [("a", 0, 8)]
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert plan(step(scheduler)) == [("b", 0, 8)]
    scheduler.add(make_request("c", 4, first=90))
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    scheduler.add(make_request("d", 4, first=190))
    assert plan(step(scheduler)) == [("c", 0, 4), ("d", 0, 4)]


# ---- preemption --------------------------------------------------------------------------------------------------


def test_the_last_in_order_is_preempted_and_is_the_next_to_return() -> None:
    scheduler = make_scheduler(num_blocks=5, max_running=2)
    low = make_request("low", 8, first=100, priority=1)
    add(scheduler, low, make_request("high", 7, first=200), make_request("other", 1, priority=2))
    assert plan(step(scheduler)) == [("high", 0, 7), ("low", 0, 8)]
    assert plan(step(scheduler)) == [("high", 7, 1), ("low", 8, 1)]
    assert scheduler.cache.num_free == 0
    schedule = step(scheduler)  # high needs its third block
    assert (plan(schedule), names(schedule.preempted)) == ([("high", 8, 1)], ["low"])
    assert (low.state, low.block_table, low.num_computed, low.preemptions) == (RequestState.WAITING, [], 0, 1)
    assert names(scheduler.waiting) == ["low", "other"]
    assert plan(step(scheduler)) == [("high", 9, 1)]  # low does not fit, and "other" does not overtake it
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert plan(step(scheduler)) == [("low", 8, 2), ("other", 0, 1)]  # its two full blocks had survived
    assert low.num_cached_tokens == 0
    stats = scheduler.stats
    assert (stats.preemptions, stats.prefix_query_tokens, stats.prefix_hit_tokens) == (1, 16, 0)


def test_the_asker_itself_may_be_the_last() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_request("a", 7), make_request("b", 7, first=100))
    step(scheduler)
    step(scheduler)
    schedule = step(scheduler)
    assert (plan(schedule), names(schedule.preempted)) == ([("a", 8, 1)], ["b"])


def test_work_already_given_to_the_preempted_is_withdrawn() -> None:
    """low decodes, so it is served before high, which prefills; then high needs a block and takes it from low."""
    scheduler = make_scheduler(num_blocks=9, budget=3, max_running=2)
    low = make_request("low", 4, priority=1)
    scheduler.add(low)
    step(scheduler)
    scheduler.add(make_request("high", 24, first=100))
    while True:
        low_asks_for_a_block = low.num_computed % 4 == 0
        schedule = step(scheduler)
        if schedule.preempted:
            break
        assert [item.request.request_id for item in schedule.items] == ["low", "high"]
    assert not low_asks_for_a_block
    assert names(schedule.preempted) == ["low"]
    assert [item.request.request_id for item in schedule.items] == ["high"]


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(num_blocks=5, max_running=2)
    add(scheduler, make_request("a", 7), make_request("b", 8, first=100))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_request("urgent", 1, first=200, priority=-1))
    schedule = step(scheduler)
    assert (plan(schedule), names(schedule.preempted)) == ([("a", 8, 1)], ["b"])
    assert plan(step(scheduler)) == [("a", 9, 1), ("urgent", 0, 1)]
    assert names(scheduler.waiting) == ["b"]


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4)
    first = make_request("a", 1)
    add(scheduler, first, make_request("b", 7, first=100))
    step(scheduler)
    step(scheduler)
    for item in scheduler.schedule(0.0).items:
        scheduler.advance(item, 1, [7], [8, 8, 8] if item.request is first else [])
    assert scheduler.cache.num_free == 0
    schedule = step(scheduler)
    assert (plan(schedule), schedule.preempted) == ([("a", 3, 1), ("b", 9, 1)], ())


# ---- prefix cache, abort -----------------------------------------------------------------------------------------


def test_prefix_hits_are_scheduled_past_and_counted() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 9))
    step(scheduler)
    follower, thorough = make_request("b", 10), make_request("c", 10, prompt_logprobs=0)
    add(scheduler, follower, thorough)
    assert plan(step(scheduler)) == [("a", 9, 1), ("b", 8, 2), ("c", 0, 10)]
    assert (follower.num_cached_tokens, thorough.num_cached_tokens) == (8, 0)
    assert (follower.scheduled_time, follower.timing().scheduled) == (1.0, 1.0)
    assert (scheduler.stats.prefix_query_tokens, scheduler.stats.prefix_hit_tokens) == (29, 8)


def test_abort_one_child_or_all_running_or_waiting() -> None:
    scheduler = make_scheduler(max_running=2)
    children = [make_request("a", index=i, first=10 * i) for i in range(4)]
    add(scheduler, *children, make_request("b"))
    step(scheduler)
    assert scheduler.abort("a", index=1) == [children[1]]
    assert scheduler.abort("a", index=1) == []
    assert scheduler.abort("unknown") == []
    scheduler.check()
    assert scheduler.abort("a") == [children[0], children[2], children[3]]
    assert {(child.state, child.finish_reason) for child in children} == {(RequestState.FINISHED, FinishReason.ABORT)}
    assert scheduler.cache.num_used == 0
    assert scheduler.has_unfinished
    scheduler.abort("b")
    assert not scheduler.has_unfinished
    assert not scheduler.schedule(0.0).items
    scheduler.check()


# ---- check -------------------------------------------------------------------------------------------------------


def _draft_in_prefill(scheduler: Scheduler) -> None:
    scheduler.running[0].num_computed = 3
    scheduler.running[0].draft_token_ids = [1]


SABOTAGE: list[tuple[str, Callable[[Scheduler], object]]] = [
    ("waiting requests are out of order", lambda s: s.waiting.reverse()),
    ("a request in that queue is not running", lambda s: setattr(s.running[0], "state", RequestState.WAITING)),
    ("queues and index hold different requests", lambda s: s.waiting.pop()),
    ("a request stands in two places", lambda s: s.waiting.append(s.waiting[-1])),
    ("more than max_running requests run", lambda s: setattr(s, "config", EngineConfig(model="none", max_running=1))),
    ("waits but holds something", lambda s: setattr(s.waiting[0], "draft_token_ids", [1])),
    ("has nothing to compute", lambda s: setattr(s.running[0], "num_computed", 5)),
    ("should have finished", lambda s: setattr(s.running[0], "token_limit", 5)),
    ("has useless drafts", lambda s: setattr(s.running[0], "draft_token_ids", [1] * 99)),
    ("drafts in prefill", lambda s: _draft_in_prefill(s)),
    ("references, but", lambda s: s.running[0].block_table.pop()),
]


@pytest.mark.parametrize(("complaint", "sabotage"), SABOTAGE, ids=[name for name, _ in SABOTAGE])
def test_check_notices(complaint: str, sabotage: Callable[[Scheduler], object]) -> None:
    scheduler = make_scheduler(max_running=2)
    add(scheduler, *(make_request(name, first=10 * i) for i, name in enumerate("abcd")))
    step(scheduler)
    sabotage(scheduler)
    with pytest.raises(AssertionError, match=complaint):
        scheduler.check()


# ---- random traffic ----------------------------------------------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Random requests, aborts and drafts through a simulated model in a cache too small for them.

    The model's cache rows are simulated: a row holds its token, all tokens before it and the salt, written when the
    position is scheduled. What a request believes to be computed must stand in the rows its block table names.
    """

    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.integers(1, 4),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
        enable_prefix=st.booleans(),
        max_model_len=st.integers(2, 40),
    )
    def begin(
        self, num_blocks: int, block_size: int, budget: int, max_running: int, enable_prefix: bool, max_model_len: int
    ) -> None:
        config = EngineConfig(
            model="none", max_batch_tokens=max(budget, max_running), max_running=max_running, max_waiting=8
        )
        cache = KVCache(num_blocks, block_size, enable_prefix=enable_prefix)
        self.scheduler = Scheduler(config, cache, max_model_len)
        self.rows: dict[tuple[int, int], object] = {}
        self.accepted: list[Request] = []
        self.clock = 0.0

    @rule(
        length=st.integers(0, 20),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, "a"]),
        max_tokens=st.one_of(st.none(), st.integers(1, 12)),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        delay=st.floats(0, 20),
        seed=st.integers(0, 2**32),
    )
    def add(
        self,
        length: int,
        priority: int,
        salt: str | None,
        max_tokens: int | None,
        prompt_logprobs: int | None,
        delay: float,
        seed: int,
    ) -> None:
        self.clock += delay
        request = Request(
            request_id=f"r{len(self.accepted) // 2}",
            index=len(self.accepted) % 2,
            prompt_token_ids=random.Random(seed).choices(range(3), weights=(8, 1, 1), k=length),
            params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
            priority=priority,
            cache_salt=salt,
            arrival_time=self.clock,
        )
        cache = self.scheduler.cache
        queue_is_full = len(self.scheduler.waiting) >= self.scheduler.config.max_waiting
        if 0 < length < self.scheduler.max_model_len and length <= cache.capacity and not queue_is_full:
            self.scheduler.add(request)
            self.accepted.append(request)
        else:
            with pytest.raises(RequestRefused):
                self.scheduler.add(request)

    @rule(number=st.integers(0, 20), all_children=st.booleans())
    def abort(self, number: int, all_children: bool) -> None:
        name, index = f"r{number // 2}", number % 2
        expected = [
            request
            for request in self.accepted
            if request.request_id == name and not request.is_finished and (all_children or request.index == index)
        ]
        assert self.scheduler.abort(name, None if all_children else index) == expected

    @rule(seed=st.integers(0, 2**32), num_drafts=st.integers(0, 3), count=st.integers(1, 5))
    def steps(self, seed: int, num_drafts: int, count: int) -> None:
        generator = random.Random(seed)
        for _ in range(count):
            self.step(generator, num_drafts)
            self.consistent()

    @rule()
    def reset(self) -> None:
        assert self.scheduler.cache.reset_prefix_cache() == (self.scheduler.cache.num_used == 0)

    def step(self, generator: random.Random, num_drafts: int) -> None:
        scheduler = self.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        schedule = scheduler.schedule(self.clock)
        scheduled = [item.request for item in schedule.items]
        admitted = [request for request in scheduled if request not in running]
        assert bool(scheduled) == scheduler.has_unfinished, "a step must make progress"
        assert schedule.num_tokens <= scheduler.config.max_batch_tokens
        assert len(set(scheduled)) == len(scheduled)
        assert {*scheduled, *schedule.preempted} == {*running, *admitted}, "a running request got nothing"
        assert running[len(running) - len(schedule.preempted) :] == list(schedule.preempted)[::-1]
        assert admitted == waiting[: len(admitted)], "admission left the order"
        assert not (admitted and schedule.preempted)
        for item in schedule.items:
            self.compute(item)
        for item in schedule.items:
            self.take_result(item, generator, num_drafts)

    def compute(self, item: ScheduledItem) -> None:
        request, stop = item.request, item.start + item.length
        assert item.length >= 1
        assert item.start == request.num_computed
        assert stop < request.token_limit <= self.scheduler.max_model_len
        assert len(request.block_table) * self.scheduler.cache.block_size >= stop
        assert item.yields_token == (stop == request.num_tokens_with_drafts)
        assert item.num_drafts == len(request.draft_token_ids)
        for position in range(item.start, stop):
            self.rows[self.row(request, position)] = self.value(request, position)

    def take_result(self, item: ScheduledItem, generator: random.Random, num_drafts: int) -> None:
        request = item.request
        if not item.yields_token:
            assert item.num_drafts == 0
            self.scheduler.advance(item, item.length, [])
            return
        accepted = generator.randint(0, item.num_drafts)
        tokens = [*request.draft_token_ids[:accepted], generator.choices(range(3), weights=(8, 1, 1))[0]]
        stopped = generator.random() < 0.05
        if stopped:
            tokens = tokens[: generator.randint(1, len(tokens))]
        drafts = [generator.randrange(2) for _ in range(num_drafts)]
        self.scheduler.advance(item, item.length - item.num_drafts + accepted, tokens, drafts)
        assert request.num_tokens <= request.token_limit
        if stopped or request.at_limit:
            self.scheduler.finish(request, FinishReason.STOP if stopped else FinishReason.LENGTH)

    def row(self, request: Request, position: int) -> tuple[int, int]:
        size = self.scheduler.cache.block_size
        return request.block_table[position // size], position % size

    def value(self, request: Request, position: int) -> object:
        return request.cache_salt, tuple(request.token_ids(0, position + 1))

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        for request in self.scheduler.running:
            for position in range(request.num_computed):
                assert self.rows[self.row(request, position)] == self.value(request, position)

    def teardown(self) -> None:
        """Everybody who was let in gets done."""
        generator = random.Random(0)
        for _ in range(2000):
            if not getattr(self, "accepted", None) or not self.scheduler.has_unfinished:
                break
            self.step(generator, num_drafts=2)
        for request in getattr(self, "accepted", []):
            assert request.is_finished
            assert request.finish_reason is not FinishReason.LENGTH or request.at_limit


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
