"""The engine as its client sees it: every way a request can end, what is said about its tokens, and nothing unanswered.

Log-probabilities are compared with a forward pass of the model over the whole text, outside the engine.
"""

import itertools
import json
import random

import pytest
import torch

from tests.engine.support import EOS, VOCAB, Driver, answer, make_core, request, run, text_of, write_model
from tilery.engine.config import EngineConfig
from tilery.engine.messages import ErrorKind, FinishReason, SamplingParams, StructuredKind, StructuredOutput
from tilery.models import cache as model_cache
from tilery.models.loader import load_model
from tilery.models.step import Chunk, build_step
from tilery.ops import registry

TOLERANCE = 2e-4
SAMPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True)
DRAFTS = {"speculative_tokens": 3}
CHUNKED = {"max_batch_tokens": 23, "max_running": 16}
TIGHT = {"cache_tokens": 5 * 64}


def prompt(length, seed=0):
    return random.Random(seed).choices(range(2, VOCAB), k=length)


@pytest.fixture(scope="module")
def oracle(folder):
    """token ids -> log-probabilities [T, V] of what follows each, in one pass.

    Whatever the arithmetic's rounding, it agrees with the engine unless two positions are tied for the last place of a
    sparse selection; the prompts' seeds were chosen so that none are.
    """
    model = load_model(folder, registry.select(overrides={"*": "reference"}), torch.float32)

    def logprobs(tokens):
        blocks = -(-len(tokens) // 64)
        caches = model_cache.allocate(model.config, blocks * 64, torch.float32, model.cache_layers)
        with torch.inference_mode():
            step = build_step([Chunk(tokens, 0, range(blocks))], 64)
            return model.logits(model.forward(step, caches)).log_softmax(1)

    return logprobs


def same_record(record, token, expected_V, alternatives):
    """One TokenLogprobs against the log-probabilities of its position."""
    assert record.token_id == token
    assert abs(record.logprob - expected_V[token].item()) < TOLERANCE
    above = (expected_V > expected_V[token] + TOLERANCE).sum().item()
    level = (expected_V >= expected_V[token] - TOLERANCE).sum().item()
    assert above + 1 <= record.rank <= level
    best = expected_V.sort(descending=True).values[:alternatives]
    assert len(record.top_ids) == len(record.top_logprobs) == min(alternatives, VOCAB)
    for id, value, largest in zip(record.top_ids, record.top_logprobs, best.tolist()):
        assert abs(value - largest) < TOLERANCE
        assert abs(expected_V[id].item() - value) < TOLERANCE


# ---- how requests end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, DRAFTS], ids=["plain", "drafts"])
def test_stop_token_ids(core, settings):
    engine = core(**settings)
    free = answer(engine, request("a", prompt(9), max_tokens=20)).tokens
    stop = free[12]
    end = free.index(stop)
    got = answer(engine, request("b", prompt(9), max_tokens=20, stop_token_ids=(stop, 10_000)))
    assert (got.tokens, got.reason, got.last.stop_reason) == (free[: end + 1], FinishReason.STOP, stop)


@pytest.mark.parametrize("settings", [{}, DRAFTS], ids=["plain", "drafts"])
def test_eos_ignore_eos_and_min_tokens(core, settings):
    engine = core(**settings)
    likely_eos = {EOS: 100.0}
    got = answer(engine, request("a", prompt(9), logit_bias=likely_eos, ignore_eos=False))
    assert (got.tokens, got.reason, got.last.stop_reason) == ([EOS], FinishReason.STOP, None)
    got = answer(engine, request("b", prompt(9), logit_bias=likely_eos, ignore_eos=True))
    assert (got.tokens, got.reason) == ([EOS] * 8, FinishReason.LENGTH)
    got = answer(engine, request("c", prompt(9), logit_bias=likely_eos, ignore_eos=False, min_tokens=5))
    assert EOS not in got.tokens[:5]
    assert (got.tokens[5:], got.reason) == ([EOS], FinishReason.STOP)
    got = answer(engine, request("d", prompt(9), logit_bias=likely_eos, ignore_eos=True, stop_token_ids=(EOS,)))
    assert (got.tokens, got.last.stop_reason) == ([EOS], EOS)


@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
def test_max_tokens_none_runs_to_the_context_limit(core, drafts):
    """Drafts near the limit neither overshoot it nor change the tokens."""
    plain = answer(core(max_model_len=80), request("a", prompt(60), max_tokens=None))
    assert (len(plain.tokens), plain.reason) == (20, FinishReason.LENGTH)
    got = answer(core(max_model_len=80, speculative_tokens=drafts), request("a", prompt(60), max_tokens=None))
    assert (got.tokens, got.reason) == (plain.tokens, FinishReason.LENGTH)
    got = answer(core(max_model_len=80, speculative_tokens=drafts), request("b", prompt(79), max_tokens=None))
    assert (len(got.tokens), got.reason) == (1, FinishReason.LENGTH)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_cache_of_one_block(core, drafts):
    """The context limit the client is told is one that the cache can hold; the block size is rounded up to."""
    engine = core(cache_tokens=10, speculative_tokens=drafts)
    assert (engine.info.num_blocks, engine.info.max_model_len) == (1, 64)
    got = run(engine, request("a", prompt(50), max_tokens=None), request("b", prompt(60, 1), max_tokens=None))
    assert [len(got[name, 0].tokens) for name in "ab"] == [14, 4]
    refused = answer(engine, request("c", prompt(64)))
    assert "the context limit is 64 tokens" in refused.last.error


@pytest.mark.parametrize(
    ("ids", "kind", "text"),
    [
        ([], ErrorKind.INVALID, "The prompt is empty; send at least one token."),
        (
            prompt(80),
            ErrorKind.INVALID,
            "The prompt has 80 tokens, but the context limit is 80 tokens and at least one must be left for the "
            "output; shorten the prompt.",
        ),
        ([2, VOCAB, 3], ErrorKind.INVALID, "The prompt holds token 48, but token ids go from 0 to 47."),
        ([2, -1], ErrorKind.INVALID, "The prompt holds token -1, but token ids go from 0 to 47."),
        ([2, 2**40], ErrorKind.INVALID, "The prompt holds token 1099511627776, but token ids go from 0 to 47."),
    ],
    ids=["empty", "as long as the context", "beyond the vocabulary", "negative", "beyond 32 bits"],
)
def test_refusals(core, ids, kind, text):
    engine = core(max_model_len=80)
    before = engine.stats().refused
    got = run(engine, request("bad", ids, n=3), request("good", prompt(5)))
    for index in range(3):
        last = got["bad", index].last
        assert (last.finish_reason, last.error_kind, last.error) == (FinishReason.ERROR, kind, text)
    assert got["good", 0].reason is FinishReason.LENGTH
    assert engine.stats().refused == before + 1


def test_a_bias_on_an_unknown_token_is_refused(core):
    got = answer(core(), request("a", prompt(5), logit_bias={VOCAB: 1.0}))
    assert got.last.error_kind is ErrorKind.INVALID
    assert got.last.error == "logit_bias names token 48, but token ids go from 0 to 47."


# ---- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, CHUNKED, DRAFTS, TIGHT | DRAFTS], ids=["plain", "chunked", "drafts", "tight"])
def test_logprobs_are_those_of_the_model(core, oracle, settings):
    engine = core(**settings)
    params = [SAMPLED, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, presence_penalty=1.0)]
    prompts = [prompt(length, length) for length in (3, 40, 62, 100)]
    requests = [
        request(f"{i}-{j}", tokens, one, logprobs=j * 3)
        for i, tokens in enumerate(prompts)
        for j, one in enumerate(params)
    ]
    got = run(engine, *requests)
    for one in requests:
        tokens, records = got[one.request_id, 0].tokens, got[one.request_id, 0].logprobs
        assert len(tokens) == len(records) == 24
        expected = oracle(one.prompt_token_ids + tokens)[len(one.prompt_token_ids) - 1 :]
        for token, record, line in zip(tokens, records, expected):
            same_record(record, token, line, one.params.logprobs)


