"""The lightning indexer: scores by the formula, selections of decode and prefill alike, ties by position."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, draw, implementations, seeds
from tilery.ops.cache import write_index


def slow_scores(q, weight, keys):
    """score[t, c] = sum_h weight[t, h] * relu(q[t, h] . key[c])"""
    products = np.einsum("thd,cd->thc", q.double().numpy(), keys.double().numpy())
    return np.einsum("th,thc->tc", weight.double().numpy(), np.maximum(products, 0))


def best(scores, k):
    return set(sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:k])


def integers(seed, *shape):
    """Small whole numbers: sums are exact in any order, and exact ties abound."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@FEW
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 20))
def test_scores(seed, tokens, heads, context):
    normal = draw(seed)
    q, weight, keys = normal(tokens, heads, 16), normal(tokens, heads), normal(context, 16)
    for function in implementations("indexer_scores"):
        np.testing.assert_allclose(
            function(q, weight, keys).numpy(), slow_scores(q, weight, keys), rtol=1e-4, atol=1e-4
        )


@FEW
@given(seeds, st.integers(1, 6), st.integers(1, 4), st.integers(1, 30), st.integers(1, 35))
def test_select_decode(seed, tokens, heads, longest, k):
    q, weight, keys = integers(seed, tokens, heads, 4), integers(seed + 1, tokens, heads), integers(seed + 2, 50, 4)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.stack([torch.randperm(50, generator=generator)[:longest] for _ in range(tokens)])
    lens = torch.randint(1, longest + 1, (tokens,), generator=generator)
    slots[torch.arange(longest) >= lens[:, None]] = -1
    for function in implementations("select_decode"):
        got = function(q, weight, keys, slots, k)
        assert got.shape == (tokens, min(k, longest))
        for t in range(tokens):
            own = slots[t, : lens[t]]
            expected = {own[c].item() for c in best(slow_scores(q[t : t + 1], weight[t : t + 1], keys[own])[0], k)}
            assert {slot for slot in got[t].tolist() if slot >= 0} == expected
            assert (got[t] < 0).sum() == got.shape[1] - len(expected)


@FEW
@given(seeds, st.integers(1, 12), st.integers(0, 12), st.integers(1, 4), st.integers(1, 30))
def test_select_prefill_equals_select_decode_row_by_row(seed, tokens, earlier, heads, k):
    q, weight, keys = (
        integers(seed, tokens, heads, 4), integers(seed + 1, tokens, heads), integers(seed + 2, tokens + earlier, 4),
    )  # fmt: skip
    for prefill in implementations("select_prefill"):
        allowed = prefill(q, weight, keys, k)
        assert (allowed.dtype, allowed.shape) == (torch.bool, (tokens, tokens + earlier))
        for decode in implementations("select_decode"):
            for t in range(tokens):
                seen = torch.arange(earlier + t + 1)[None]
                chosen = decode(q[t : t + 1], weight[t : t + 1], keys, seen, k)[0]
                assert set(allowed[t].nonzero()[:, 0].tolist()) == {c for c in chosen.tolist() if c >= 0}


def test_prefill_in_slices(monkeypatch):
    """The workspace bound cuts queries into slices; the selection does not depend on where."""
    q, weight, keys = integers(1, 20, 3, 4), integers(2, 20, 3), integers(3, 30, 4)
    whole = [function(q, weight, keys, 7) for function in implementations("select_prefill")]
    monkeypatch.setattr("tilery.ops.indexer.WORKSPACE_BYTES", 4 * 3 * 30 * 3)
    for function, expected in zip(implementations("select_prefill"), whole):
        assert torch.equal(function(q, weight, keys, 7), expected)
        assert torch.equal(expected, whole[0])


def test_packed_keys_are_selected_by_what_the_cache_holds():
    normal = draw(5)
    keys, slots = normal(100, 128), torch.randperm(128, generator=torch.Generator().manual_seed(0))[None, :100]
    cache = torch.zeros(2, 64 * 132, dtype=torch.uint8)
    write_index(cache, slots[0], keys)
    q, weight = normal(1, 8, 128), normal(1, 8)
    exact = best(slow_scores(q, weight, keys)[0], 20)
    for function in implementations("select_decode"):
        chosen = set(function(q, weight, cache, slots, 20)[0].tolist())
        assert len(chosen & {slots[0, c].item() for c in exact}) >= 16, "8-bit keys choose nearly the same"
