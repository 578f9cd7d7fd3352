"""Block pool and prefix cache: order of eviction, isolation by salt, and that a hit is what it claims to be."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilery.engine.kv_cache import BlockPool, KVCache
from tilery.engine.messages import SamplingParams
from tilery.engine.request import Request

SIZE = 4


def make_request(tokens: list[int], salt: str | None = None, prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Request(request_id="r", prompt_token_ids=list(tokens), params=params, cache_salt=salt)


def compute(cache: KVCache, request: Request) -> Request:
    """Takes a request through start, allocate and commit, as if all its tokens had been computed."""
    cache.start(request)
    assert cache.allocate(request, request.num_tokens)
    request.num_computed = request.num_tokens
    cache.commit(request)
    return request


# ---- request -----------------------------------------------------------------------------------------------------


def test_token_slices_cover_prompt_output_and_drafts() -> None:
    request = make_request([0, 1, 2])
    request.output_token_ids, request.draft_token_ids = [3, 4], [5, 6]
    for start in range(8):
        for stop in range(start, 8):
            assert request.token_ids(start, stop) == list(range(7))[start:stop]
    assert [request.token_at(i) for i in range(7)] == list(range(7))
    assert (request.num_prompt_tokens, request.num_tokens, request.num_tokens_with_drafts) == (3, 5, 7)
    with pytest.raises(IndexError, match=r"Positions \[2, 8\) are not within \[0, 7\)\."):
        request.token_ids(2, 8)
    with pytest.raises(IndexError):
        request.token_at(-1)


def test_prefilling_means_more_than_the_newest_token() -> None:
    request = make_request([0, 1, 2])
    prefilling = []
    for request.num_computed in range(3):
        prefilling.append(request.is_prefilling)
    assert prefilling == [True, True, False]


# ---- block pool --------------------------------------------------------------------------------------------------


def test_least_recently_used_is_taken_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for block in blocks:
        pool.register(block, bytes([block]))
    for block in (2, 0, 3, 1):
        pool.release(block)
    assert pool.free_list() == [2, 0, 3, 1]
    pool.share(0)  # a hit removes from the middle
    assert pool.free_list() == [2, 3, 1]
    pool.release(0)
    assert pool.free_list() == [2, 3, 1, 0]
    assert [pool.take() for _ in range(4)] == [2, 3, 1, 0]
    assert pool.block_of == {}


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.register(first, b"x")
    pool.release(first)
    pool.release(second)
    assert pool.free_list() == [second, 2, first]
    pool.check([])


def test_pool_misuse_is_an_error() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(RuntimeError, match=r"No block is free; ask num_free before taking one\.$"):
        pool.take()
    pool.release(0)
    with pytest.raises(RuntimeError, match=r"Block 0 was released more often than it was taken\.$"):
        pool.release(0)
    with pytest.raises(ValueError, match=r"num_blocks must be at least 1, got 0\.$"):
        BlockPool(0)


def _break_backward_links(cache: KVCache, request: Request) -> None:
    cache.pool._previous[cache.num_blocks] = cache.pool.free_list()[0]


def _share_with_itself(cache: KVCache, request: Request) -> None:
    cache.pool.share(request.block_table[0])
    request.block_table.append(request.block_table[0])


SABOTAGE: list[tuple[str, Callable[[KVCache, Request], object]]] = [
    ("the free list and its length differ", lambda cache, r: setattr(cache.pool, "num_free", 2)),
    ("the free list reads differently backwards", _break_backward_links),
    ("2 references, but 1 tables", lambda cache, r: cache.pool.references.__setitem__(r.block_table[0], 2)),
    ("a free block is in use", lambda cache, r: cache.pool._link_after(cache.num_blocks, r.block_table[0])),
    ("the maps hash -> block and block -> hash disagree", lambda cache, r: cache.pool.block_of.popitem()),
    ("a block stands twice in its table", _share_with_itself),
    ("computed tokens without a block", lambda cache, r: setattr(r, "num_computed", 13)),
    ("committed too much", lambda cache, r: setattr(r, "num_computed", 7)),
    ("its hash chain is not that of its tokens", lambda cache, r: r.prompt_token_ids.__setitem__(0, 99)),
    ("is findable but not full", lambda cache, r: setattr(r, "num_committed", 1)),
    ("has the hash of other tokens", lambda cache, r: r.block_table.__setitem__(slice(2), r.block_table[1::-1])),
]


@pytest.mark.parametrize(("complaint", "sabotage"), SABOTAGE, ids=[name for name, _ in SABOTAGE])
def test_check_notices(complaint: str, sabotage: Callable[[KVCache, Request], object]) -> None:
    cache = KVCache(8, SIZE)
    request = compute(cache, make_request(list(range(10))))
    cache.check([request])
    sabotage(cache, request)
    with pytest.raises(AssertionError, match=complaint):
        cache.check([request])


# ---- prefix cache ------------------------------------------------------------------------------------------------


def test_hash_chain_is_sha256_of_parent_and_little_endian_tokens() -> None:
    cache = KVCache(4, 2, salt="site")
    request = compute(cache, make_request([1, 2, 3, 70000], salt="tenant"))
    root = hashlib.sha256(hashlib.sha256(struct.pack("<q", 2) + b"site").digest() + b"+tenant").digest()
    first = hashlib.sha256(root + struct.pack("<2i", 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("<2i", 3, 70000)).digest()
    assert request.block_hashes == [first, second]
    assert cache.pool.block_of == {first: request.block_table[0], second: request.block_table[1]}


def test_hit_takes_whole_blocks_and_leaves_a_token_to_compute() -> None:
    cache = KVCache(16, SIZE)
    first = compute(cache, make_request(list(range(12))))
    for length, blocks in ((4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (20, 3)):
        assert cache.match(make_request(list(range(length)))) == first.block_table[:blocks], length
    other = make_request([*range(6), 99, *range(7, 12)])
    assert cache.start(other) == 4
    assert (other.block_table, other.num_computed) == (first.block_table[:1], 4)
    cache.check([first, other])
    cache.free(other)
    assert (other.block_table, other.num_computed) == ([], 0)
    cache.check([first])


def test_freed_blocks_stay_cached_and_are_evicted_leaf_first() -> None:
    cache = KVCache(4, SIZE)
    first = compute(cache, make_request(list(range(16))))
    chain = first.block_table
    cache.free(first)
    assert cache.num_free == 4
    again = make_request(list(range(17)))
    for remaining in (3, 2, 1, 0):
        intruder = make_request([50 + remaining])
        assert cache.allocate(intruder, 1)
        assert intruder.block_table == chain[remaining : remaining + 1]
        assert cache.match(again) == chain[:remaining]


def test_salts_isolate() -> None:
    tokens = list(range(9))
    salts = [None, "", "a", "b", "aa"]
    cache = KVCache(32, SIZE)
    tables = [compute(cache, make_request(tokens, salt)).block_table for salt in salts]
    assert len({block for table in tables for block in table}) == 3 * len(salts)
    for salt, table in zip(salts, tables):
        assert cache.match(make_request(tokens, salt)) == table[:2]
    chains = [compute(KVCache(4, SIZE, salt=salt), make_request(tokens)).block_hashes for salt in ("", "x", "y")]
    assert len({block_hash for chain in chains for block_hash in chain}) == 6


def test_first_registered_block_stays_when_content_is_duplicated() -> None:
    cache = KVCache(8, SIZE)
    first, twin = make_request(list(range(9))), make_request(list(range(9)))
    for request in (first, twin):  # both start before either is committed, so neither hits
        assert cache.start(request) == 0
        assert cache.allocate(request, 9)
    for request in (first, twin):
        request.num_computed = 8
        cache.commit(request)
    probe = make_request(list(range(9)))
    assert cache.match(probe) == first.block_table[:2]
    cache.check([first, twin])
    named = first.block_table[:2]
    cache.free(first)
    cache.free(twin)
    assert cache.match(probe) == named
    assert cache.pool.free_list()[-2:] == named[::-1]
    cache.check([])


def test_only_computed_tokens_are_committed() -> None:
    cache = KVCache(8, SIZE)
    request = make_request([1, 2, 3])
    cache.start(request)
    request.output_token_ids, request.draft_token_ids = [4], [5, 6, 7, 8]
    assert cache.allocate(request, 8)
    request.num_computed = 3
    cache.commit(request)
    assert cache.pool.block_of == {}
    request.num_computed = 4
    cache.commit(request)
    assert len(cache.pool.block_of) == 1
    cache.check([request])


def test_allocate_is_all_or_nothing_and_never_takes_a_block_in_use() -> None:
    cache = KVCache(4, SIZE)
    first = compute(cache, make_request(list(range(9))))
    second = make_request([7] * 8)
    assert not cache.allocate(second, 8)
    assert (second.block_table, cache.num_free, cache.num_used) == ([], 1, 3)
    assert cache.allocate(second, 4)
    assert cache.allocate(second, 3)  # already covered
    assert not set(first.block_table) & set(second.block_table)
    assert not cache.allocate(second, 5)
    cache.check([first, second])


def test_fits_counts_shared_blocks_once() -> None:
    cache = KVCache(4, SIZE)
    first = compute(cache, make_request(list(range(9))))
    follower = make_request(list(range(12)))  # two blocks shared and in use, one to allocate, one is free
    assert cache.fits(follower)
    assert not cache.fits(follower, spare=1)
    cache.free(first)  # now the two shared blocks are themselves free: they must not count as room
    assert cache.fits(follower, spare=1)
    assert not cache.fits(follower, spare=2)


def test_prompt_logprobs_take_no_hit_but_offer_their_blocks() -> None:
    cache = KVCache(8, SIZE)
    compute(cache, make_request(list(range(9)), prompt_logprobs=1))
    assert cache.match(make_request(list(range(9)), prompt_logprobs=0)) == []
    assert len(cache.match(make_request(list(range(9))))) == 2


def test_prefix_cache_can_be_off() -> None:
    cache = KVCache(8, SIZE, enable_prefix=False)
    request = compute(cache, make_request(list(range(9))))
    assert cache.match(make_request(list(range(9)))) == []
    assert cache.pool.block_of == {}
    cache.check([request])


def test_reset_waits_for_requests_and_then_forgets_everything() -> None:
    cache = KVCache(8, SIZE)
    request = compute(cache, make_request(list(range(9))))
    assert not cache.reset_prefix_cache()
    assert len(cache.match(make_request(list(range(9))))) == 2
    cache.free(request)
    assert cache.reset_prefix_cache()
    assert cache.match(make_request(list(range(9)))) == []
    cache.check([])


def test_starting_twice_is_an_error() -> None:
    cache = KVCache(8, SIZE)
    request = compute(cache, make_request([1, 2]))
    with pytest.raises(RuntimeError, match=r"Request r already holds 1 blocks\.$"):
        cache.start(request)
    with pytest.raises(ValueError, match=r"block_size must be at least 1, got 0\.$"):
        KVCache(8, 0)


class CacheMachine(RuleBasedStateMachine):
    """Random requests over three token ids and three salts, with a shadow copy of what every cache row holds.

    A row's value depends on its token, everything before it and the salt, so the shadow stores just these.
    """

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), seed=st.integers(0, 2**32))
    def begin(self, num_blocks: int, block_size: int, seed: int) -> None:
        self.cache = KVCache(num_blocks, block_size)
        self.live: list[Request] = []
        self.rows: dict[tuple[int, int], object] = {}
        self.random = random.Random(seed)

    def row(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_table[position // self.cache.block_size], position % self.cache.block_size

    def value(self, request: Request, position: int) -> object:
        return request.cache_salt, tuple(request.token_ids(0, position + 1))

    def longest_match(self, request: Request) -> int:
        """By brute force over the shadow of every block that has a hash."""
        size, named = self.cache.block_size, set(self.cache.pool.block_of.values())
        for i in range((request.num_tokens - 1) // size):
            wanted = [self.value(request, position) for position in range(i * size, (i + 1) * size)]
            if not any([self.rows.get((block, row)) for row in range(size)] == wanted for block in named):
                return i
        return (request.num_tokens - 1) // size

    @rule(length=st.integers(1, 12), salt=st.sampled_from([None, "a", "b"]))
    def start(self, length: int, salt: str | None) -> None:
        request = make_request(self.random.choices(range(3), weights=(8, 1, 1), k=length), salt)
        expected = self.longest_match(request)
        assert self.cache.start(request) == expected * self.cache.block_size
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 6), rejected=st.integers(0, 2), grows=st.booleans())
    def compute(self, count: int, rejected: int, grows: bool) -> None:
        request = self.random.choice(self.live)
        stop = min(request.num_computed + count, request.num_tokens)
        request.draft_token_ids = [9] * rejected if stop == request.num_tokens else []
        written = stop + len(request.draft_token_ids)
        covered, free = len(request.block_table), self.cache.num_free
        if not self.cache.allocate(request, written):
            assert self.cache.blocks_for(written) - covered > free
            request.draft_token_ids = []
            return
        for position in range(request.num_computed, written):
            self.rows[self.row(request, position)] = self.value(request, position)
        request.num_computed = stop
        request.draft_token_ids = []
        if grows:
            request.output_token_ids.append(self.random.randrange(3))
        self.cache.commit(request)

    @precondition(lambda self: self.live)
    @rule()
    def free(self) -> None:
        request = self.live.pop(self.random.randrange(len(self.live)))
        self.cache.free(request)

    @rule()
    def reset(self) -> None:
        assert self.cache.reset_prefix_cache() == (self.cache.num_used == 0)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check(self.live)
        for request in self.live:
            for position in range(request.num_computed):
                assert self.rows[self.row(request, position)] == self.value(request, position)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