@pytest.mark.parametrize("kind", ["whole", "chunked", "prefix cache", "preempted", "drafts"])
def test_prompt_logprobs(core, oracle, kind):
    settings = {"chunked": CHUNKED, "preempted": TIGHT, "drafts": DRAFTS | CHUNKED}.get(kind, {})
    engine = core(**settings)
    prompts = [prompt(126, 1), prompt(120, 5), prompt(130, 4), prompt(1), prompt(2)]
    if kind == "prefix cache":
        run(engine, *(request(f"w{i}", tokens) for i, tokens in enumerate(prompts)))
    preemptions = engine.stats().preemptions
    requests = [
        request(f"r{i}", tokens, SAMPLED, max_tokens=40, prompt_logprobs=i, n=1 + i % 2)
        for i, tokens in enumerate(prompts)
    ]
    got = run(engine, *requests)
    for one in requests:
        expected = oracle(one.prompt_token_ids)
        for index in range(one.params.n):
            records = got[one.request_id, index].prompt_logprobs
            assert records[0] is None
            assert len(records) == len(one.prompt_token_ids)
            for token, record, line in zip(one.prompt_token_ids[1:], records[1:], expected):
                same_record(record, token, line, one.params.prompt_logprobs)
    assert (engine.stats().preemptions > preemptions) == (kind == "preempted")


