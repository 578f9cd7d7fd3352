"""Top-k: the largest win, of equal ones the lowest position, -inf never."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import implementations, seeds


def slow(row, k):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return {i for i in order if row[i] > float("-inf")}


@given(seeds, st.integers(1, 6), st.integers(1, 40), st.integers(1, 45), st.integers(1, 5), st.floats(0, 1))
def test_ties_and_masked_positions(seed, rows, length, k, levels, masked):
    """Few distinct values, so that nearly every boundary is a tie; some rows wholly -inf."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, length), generator=generator).float() - levels // 2
    scores[torch.rand(rows, length, generator=generator) < masked] = float("-inf")
    scores[0] = float("-inf") if seed % 3 == 0 else scores[0]
    for function in implementations("top_k_positions"):
        before = scores.clone()
        got = function(scores, k)
        assert (got.dtype, got.shape) == (torch.int64, (rows, min(k, length)))
        assert torch.equal(scores, before)
        for row, chosen in zip(scores.tolist(), got.tolist()):
            expected = slow(row, k)
            assert {position for position in chosen if position >= 0} == expected
            assert chosen.count(-1) == len(chosen) - len(expected), "-1 stands for each missing one"


@given(seeds, st.integers(1, 4), st.integers(1, 200), st.integers(1, 200))
def test_distinct_scores(seed, rows, length, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)]).float()
    for function in implementations("top_k_positions"):
        for row, chosen in zip(scores.tolist(), function(scores, k).tolist()):
            assert set(chosen) == slow(row, k)


def test_signed_zeros_are_equal():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    for function in implementations("top_k_positions"):
        assert set(function(scores, 2)[0].tolist()) == {0, 1}
