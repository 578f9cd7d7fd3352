"""Routing against a slow version in numpy, experts against one product per token and expert."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, draw, dtypes, implementations, seeds


def slow_route(logits, bias, k, groups, kept_groups, normalize, factor):
    """One token, by the words of the report."""
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = (score.astype(np.float32) + bias).astype(np.float64)
    size = len(logits) // groups
    if kept_groups < groups:
        value = [np.sort(choice[g * size : g * size + size])[-2:].sum() for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -value[g])[:kept_groups]
        choice = [c if e // size in kept else -np.inf for e, c in enumerate(choice)]
    experts = sorted(range(len(logits)), key=lambda e: (-choice[e], e))[:k]
    weights = score[experts]
    return experts, weights / (weights.sum() if normalize else 1) * factor


@given(seeds, st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(2, 5), st.booleans(), st.data())
def test_route_grouped(seed, tokens, groups, size, normalize, data):
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    normal = draw(seed)
    logits, bias = normal(tokens, groups * size) * 2, normal(groups * size) * 0.3
    for function in implementations("route_grouped"):
        weights, experts = function(logits, bias, k, groups, kept, normalize, 2.5)
        assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
        for t in range(tokens):
            expected, values = slow_route(logits[t].numpy(), bias.numpy(), k, groups, kept, normalize, 2.5)
            assert experts[t].tolist() == expected
            np.testing.assert_allclose(weights[t].numpy(), values, rtol=1e-5)


def test_bias_decides_who_wins_but_not_the_weight():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 5.0, 0.0, -5.0])
    for function in implementations("route_grouped"):
        weights, experts = function(logits, bias, 2, 1, 1, False, 1.0)
        assert experts.tolist() == [[1, 0]], "of equal choices the lowest expert wins"
        assert weights.tolist() == [[0.5, 0.5]]


def test_a_good_expert_of_a_dropped_group_does_not_win():
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0]])
    for function in implementations("route_grouped"):
        assert function(logits, torch.zeros(4), 2, 2, 1, True, 1.0)[1].tolist() == [[2, 3]]


def slow_experts(x, weights, experts, gate_up, down, shared):
    def one(row, gate_up, down):
        both = gate_up.double() @ row.double()
        gate, up = both.chunk(2)
        return down.double() @ (gate * torch.sigmoid(gate) * up)

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t].tolist(), experts[t].tolist()):
            out[t] += weight * one(x[t], gate_up[e], down[e])
        if shared is not None:
            out[t] += one(x[t], *shared)
    return out


@FEW
@given(seeds, st.integers(1, 20), st.integers(1, 12), st.integers(1, 10), dtypes, st.data())
def test_experts(seed, tokens, experts, width, dtype, data):
    check_experts(seed, tokens, experts, data.draw(st.integers(1, experts)), width, dtype)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(48, 8, 2), (49, 8, 2), (5, 9, 2), (60, 12, 1), (1, 30, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_both_sides_of_every_threshold(tokens, experts, k, dtype):
    check_experts(7, tokens, experts, k, 6, dtype)


def check_experts(seed, tokens, experts, k, width, dtype, hidden=12):
    normal = draw(seed)
    x = normal(tokens, hidden, dtype=dtype)
    gate_up = (normal(experts, 2 * width, hidden) * 0.3).to(dtype)
    down = (normal(experts, hidden, width) * 0.3).to(dtype)
    both = ((normal(2 * width + 2, hidden) * 0.3).to(dtype), (normal(hidden, width + 1) * 0.3).to(dtype))
    chosen = normal(tokens, experts).topk(k, dim=1).indices.int()
    weights = normal(tokens, k).abs()
    for shared in (None, both):
        expected = slow_experts(x, weights, chosen, gate_up, down, shared)
        for function in implementations("experts_swiglu"):
            before = x.clone()
            got = function(x, weights, chosen, gate_up, down, shared)
            assert got.dtype == dtype
            error = (got.double() - expected).abs().max().item()
            assert error < (1e-4 if dtype == torch.float32 else 0.04) * max(1.0, expected.abs().max().item())
            assert torch.equal(x, before)