def test_prompt_logprobs_are_whole_or_absent(core):
    """Aborted while its prompt is read, a request has none to show."""
    driver = Driver(core(**CHUNKED))
    driver.add(request("a", prompt(60), prompt_logprobs=1))
    driver.step()
    driver.core.abort(["a"])
    assert driver.finish()["a", 0].prompt_logprobs is None


# ---- sampling through the core -----------------------------------------------------------------------------------


def test_choices_and_seeds(core, folder):
    first = run(core(), request("a", prompt(70), SAMPLED, n=3))
    other_engine = run(make_core(folder, seed=3), request("x", prompt(70), SAMPLED, n=3))
    alone = answer(core(), request("b", prompt(70), SAMPLED))
    tokens = [first["a", index].tokens for index in range(3)]
    assert tokens == [other_engine["x", index].tokens for index in range(3)]
    assert tokens[0] == alone.tokens
    assert len({tuple(one) for one in tokens}) == 3
    assert tokens[0] != answer(core(), request("c", prompt(70), SAMPLED, seed=6)).tokens


def test_unseeded_requests_repeat_only_with_an_engine_seed(folder):
    def unseeded(seed):
        got = run(make_core(folder, seed=seed), *(request(name, prompt(5), SAMPLED, seed=None) for name in "ab"))
        return [got[name, 0].tokens for name in "ab"]

    assert unseeded(1) == unseeded(1) != unseeded(2)
    assert len({tuple(tokens) for tokens in unseeded(1)}) == 2
    assert unseeded(0) != unseeded(0)


