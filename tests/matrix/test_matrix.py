"""Features combined two by two: every pair gives the tokens of the plain run.

The plain run is one request alone: no prefix cache, the whole prompt in one step, no drafts, weights already
dequantised. In fp32 arithmetic tokens are identical, greedy and sampled alike (a draw depends on the request's seed
and position only); in bf16 the log-probabilities of the common tokens may drift by a bounded amount.
"""

import itertools
import random

import msgspec
import pytest

from tests.tiny import CONFIG, write_checkpoint
from tilery.engine.config import EngineConfig
from tilery.engine.core import EngineCore
from tilery.engine.messages import AddRequest, FinishReason, SamplingParams

FEATURES = ("prefix", "chunked", "preemption", "mtp", "abort", "n", "fp8-weights")
PAIRS = list(itertools.combinations(FEATURES, 2))
BF16_DRIFT = 0.1
"""Largest difference of a common token's log-probability in bf16 (nats)."""

draw = random.Random(7)
SHARED = draw.choices(range(2, CONFIG["vocab_size"]), k=70)
PROMPTS = [
    SHARED + draw.choices(range(2, CONFIG["vocab_size"]), k=50),  # beyond index_topk: sparse; soon needs a third block
    SHARED + draw.choices(range(2, CONFIG["vocab_size"]), k=54),
    draw.choices(range(2, CONFIG["vocab_size"]), k=9),  # crosses index_topk while it decodes
    SHARED[:64],
    draw.choices(range(2, CONFIG["vocab_size"]), k=126),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True, logprobs=0)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=36, ignore_eos=True, logprobs=0)
MIXED = [GREEDY, SAMPLED, GREEDY, SAMPLED, SAMPLED]
ALL_GREEDY = [GREEDY] * len(PROMPTS)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {fp8: write_checkpoint(folder / f"fp8-{fp8}", fp8=fp8) for fp8 in (False, True)}


@pytest.fixture(scope="session")
def dense_checkpoints(tmp_path_factory):
    """The same weights with an index_topk that no context here exceeds.

    Random weights give flat index scores: in bf16 a rounding then flips which key is selected, and the output jumps by
    any amount. The bound on drift is for these; sparse bf16 is held to it with trained weights (`test_bundled.py`).
    """
    folder = tmp_path_factory.mktemp("dense")
    return {fp8: write_checkpoint(folder / f"fp8-{fp8}", fp8=fp8, index_topk=512) for fp8 in (False, True)}


def engine(folder, **settings):
    base = {"dtype": "float32", "cache_tokens": 4096, "progress": False, "enable_prefix_cache": False, "threads": 1}
    base["cache_dtype"] = "model"
    return EngineCore(msgspec.convert({"model": str(folder), **base, **settings}, EngineConfig))


def drive(core, requests, abort_after=None):
    """Runs requests to their end; {(id, index): (token ids, log-probabilities)}. `abort_after` aborts ids mid-way."""
    got = {}
    for request in requests:
        core.add(request)
    steps = 0
    while core.has_work():
        for output in core.step():
            tokens, logprobs = got.setdefault((output.request_id, output.index), ([], []))
            tokens += output.token_ids
            logprobs += [row.logprob for row in output.logprobs or []]
            assert output.finish_reason is not FinishReason.ERROR, output.error
        steps += 1
        core.check()
        if abort_after and steps == 4:
            core.abort(abort_after)
    assert core.stats().kv_blocks_used == 0
    return got


def plain(folder, params, **settings):
    core = engine(folder, **settings)
    return [
        drive(core, [AddRequest(request_id="x", prompt_token_ids=prompt, params=one)])["x", 0]
        for prompt, one in zip(PROMPTS, params)
    ]


