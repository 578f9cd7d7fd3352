"""The sampler against a slow reference in float64, and the promises about seeds, batches and drafts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilery.engine import sampler
from tilery.engine.messages import SamplingParams
from tilery.engine.sampler import (
    FAILED,
    SampleRow,
    SamplerState,
    accept_drafts,
    child_seed,
    prompt_logprobs,
    sample,
    uniform,
)

EOS = 1


def state_of(
    params: SamplingParams, vocab: int, seed: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> SamplerState:
    state = SamplerState(params, seed=seed, prompt_token_ids=prompt, eos_token_ids=[EOS], vocab_size=vocab)
    state.append(output)
    state.check()
    return state


def mask_of(tokens: Sequence[int], vocab: int) -> np.ndarray:
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def reference(
    logits: np.ndarray,
    p: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> tuple[np.ndarray, float]:
    """Probabilities by the documented order, token by token; and how far the kept set is from changing by rounding."""
    x = [float(value) for value in logits]
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    if allowed is not None:
        x = [value if i in allowed else -math.inf for i, value in enumerate(x)]
    stops = {*p.stop_token_ids, *([] if p.ignore_eos else [EOS])}
    if len(output) < p.min_tokens and any(value > -math.inf for i, value in enumerate(x) if i not in stops):
        x = [-math.inf if i in stops else value for i, value in enumerate(x)]
    for token in {*prompt, *output}:
        if p.repetition_penalty != 1.0:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * list(output).count(token) + p.presence_penalty
    if p.greedy:
        return np.eye(len(x))[x.index(max(x))], 1.0
    top = max(x)
    w = [math.exp((value - top) / p.temperature) for value in x]
    margin = min([1.0, *(abs(value / p.min_p - 1) for value in w if p.min_p > 0)])
    kept = [i for i, value in enumerate(w) if value >= p.min_p and value > 0]
    kept.sort(key=lambda i: (-w[i], i))
    # Values that differ by rounding only may be ranked either way.
    margin = min([margin, *(w[a] / w[b] - 1 for a, b in pairwise(kept) if w[a] != w[b])])
    if p.top_k > 0:
        kept = kept[: p.top_k]
    if p.top_p < 1.0:
        total, mass, prefix = sum(w[i] for i in kept), 0.0, []
        for i in kept:
            if mass >= p.top_p * total:
                break
            mass += w[i]
            prefix.append(i)
            margin = min(margin, abs(mass / total - p.top_p))
        kept = prefix
    out = np.zeros(len(x))
    out[kept] = [w[i] for i in kept]
    return out / out.sum(), margin


def chi_square_fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether counts fit the expected ones at a level of about 1e-6 (Wilson-Hilferty); cells under 5 are pooled."""
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    small = expected < 5
    cells = np.append(expected[~small], expected[small].sum())
    seen = np.append(counts[~small], counts[small].sum())
    seen, cells = seen[cells > 0], cells[cells > 0]
    df = max(1, len(cells) - 1)
    limit = df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3
    return float(((seen - cells) ** 2 / cells).sum()) < limit


# ---- the distribution --------------------------------------------------------------------------------------------

CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=1.3, top_p=0.7, top_k=12),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(temperature=1.5, min_p=0.05, top_k=20, top_p=0.9),
    SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParams(logit_bias={3: 4.0, 7: -100.0}, min_tokens=9, stop_token_ids=(5,)),
]


@pytest.mark.parametrize("params", CASES, ids=range(len(CASES)))
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    vocab, draws, prompt, output = 200, 6000, [2, 4, 4, 9], [4, 11, 11]
    logits = np.random.default_rng(1).normal(0, 2, vocab).astype(np.float32)
    expected, _ = reference(logits, params, prompt, output)
    counts = np.zeros(vocab)
    batch = 1000
    for start in range(0, draws, batch):
        rows = [SampleRow(state_of(params, vocab, start + i, prompt, output)) for i in range(batch)]
        tokens = sample(torch.from_numpy(logits).expand(batch, -1), rows).token_ids
        counts += np.bincount(tokens, minlength=vocab)
    assert chi_square_fits(counts, expected * draws)