EDITS = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": {7: 3.0, 9: -100.0}},
    "truncation": {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {EOS: 8.0}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_logits_with_drafts_on_and_off(core, edit):
    def tokens(engine, changes):
        requests = [request(f"{i}", prompt(20 + i, i), SAMPLED, **{"seed": i, **changes}) for i in range(4)]
        requests += [request(f"g{i}", prompt(20 + i, i), SAMPLED, **{"temperature": 0.0, **changes}) for i in range(2)]
        got = run(engine, *requests)
        return [got[one.request_id, 0].tokens for one in requests]

    edited = tokens(core(), EDITS[edit])
    assert edited == tokens(core(**DRAFTS), EDITS[edit])
    assert edited != tokens(core(), {})


def test_greedy_with_penalties_against_the_model(core, oracle):
    ids, out = prompt(12), []
    got = answer(core(**DRAFTS), request("a", ids, max_tokens=12, frequency_penalty=0.7, presence_penalty=0.4)).tokens
    for _ in range(12):
        logits = oracle(ids + out)[-1].clone()
        for token in set(out):
            logits[token] -= 0.7 * out.count(token) + 0.4
        out.append(logits.argmax().item())
    assert got == out


def test_bf16(core):
    engine = core(dtype="bfloat16", **DRAFTS)
    got = run(engine, *(request(f"{i}", prompt(30 * i + 1, i), SAMPLED, logprobs=2) for i in range(4)))
    for one in got.values():
        assert (len(one.tokens), one.reason) == (24, FinishReason.LENGTH)
        assert all(-30 < record.logprob <= 0 for record in one.logprobs)


# ---- structured output -------------------------------------------------------------------------------------------


def structured(kind, spec):
    return StructuredOutput(kind=StructuredKind(kind), spec=spec if isinstance(spec, str) else json.dumps(spec))


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "spec", "valid"),
    [
        (
            "json_schema",
            SCHEMA,
            lambda text: 0 <= json.loads(text)["a"] <= 99 and json.loads(text)["b"] in ("x", "yes"),
        ),
        ("regex", "[a-c]{3,6}-[0-9]+", lambda text: len(text) >= 5 and set(text) <= set("abc-0123456789")),
        ("choice", ["yes", "yesterday", "no"], lambda text: text in ("yes", "yesterday", "no")),
    ],
    ids=["json_schema", "regex", "choice"],
)
def test_structured_output(core, kind, spec, valid):
    def answers(engine):
        requests = [
            request(f"{i}", prompt(9 + i, i), SAMPLED, structured=structured(kind, spec), ignore_eos=False,
                    max_tokens=60, seed=i, temperature=0.0 if i == 3 else 3.0, n=1 + i % 2, logit_bias={EOS: 4.0})
            for i in range(4)
        ]  # fmt: skip
        return run(engine, request("free", prompt(9), SAMPLED), *requests)

    plain, drafted = answers(core()), answers(core(**DRAFTS))
    for key, one in plain.items():
        assert drafted[key].tokens == one.tokens
        if key[0] != "free":
            assert (one.reason, one.tokens[-1]) == (FinishReason.STOP, EOS)
            assert valid(text_of(one.tokens)), text_of(one.tokens)
    assert len({text_of(one.tokens) for key, one in plain.items() if key[0] != "free"}) > 1


@pytest.mark.parametrize(
    ("kind", "spec", "text"),
    [
        ("json_schema", "{", "JSON schema is not valid JSON"),
        ("regex", "(", "regex cannot be used"),
        ("choice", [], "no alter"),
    ],
)
def test_a_bad_grammar_is_refused_and_the_engine_goes_on(core, kind, spec, text):
    got = run(core(), request("bad", prompt(5), structured=structured(kind, spec), n=2), request("good", prompt(5)))
    for index in range(2):
        assert got["bad", index].last.error_kind is ErrorKind.INVALID
        assert text in got["bad", index].last.error
    assert got["good", 0].reason is FinishReason.LENGTH


def test_structured_output_without_a_tokenizer_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    got = answer(make_core(tmp_path), request("a", prompt(5), structured=structured("regex", "a")))
    assert got.last.error == "Structured output needs the model's tokenizer.json, which its folder lacks."


def test_a_text_that_the_grammar_cannot_follow_fails_alone(core, monkeypatch):
    from tilery.engine.grammar import GrammarError, GrammarState

    calls = {"consume": 0, "masks_for_drafts": 0}

    def fail_at(name, number):
        true = getattr(GrammarState, name)

        def method(self, tokens):
            calls[name] += 1
            if calls[name] == number:
                raise GrammarError("too much work")
            return true(self, tokens)

        return method

    for name in calls:
        with monkeypatch.context() as patch:
            patch.setattr(GrammarState, name, fail_at(name, 3))
            got = run(
                core(),
                request("bad", prompt(5), structured=structured("regex", "[a-z]{50}")),
                request("good", prompt(5)),
            )
        assert (got["bad", 0].last.error_kind, got["bad", 0].last.error) == (ErrorKind.INTERNAL, "too much work")
        assert len(got["bad", 0].tokens) in (2, 3)
        assert got["good", 0].reason is FinishReason.LENGTH