def combined(checkpoints, features, params, **settings):
    """All prompts at once with these features on; the results in the prompts' order, and the engine."""
    if "prefix" in features:
        settings["enable_prefix_cache"] = True
    if "chunked" in features:
        settings |= {"max_batch_tokens": 23, "max_running": 16}
    if "preemption" in features:
        settings["cache_tokens"] = 7 * 64
    if "mtp" in features:
        settings |= {"speculative_tokens": 2, "speculative_auto_off": False}
    core = engine(checkpoints["fp8-weights" in features], **settings)

    def requests(name, choices=1, change=list):
        return [
            AddRequest(
                request_id=f"{name}{i}", prompt_token_ids=change(prompt), params=msgspec.structs.replace(one, n=choices)
            )
            for i, (prompt, one) in enumerate(zip(PROMPTS, params))
        ]

    if "prefix" in features:
        drive(core, requests("warm"))
    choices = 3 if "n" in features else 1
    measured = requests("r", choices)
    neighbours = requests("a", 1, lambda prompt: prompt[::-1]) if "abort" in features else []
    mixed = [r for pair in itertools.zip_longest(neighbours, measured) for r in pair if r is not None]
    got = drive(core, mixed, [r.request_id for r in neighbours])
    return [[got[f"r{i}", index] for index in range(choices)] for i in range(len(PROMPTS))], core


def really_on(features, stats):
    """The combination exercised what it names."""
    if "prefix" in features:
        assert stats.prefix_hit_tokens > 0
    if "preemption" in features:
        assert stats.preemptions > 0
    if "mtp" in features:
        assert stats.spec_drafts > 0


@pytest.fixture(scope="session")
def expected(checkpoints):
    made = {}

    def get(params, which=checkpoints, **settings):
        key = (which[False], tuple(p.temperature for p in params), *sorted(settings.items()))
        if key not in made:
            made[key] = plain(which[False], params, **settings)
        return made[key]

    return get


@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
@pytest.mark.parametrize("features", PAIRS, ids="+".join)
def test_pair_in_fp32(checkpoints, expected, features, cache_dtype):
    got, core = combined(checkpoints, features, MIXED, cache_dtype=cache_dtype)
    for choices, one, (tokens, _) in zip(got, MIXED, expected(MIXED, cache_dtype=cache_dtype)):
        assert choices[0][0] == tokens
        if one.greedy:
            assert all(choice[0] == tokens for choice in choices)
        elif len(choices) > 1:
            assert choices[1][0] != choices[2][0]
    really_on(features, core.stats())


@pytest.mark.parametrize("features", PAIRS, ids="+".join)
def test_pair_in_bf16(dense_checkpoints, expected, features):
    got, core = combined(dense_checkpoints, features, ALL_GREEDY, dtype="bfloat16")
    for choices, (tokens, logprobs) in zip(got, expected(ALL_GREEDY, dense_checkpoints, dtype="bfloat16")):
        for chosen, values in choices:
            common = next((i for i, (a, b) in enumerate(zip(chosen, tokens)) if a != b), len(tokens))
            assert common > 0
            drift = max(abs(a - b) for a, b in zip(values[:common], logprobs))
            assert drift < BF16_DRIFT
            if common < len(tokens):  # the paths part only where two tokens were about equally likely
                assert abs(values[common] - logprobs[common]) < BF16_DRIFT
    really_on(features, core.stats())


@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
def test_everything_at_once(checkpoints, expected, cache_dtype):
    got, core = combined(checkpoints, FEATURES, MIXED, cache_dtype=cache_dtype)
    for choices, (tokens, _) in zip(got, expected(MIXED, cache_dtype=cache_dtype)):
        assert choices[0][0] == tokens
    really_on(FEATURES, core.stats())


def test_drafts_are_sometimes_accepted(checkpoints, expected):
    """Random MTP weights agree with the model now and then; without that the mtp column would prove little."""
    got, core = combined(checkpoints, ("mtp",), MIXED)
    assert [choices[0][0] for choices in got] == [tokens for tokens, _ in expected(MIXED)]
    assert core.stats().spec_accepted_tokens > 0
