"""The engine under traffic: queues, the prefix cache, statistics, faults that stay where they happen, settings."""

import random

import pytest
import torch

from tests.engine.support import CHARACTERS, EOS, VOCAB, Driver, answer, make_core, request, run
from tilery.engine.config import EngineConfig
from tilery.engine.messages import ErrorKind, FinishReason, SamplingParams

SAMPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True)
DRAFTS = {"speculative_tokens": 3}
CHUNKED = {"max_batch_tokens": 23, "max_running": 16}
TIGHT = {"cache_tokens": 5 * 64}


def prompt(length, seed=0):
    return random.Random(seed).choices(range(2, VOCAB), k=length)


# ---- queues ------------------------------------------------------------------------------------------------------


def test_priority_and_ageing_decide_who_is_first(core):
    driver = Driver(core(max_running=1, aging_seconds=10.0))
    driver.add(
        request("late", prompt(5), arrival_time=103.0),
        request("urgent", prompt(5), arrival_time=104.0, priority=-2),
        request("early", prompt(5), arrival_time=100.0),
        request("patient", prompt(5), arrival_time=80.0, priority=1),
        request("idle", prompt(5), arrival_time=99.0, priority=1),
    )
    got = driver.finish()
    order = sorted(got, key=lambda key: got[key].first_step)
    assert [name for name, _ in order] == ["urgent", "patient", "early", "late", "idle"]


def test_a_full_queue_refuses(core):
    driver = Driver(core(max_running=1, max_waiting=2))
    driver.add(*(request(name, prompt(5)) for name in "abc"))
    got = driver.finish()
    last = got["c", 0].last
    assert (last.error_kind, last.error) == (
        ErrorKind.OVERLOADED,
        "The queue is full: 2 requests are waiting (max_waiting is 2); try again later.",
    )
    assert [got[name, 0].reason for name in "ab"] == [FinishReason.LENGTH] * 2


@pytest.mark.parametrize("prefix", [True, False])
def test_siblings_of_an_accepted_request_are_never_refused(core, prefix):
    """They are told apart from new requests: half an answer helps nobody."""
    driver = Driver(core(max_running=1, max_waiting=1, enable_prefix_cache=prefix))
    driver.add(request("a", prompt(70), SAMPLED, n=4))
    driver.step()
    driver.add(request("b", prompt(5)))
    got = driver.finish()
    assert all(got["a", index].reason is FinishReason.LENGTH for index in range(4))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_id_in_use_is_refused(core, steps):
    """Whether its first choice waits, runs or is gone already."""
    engine = core()
    driver = Driver(engine)
    driver.add(request("a", prompt(5), SAMPLED, n=2))
    for _ in range(steps):
        driver.step()
    if steps == 4:
        engine.abort_child("a", 0)
        driver.step()
    engine.add(request("a", prompt(9)))
    (refusal,) = engine._outputs[-1:]
    assert (refusal.error_kind, refusal.error) == (ErrorKind.INVALID, "Request id a is already in use.")
    engine._outputs.pop()
    driver.finish()
    assert answer(engine, request("a", prompt(9))).reason is FinishReason.LENGTH, "free again"


# ---- the prefix cache --------------------------------------------------------------------------------------------


def test_salts_separate(core):
    engine = core()
    ids = prompt(130)

    def cached(salt):
        got = Driver(engine)
        got.add(request("a", ids, cache_salt=salt))
        return sum(output.num_cached_tokens for _ in iter(lambda: engine.has_work(), False) for output in got.step())

    assert [cached(salt) for salt in (None, None, "x", "y", "x", "", None)] == [0, 128, 0, 0, 128, 0, 128]


def test_reset_prefix_cache(core):
    engine = core()
    driver = Driver(engine)
    driver.add(request("a", prompt(130)))
    driver.step()
    assert not engine.reset_prefix_cache()
    driver.finish()
    hits = engine.stats().prefix_hit_tokens
    assert engine.reset_prefix_cache()
    run(engine, request("b", prompt(130)))
    assert engine.stats().prefix_hit_tokens == hits
    run(engine, request("c", prompt(130)))
    assert engine.stats().prefix_hit_tokens == hits + 128