def test_the_chi_square_test_can_fail() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(50))
    assert chi_square_fits(rng.multinomial(20_000, p), p * 20_000)
    wrong = p.copy()
    wrong[[int(p.argmax()), int(p.argmin())]] += [-0.02, 0.02]
    assert not chi_square_fits(rng.multinomial(20_000, wrong), p * 20_000)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    vocab=st.sampled_from([2, 3, 31, 130, 300]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.31, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.021, 0.3, 1.0]),
    repetition=st.sampled_from([1.0, 0.7, 1.3]),
    presence=st.sampled_from([0.0, 0.7, -0.4]),
    frequency=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_tokens_equal_the_references_inverse_cdf(
    data: st.DataObject, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float,
    repetition: float, presence: float, frequency: float, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    # Quarters make many exact ties, which must go to the lowest ids.
    logits = (np.round(rng.normal(0, 2, vocab) * 4) / 4).astype(np.float32)
    tokens = st.lists(st.integers(0, vocab - 1), max_size=6)
    prompt, output, drafts = data.draw(tokens), data.draw(tokens), data.draw(tokens)
    allowed = data.draw(st.none() | st.lists(st.integers(0, vocab - 1), min_size=1, max_size=20))
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency, min_tokens=data.draw(st.sampled_from([0, 3, 12])),
        logit_bias=data.draw(st.none() | st.dictionaries(st.integers(0, vocab - 1), st.sampled_from([-2.5, 3.0]))),
        ignore_eos=data.draw(st.booleans()), stop_token_ids=(0,),
    )  # fmt: skip
    stops = {0} if params.ignore_eos else {0, EOS}
    assume(allowed is not None or len(output) + len(drafts) >= params.min_tokens or len(stops) < vocab)
    expected, margin = reference(logits, params, prompt, output + drafts, allowed)
    assume(margin > 1e-5)
    mask = None if allowed is None else mask_of(allowed, vocab)
    row = SampleRow(state_of(params, vocab, seed, prompt, output), drafts, mask)
    result = sample(torch.from_numpy(logits)[None], [row])
    assert not result.errors
    token, u, cdf = result.token_ids[0], uniform(seed, row.step), np.cumsum(expected)
    assert expected[token] > 0
    if params.greedy:
        assert expected[token] == 1
    else:
        assert cdf[token] - expected[token] - 1e-5 <= u <= cdf[token] + 1e-5


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([5, 200, 3000]),
    top_k=st.sampled_from([0, 1, 4, 50, 2000]),
    top_p=st.sampled_from([0.2, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    spread=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_both_truncations_keep_the_same_tokens(
    seed: int, vocab: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    x = torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)).mul_(spread).bfloat16().float()
    p_SV = x.softmax(-1)
    limits = torch.tensor([[top_k or vocab, top_p, min_p]] * 2, dtype=torch.float64)
    batch = sampler._truncate_batch(p_SV, limits).numpy()
    for line, other in zip(p_SV.numpy().copy(), batch):
        sampler._truncate_row(line, top_k, top_p, min_p)
        # The two add up in different orders; a mass within rounding of top_p may differ by one token.
        assert np.count_nonzero(line != other) <= (1 if top_p < 1.0 else 0)


def test_ties_at_the_edge_of_top_k_and_top_p_keep_the_lowest_ids() -> None:
    x = torch.zeros(1, 3000)
    x[0, 2000] = 1.0
    for params, kept in (
        (SamplingParams(top_k=4), {0, 1, 2, 2000}),
        (SamplingParams(top_p=(math.e + 2.5) / (math.e + 2999)), {0, 1, 2, 2000}),
        (SamplingParams(top_p=(math.e + 1999.5) / (math.e + 2999)), {*range(2000), 2000}),
    ):
        seen = {sample(x, [SampleRow(state_of(params, 3000, seed))]).token_ids[0] for seed in range(60)}
        assert seen <= kept
        assert len(kept) > 10 or seen == kept


def test_uniform_is_uniform_across_seeds_and_steps() -> None:
    for numbers in (
        [uniform(seed, step) for seed in range(200) for step in range(100)],
        [uniform(-5, step) for step in range(20_000)],
        [uniform(seed, 3) for seed in range(20_000)],
    ):
        assert chi_square_fits(np.histogram(numbers, bins=100, range=(0, 1))[0], np.full(100, 200.0))
    pairs = [(int(uniform(7, step) * 10), int(uniform(8, step) * 10)) for step in range(20_000)]
    assert chi_square_fits(np.bincount([a * 10 + b for a, b in pairs], minlength=100), np.full(100, 200.0))
    assert len({child_seed(5, i) for i in range(100)}) == 100
    assert child_seed(5, 0) == 5


def test_the_smallest_and_largest_number_draw_a_kept_token() -> None:
    weights = torch.zeros(3, 1000)
    weights[:, [3, 500, 700]] = torch.tensor([1e-30, 1.0, 1e-30])
    weights[2] = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    top = 1 - 2.0**-52
    u = torch.tensor([0.0, top, top], dtype=torch.float64)
    assert sampler._invert(weights, u).tolist() == [3, 500, 999]  # 1e-30 vanishes beside 1


# ---- independence ------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, rng = 1100, np.random.default_rng(0)
    kinds = [*CASES, SamplingParams(temperature=0), SamplingParams(temperature=0, repetition_penalty=2.0)]
    rows, lines = [], []
    for i in range(60):
        mask = mask_of(rng.choice(vocab, 300, replace=False), vocab) if i % 4 == 0 else None
        rows.append(SampleRow(state_of(kinds[i % len(kinds)], vocab, i, [1, 2], [3] * i), [5] * (i % 3), mask))
        lines.append(rng.normal(0, 2, vocab))
    logits = torch.tensor(np.array(lines), dtype=torch.bfloat16)
    together = sample(logits, rows).token_ids
    assert together == [sample(logits[i : i + 1], rows[i : i + 1]).token_ids[0] for i in range(60)]
    order = rng.permutation(60).tolist()
    assert [together[i] for i in order] == sample(logits[order], [rows[i] for i in order]).token_ids
    monkeypatch.setitem(sampler.CHUNK_ELEMENTS, "cpu", 7 * vocab)
    assert sample(logits, rows).token_ids == together


def test_the_logits_are_left_alone_and_may_carry_gradients() -> None:
    logits = torch.randn(2, 64, requires_grad=True)
    before = logits.detach().clone()
    for params in (CASES[6], CASES[7], SamplingParams(temperature=0)):
        sample(logits, [SampleRow(state_of(params, 64, 1, [1], [2]))] * 2)
        assert torch.equal(logits, before)


# ---- speculative decoding ----------------------------------------------------------------------------------------


class Target:
    """A model whose next-token logits depend on the last two tokens."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.table = torch.randn(vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 1.5

    def logits(self, context: Sequence[int]) -> torch.Tensor:
        return self.table[context[-2], context[-1]]


def generate(
    target: Target, params: SamplingParams, seed: int, length: int, drafter: random.Random | None
) -> list[int]:
    """Plain decoding, or verification of 0 to 3 drafts a step that are right about half of the time."""
    vocab = target.table.shape[0]
    state = state_of(params, vocab, seed, [0, 1])
    output: list[int] = []
    while len(output) < length:
        drafts: list[int] = []
        for _ in range(drafter.randrange(4) if drafter else 0):
            guess = int(target.logits([0, 1, *output, *drafts]).argmax())
            drafts.append(guess if drafter and drafter.random() < 0.7 else (guess + 1) % vocab)
        rows = [SampleRow(state, drafts[:i]) for i in range(len(drafts) + 1)]
        logits = torch.stack([target.logits([0, 1, *output, *row.drafts]) for row in rows])
        new = accept_drafts(sample(logits, rows).token_ids, drafts)
        assert new[:-1] == drafts[: len(new) - 1]
        state.append(new)
        state.check()
        output += new
    return output[:length]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.8, min_tokens=5),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.2, top_k=5),
    ],
)
def test_speculative_output_equals_the_plain_run(params: SamplingParams) -> None:
    for seed in range(4):
        target = Target(seed, 12)
        plain = generate(target, params, seed, 20, None)
        assert generate(target, params, seed, 20, random.Random(seed)) == plain


def test_speculative_output_has_the_targets_distribution() -> None:
    vocab, runs = 5, 4000
    target, drafter = Target(3, vocab), random.Random(0)
    first = torch.softmax(target.logits([0, 1]), -1).double().numpy()
    second = np.stack([torch.softmax(target.logits([1, token]), -1).double().numpy() for token in range(vocab)])
    expected = (first[:, None] * second).ravel()
    states = [state_of(SamplingParams(), vocab, seed) for seed in range(runs)]
    outputs: list[list[int]] = [[] for _ in states]
    while waiting := [i for i in range(runs) if len(outputs[i]) < 2]:
        drafts = {i: [drafter.randrange(vocab) for _ in range(drafter.randrange(3))] for i in waiting}
        rows = [(i, drafts[i][:n]) for i in waiting for n in range(len(drafts[i]) + 1)]
        logits = torch.stack([target.logits([0, 1, *outputs[i], *prefix]) for i, prefix in rows])
        tokens = iter(sample(logits, [SampleRow(states[i], prefix) for i, prefix in rows]).token_ids)
        for i in waiting:
            new = accept_drafts([next(tokens) for _ in range(len(drafts[i]) + 1)], drafts[i])
            outputs[i] += new
            states[i].append(new)
    counts = np.bincount([out[0] * vocab + out[1] for out in outputs], minlength=vocab * vocab)
    assert chi_square_fits(counts, expected * runs)


def test_accept_drafts() -> None:
    assert accept_drafts([7], []) == [7]
    assert accept_drafts([1, 2, 3], [1, 2]) == [1, 2, 3]
    assert accept_drafts([1, 9, 3], [1, 2]) == [1, 9]
    assert accept_drafts([8, 2, 3], [1, 2]) == [8]
    assert accept_drafts([1, 5], [1, 2, 3]) == [1, 5]  # the grammar ruled out draft 2, so its row was the last
    assert accept_drafts([5, FAILED], [4]) == [5]
    assert accept_drafts([4, FAILED, 3], [4, 3]) == [4, FAILED]


# ---- edits -------------------------------------------------------------------------------------------------------


def test_min_tokens_blocks_eos_and_stops_until_reached() -> None:
    logits = torch.zeros(1, 10)
    logits[0, EOS], logits[0, 4], logits[0, 6] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(4,))
    assert sample(logits, [SampleRow(state_of(params, 10, output=[0]))]).token_ids == [6]
    assert sample(logits, [SampleRow(state_of(params, 10, output=[0]), [0])]).token_ids == [EOS]
    assert sample(logits, [SampleRow(state_of(params, 10, output=[0, 0]))]).token_ids == [EOS]
    ignoring = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(4,), ignore_eos=True)
    assert sample(logits, [SampleRow(state_of(ignoring, 10))]).token_ids == [EOS]


def test_a_finished_grammar_wins_over_min_tokens() -> None:
    row = SampleRow(state_of(SamplingParams(min_tokens=5), 40), mask=mask_of([EOS], 40))
    assert sample(torch.randn(1, 40), [row]).token_ids == [EOS]
    row = SampleRow(state_of(SamplingParams(min_tokens=5), 40), mask=mask_of([EOS, 33], 40))
    assert sample(torch.randn(1, 40), [row]).token_ids == [33]


def test_a_mask_shorter_than_the_vocabulary_forbids_the_rest() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 99] = 50.0
    row = SampleRow(state_of(SamplingParams(temperature=0), 100), mask=mask_of([5, 31], 32))
    assert sample(logits, [row]).token_ids == [5]


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 10, but token ids go from 0 to 9"):
        state_of(SamplingParams(logit_bias={10: 1.0}), 10)


# ---- log-probabilities -------------------------------------------------------------------------------------------


def test_logprobs_come_from_the_raw_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0, 1.0]]).repeat(3, 1)
    biased = SamplingParams(temperature=0, logprobs=4, logit_bias={5: 50.0})
    rows = [
        SampleRow(state_of(biased, 6)),
        SampleRow(state_of(SamplingParams(temperature=0), 6)),
        SampleRow(state_of(SamplingParams(temperature=0, logprobs=0), 6)),
    ]
    result = sample(logits.bfloat16(), rows)
    expected = logits[0].double().log_softmax(-1).tolist()
    first, second, third = result.logprobs
    assert result.token_ids == [5, 1, 1]
    assert second is None
    assert first is not None
    assert (first.token_id, first.rank, first.top_ids) == (5, 3, [1, 3, 2, 5])  # ties: rank is shared, ids ascend
    assert first.logprob == pytest.approx(expected[5], abs=1e-6)
    assert first.top_logprobs == pytest.approx([expected[i] for i in (1, 3, 2, 5)], abs=1e-6)
    assert third is not None
    assert (third.token_id, third.rank, third.top_ids, third.top_logprobs) == (1, 1, [], [])


def test_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 50)
    tokens = list(range(3, 12))
    expected = logits.double().log_softmax(-1)
    records = prompt_logprobs(logits, tokens, 5)
    monkeypatch.setitem(sampler.CHUNK_ELEMENTS, "cpu", 100)
    assert prompt_logprobs(logits, tokens, 5) == records
    for line, token, record in zip(expected, tokens, records):
        assert record.token_id == token
        assert record.logprob == pytest.approx(float(line[token]), abs=1e-5)
        assert record.rank == int((line > line[token]).sum()) + 1
        assert record.top_ids == line.argsort(descending=True)[:5].tolist()
    assert [record.top_ids for record in prompt_logprobs(logits, tokens, 0)] == [[]] * 9


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SamplingParams(temperature=0, logprobs=2), SamplingParams(top_p=0.9, logprobs=2)])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "Row 1 (output token 2): the model's logits hold NaN; the weights or the arithmetic"),
        (math.inf, "Row 1 (output token 2): the model's logits hold +inf; they overflowed, try a wider dtype."),
        (-math.inf, "Row 1 (output token 2): no token is left to choose from; every allowed one has a logit of -inf."),
        (None, "Row 1 (output token 2): the grammar allows no token of the vocabulary here."),
    ],
)
def test_a_bad_row_fails_alone(kind: SamplingParams, value: float | None, message: str) -> None:
    vocab = 70
    logits = torch.randn(3, vocab)
    rows = [SampleRow(state_of(kind, vocab, seed, output=[2]), [3]) for seed in range(3)]
    alone = [sample(logits[i : i + 1], [rows[i]]) for i in (0, 2)]
    if value is None:
        rows[1] = SampleRow(rows[1].state, rows[1].drafts, mask_of([], vocab))
    else:
        logits[1, slice(None) if value == -math.inf else 40] = value
    result = sample(logits, rows)
    assert result.token_ids == [alone[0].token_ids[0], FAILED, alone[1].token_ids[0]]
    assert list(result.errors) == [1]
    assert result.errors[1].startswith(message)
    assert [record is None for record in result.logprobs] == [False, True, False]


def test_shapes_are_checked() -> None:
    row = SampleRow(state_of(SamplingParams(), 8))
    with pytest.raises(ValueError, match=r"logits must be \[1, V\], one line per row; got \[2, 8\]"):
        sample(torch.zeros(2, 8), [row])
    with pytest.raises(ValueError, match=r"logits must be \[3, V\], one line per token; got \[2, 8\]"):
        prompt_logprobs(torch.zeros(2, 8), [1, 2, 3], 0)
    assert sample(torch.zeros(0, 8), []).token_ids == []