def test_abort_while_the_grammar_compiles(core, monkeypatch):
    from concurrent.futures import Future

    from tilery.engine.grammar import GrammarCompiler

    never = Future()
    monkeypatch.setattr(GrammarCompiler, "submit", lambda self, structured: never)
    driver = Driver(core())
    driver.add(request("a", prompt(5), structured=structured("regex", "a"), n=3), request("b", prompt(5)))
    driver.step()
    assert driver.core.stats().waiting == 1
    driver.core.abort_child("a", 1)
    driver.step()
    assert driver.answers["a", 1].reason is FinishReason.ABORT
    driver.core.abort(["a"])
    got = driver.finish()
    assert [got["a", index].reason for index in range(3)] == [FinishReason.ABORT] * 3
    assert got["b", 0].reason is FinishReason.LENGTH


def test_a_broken_compiler_fails_its_request_alone(core, monkeypatch):
    from concurrent.futures import Future

    from tilery.engine.grammar import GrammarCompiler

    broken = Future()
    broken.set_exception(RuntimeError("can't start new thread"))
    monkeypatch.setattr(GrammarCompiler, "submit", lambda self, structured: broken)
    got = answer(core(), request("a", prompt(5), structured=structured("regex", "a")))
    assert (got.last.error_kind, got.last.error) == (ErrorKind.INTERNAL, "RuntimeError: can't start new thread")


# ---- aborts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [CHUNKED, CHUNKED | DRAFTS], ids=["plain", "drafts"])
def test_abort_in_every_state(core, settings):
    expected = answer(core(), request("x", prompt(30), max_tokens=20)).tokens
    driver = Driver(core(**settings, seed=1))
    driver.core.scheduler.config = EngineConfig(model="-", max_running=3, max_batch_tokens=23)
    try:
        driver.add(
            request("decoding", prompt(4), max_tokens=200),
            request("kept", prompt(30), max_tokens=20),
            request("prefilling", prompt(400)),
            request("waiting", prompt(9)),
            request("siblings", prompt(9), n=3),
        )
        for _ in range(6):
            driver.step()
        states = {r.request_id: r for r in (*driver.core.scheduler.running, *driver.core.scheduler.waiting)}
        assert len(states["decoding"].output_token_ids) > 1
        assert 0 < states["prefilling"].num_computed < 400
        assert states["waiting"].num_computed == 0
        driver.core.abort(["decoding", "prefilling", "waiting", "siblings", "unknown"])
        driver.core.abort(["decoding"])
        got = driver.finish()
    finally:
        driver.core.scheduler.config = driver.core.config
    for key, one in got.items():
        assert one.reason is (FinishReason.LENGTH if key[0] == "kept" else FinishReason.ABORT)
        assert one.last.timing is not None or key == ("siblings", one.last.index)
    assert got["kept", 0].tokens == expected
    assert len(got["decoding", 0].tokens) > 1


def test_abort_child(core):
    expected = run(core(), request("x", prompt(70), SAMPLED, n=3))
    for victim, steps in itertools.product(range(3), (0, 1, 5)):
        driver = Driver(core())
        driver.add(request("a", prompt(70), SAMPLED, n=3))
        for _ in range(steps):
            driver.step()
        driver.core.abort_child("a", victim)
        driver.core.abort_child("a", victim)
        got = driver.finish()
        for index in range(3):
            assert got["a", index].reason is (FinishReason.ABORT if index == victim else FinishReason.LENGTH)
            whole = expected["x", index].tokens
            assert got["a", index].tokens == (whole[: len(got["a", index].tokens)] if index == victim else whole)