def test_siblings_share_the_prompt(core):
    engine = core()
    before = engine.stats().prefix_hit_tokens
    run(engine, request("a", prompt(130), SAMPLED, n=4))
    assert engine.stats().prefix_hit_tokens == before + 3 * 128


@pytest.mark.parametrize("block_size", [16, 48, 100])
@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
def test_other_block_sizes(core, block_size, cache_dtype):
    """Pages of the packed rows have 64 tokens whatever the block size, and any number of blocks fits them."""
    expected = answer(core(cache_dtype=cache_dtype), request("a", prompt(130), SAMPLED)).tokens
    engine = core(cache_dtype=cache_dtype, block_size=block_size, cache_tokens=7 * block_size + 300)
    for _ in range(2):
        assert answer(engine, request("a", prompt(130), SAMPLED)).tokens == expected
    assert engine.stats().prefix_hit_tokens >= 96


# ---- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, DRAFTS | TIGHT], ids=["plain", "drafts in a small cache"])
def test_counters_add_up(folder, settings):
    engine = make_core(folder, **settings)
    requests = [request(f"{i}", prompt(20 * i + 1, i), SAMPLED, n=1 + i % 3, max_tokens=30) for i in range(7)]
    got = run(engine, *requests)
    run(engine, request("bad", [VOCAB], n=2), request("stop", prompt(9), logit_bias={EOS: 100.0}, ignore_eos=False))
    stats = engine.stats()
    assert stats.prompt_tokens == sum(len(one.prompt_token_ids) * one.params.n for one in requests) + 9
    assert stats.generation_tokens == sum(len(one.tokens) for one in got.values()) + 1
    assert (stats.refused, stats.running, stats.waiting, stats.kv_blocks_used) == (1, 0, 0, 0)
    assert 0 < stats.dense_steps < stats.steps
    assert sum(stats.spec_accepted_per_position) == stats.spec_accepted_tokens <= stats.spec_draft_tokens
    assert stats.spec_accepted_per_position == sorted(stats.spec_accepted_per_position, reverse=True)
    assert (stats.spec_drafts > 0) == (stats.spec_accepted_tokens > 0) == bool(settings)
    assert stats.spec_drafts <= stats.spec_draft_tokens <= 3 * stats.spec_drafts
    assert (stats.preemptions > 0) == bool(settings)
    assert stats.preemptions == sum(one.last.timing.preemptions for one in got.values())
    assert sum(one.last.num_cached_tokens for one in got.values()) <= stats.prefix_hit_tokens


def test_timing_is_in_order(core):
    got = run(core(**CHUNKED), *(request(f"{i}", prompt(40, i)) for i in range(4)))
    for one in got.values():
        t = one.last.timing
        assert 0 < t.arrived <= t.scheduled <= t.first_token <= t.finished


# ---- what goes wrong in one request stays there ------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, DRAFTS], ids=["plain", "drafts"])
@pytest.mark.parametrize("at", [0, 3])
def test_nan_fails_its_request_alone(core, monkeypatch, settings, at):
    engine = core(**settings)
    names = ["a", "bad", "b"]
    expected = {name: answer(engine, request(name, prompt(20, 1), SAMPLED, seed=ord(name[0]))).tokens for name in names}
    forward = engine.runner.forward

    def broken(items):
        hidden = forward(items)
        for item, part in zip(items, hidden):
            if item.request.request_id == "bad" and len(item.request.output_token_ids) >= at:
                with torch.inference_mode():
                    part.fill_(float("nan"))
        return hidden

    monkeypatch.setattr(engine.runner, "forward", broken)
    got = run(engine, *(request(name, prompt(20, 1), SAMPLED, seed=ord(name[0])) for name in names))
    bad = got["bad", 0]
    assert bad.last.error_kind is ErrorKind.INTERNAL
    assert "the model's logits hold NaN" in bad.last.error
    assert bad.tokens == expected["bad"][: len(bad.tokens)]
    assert at <= len(bad.tokens) <= at + 3
    for name in "ab":
        assert (got[name, 0].reason, got[name, 0].tokens) == (FinishReason.LENGTH, expected[name])


