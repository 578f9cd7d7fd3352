"""Recorded decode steps under the engine: single-stream decode runs them, and nobody can tell from the tokens."""

import itertools
import random

import pytest
import torch

from tests.engine.support import VOCAB, Driver, answer, make_core, request
from tilery.engine.messages import SamplingParams
from tilery.ops import native, registry

OPS = registry.select()
pytestmark = pytest.mark.skipif(not native.records(OPS), reason="needs the C++ operators")
SAMPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=50, ignore_eos=True)


def prompt(length, seed=0):
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def plain(core):
    core.runner.recorded = None
    return core


def rows(got):
    return {key: (one.tokens, [row.logprob for row in one.logprobs]) for key, one in got.items()}


def test_single_stream_decode_is_replayed(core):
    one = core()
    recorded = one.runner.recorded
    before = recorded.replayed
    got = answer(one, request("a", prompt(20), max_tokens=80))
    # Two steps of each kind are not: dense up to 32 tokens, sparse in the first block, sparse in the second.
    assert recorded.replayed - before == 79 - 2 * 3
    assert got.tokens == answer(one, request("b", prompt(20), max_tokens=80)).tokens
    assert got.tokens == answer(plain(make_core(one.runner.folder)), request("c", prompt(20), max_tokens=80)).tokens


@pytest.mark.parametrize("settings", [{}, {"speculative_tokens": 3}, {"cache_dtype": "fp8"}])
def test_one_request_computes_the_same_numbers(folder, settings):
    both = [make_core(folder, **settings), plain(make_core(folder, **settings))]
    first, second = (answer(core, request("a", prompt(90), max_tokens=60, logprobs=2)) for core in both)
    assert both[0].runner.recorded.replayed > 10
    assert rows({0: first}) == rows({0: second})


def traffic(core):
    """Requests that come and go while others decode: shared prefixes, chunked prompts, choices, preemption, aborts."""
    driver, draw = Driver(core), random.Random(3)
    shared = prompt(130, seed=1)
    for number in range(14):
        own = shared[: draw.choice([0, 64, 130])] + prompt(draw.randrange(1, 40), seed=number + 2)
        params = draw.choice([None, SAMPLED])
        driver.add(request(f"r{number}", own, params, max_tokens=draw.randrange(8, 90), logprobs=0, n=1 + number % 2))
        for _ in range(draw.randrange(8)):
            driver.step()
            core.check()
        if number == 6:
            core.abort(["r5"])
    return driver.finish()


@pytest.mark.parametrize("settings", [{}, {"speculative_tokens": 2}, {"max_batch_tokens": 24, "max_running": 8}])
def test_mixed_traffic_gives_the_same_tokens(folder, settings):
    tight = {"cache_tokens": 8 * 64, **settings}
    core = make_core(folder, **tight)
    got, expected = rows(traffic(core)), rows(traffic(plain(make_core(folder, **tight))))
    stats = core.stats()
    assert min(stats.prefix_hit_tokens, stats.preemptions, core.runner.recorded.replayed) > 0
    assert {key: tokens for key, (tokens, _) in got.items()} == {key: tokens for key, (tokens, _) in expected.items()}


def test_hidden_states_of_a_step_are_not_those_of_the_next(folder):
    """The engine keeps them: for the layer that drafts, and while it samples."""
    core = make_core(folder)
    kept = []
    forward = core.runner.forward

    def watched(items):
        kept.append(forward(items)[0])
        return kept[-1]

    core.runner.forward = lambda items: [watched(items)]
    answer(core, request("a", prompt(5), max_tokens=12))
    assert core.runner.recorded.replayed > 3
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(kept[1:]))


@pytest.mark.parametrize("operators", [{"*": "reference"}, {"linear": "reference"}])
def test_other_operators_are_not_recorded(folder, operators):
    core = make_core(folder, operators=operators)
    assert core.runner.recorded is None
    assert len(answer(core, request("a", prompt(5))).tokens) == 8