@pytest.mark.parametrize("where", [0, 5])
def test_spoiled_cache_rows_do_not_reach_the_neighbours(core, where):
    """Requests of different lengths decode together: holes in the shorter ones' tables must not read foreign rows."""
    engine = core()
    lengths = {"bad": 40, "a": 7, "b": 100, "c": 20}
    expected = {name: answer(engine, request(name, prompt(n, n), SAMPLED)).tokens for name, n in lengths.items()}
    assert engine.reset_prefix_cache()
    driver = Driver(engine)
    driver.add(*(request(name, prompt(n, n), SAMPLED) for name, n in lengths.items()))
    driver.step()
    (bad,) = [r for r in engine.scheduler.running if r.request_id == "bad"]
    for cache in engine.runner.caches:
        cache.mla[bad.block_table[0] * 64 + where] = float("nan")
    got = driver.finish()
    assert got["bad", 0].reason is FinishReason.ERROR
    for name in "abc":
        assert got[name, 0].tokens == expected[name]
    again = run(engine, *(request(name, prompt(n, n), SAMPLED) for name, n in lengths.items()))
    assert all(again[name, 0].tokens == expected[name] for name in lengths), "new owners overwrite what they read"


def test_rows_of_a_failed_request_are_not_shared(core, monkeypatch):
    """A fault that passes must not fail later requests with the same prefix."""
    engine = core()
    long = prompt(200, 5)
    expected = answer(engine, request("x", long, SAMPLED)).tokens
    assert engine.reset_prefix_cache()
    forward = engine.runner.forward

    def broken(items):
        hidden = forward(items)
        with torch.inference_mode():
            for cache in engine.runner.caches:
                cache.mla[: engine.runner.num_blocks * 64].fill_(float("nan"))
            for part in hidden:
                part.fill_(float("nan"))
        return hidden

    monkeypatch.setattr(engine.runner, "forward", broken)
    assert answer(engine, request("bad", long, SAMPLED)).reason is FinishReason.ERROR
    monkeypatch.setattr(engine.runner, "forward", forward)
    after = answer(engine, request("x", long, SAMPLED))
    assert after.reason is FinishReason.LENGTH
    assert after.tokens == expected


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_waiting": 0}, "max_waiting must be at least 1, got 0."),
        ({"block_size": 0}, "block_size must be at least 1, got 0."),
        ({"cache_tokens": 0}, "cache_tokens must be at least 1, got 0."),
        ({"max_model_len": 1}, "max_model_len must be at least 2, for one token of prompt and one of output, got 1."),
        ({"aging_seconds": 0.0}, "aging_seconds must be above 0 (inf switches ageing off), got 0.0."),
        ({"aging_seconds": float("nan")}, "aging_seconds must be above 0 (inf switches ageing off), got nan."),
        ({"speculative_tokens": 8}, "speculative_tokens must be between 0 and 7, got 8."),
        ({"speculative_tokens": -1}, "speculative_tokens must be between 0 and 7, got -1."),
        (
            {"max_running": 9, "max_batch_tokens": 8},
            "max_running (9) must be at most max_batch_tokens (8): each running request needs one token of every "
            "step's budget.",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError) as caught:
        EngineConfig(model="-", **settings)
    assert str(caught.value) == text


def test_operators_can_be_chosen(folder, core):
    engine = make_core(folder, operators={"*": "reference"})
    assert set(engine.runner.ops.chosen.values()) == {"reference"}
    wanted = request("a", prompt(60), SAMPLED)
    assert answer(engine, wanted).tokens == answer(core(), wanted).tokens
    with pytest.raises(ValueError, match="operator 'mla_decode' has no implementation 'magic'"):
        make_core(folder, operators={"mla_decode": "magic"})


def test_limits_that_do_not_fit_the_model(folder):
    with pytest.raises(
        ValueError, match=r"^max_model_len \(2000\) is more than the model was made for \(max_pos.* is 1024\)"
    ):
        make_core(folder, max_model_len=2000)
    with pytest.raises(ValueError) as caught:
        make_core(folder, max_model_len=200, cache_tokens=128)
    assert str(caught.value) == (
        "max_model_len (200) is more than the cache holds (128 tokens); raise cache_tokens or lower max_model_len."
    )
    with pytest.raises(
        ValueError, match=r"^a cache of \d+ tokens needs .* GiB .* are free; lower cache_tokens or use the"
    ):
        make_core(folder, cache_tokens=1 << 50)


def test_every_character_has_a_token():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == VOCAB - 2
