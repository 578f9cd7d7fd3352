"""Routing, sorting, permuting: against the engine's gate, and round trips."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops import moe as torch_moe
from tilery.ops.kernels import moe
from tilery.tile.errors import LaunchError


@pytest.mark.parametrize("tokens", [0, 1, 4, 8, 9, 33])
def test_route_chooses_what_the_engine_chooses(tokens):
    logits, bias = torch.randn(tokens, 4, 8, generator=gen(tokens)), torch.randn(4, 8, generator=gen(1)) * 0.1
    settings = (4, 2, False, True, 2.5)
    weights, experts, rows, order, total, offset = moe.route.interpret(logits, bias, *settings, moe.chunk_for(tokens))
    wanted, chosen = torch_moe.route_grouped(logits.flatten(1), bias.flatten(), 4, 4, 2, True, 2.5)
    close(weights, wanted)
    assert torch.equal(experts.long(), chosen)
    flat = experts.flatten().long()
    assert torch.equal(total.long(), torch.bincount(flat, minlength=32))
    assert torch.equal(offset, total.cumsum(0).int() - total)
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(rows.flatten()[order.long()].long(), torch.arange(4 * tokens))
    if tokens <= moe.SMALL:
        for one, two in zip(moe.gate_and_sort.interpret(logits, bias, *settings), (weights, experts, rows, order)):
            close(one, two)


def test_chunks_do_not_matter():
    logits = torch.randn(40, 2, 8, generator=gen()).round()
    first, *others = (moe.route.interpret(logits, None, 3, 1, False, True, 1.0, chunk) for chunk in (1, 4, 32))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[1:], other[1:]))


def test_unpermute_undoes_permute():
    x = torch.randn(6, 40, generator=gen())
    rows = torch.randperm(18, generator=gen()).view(6, 3).int()
    out = torch.zeros(18, 40)
    moe.permute.interpret(x, None, rows, out, None, 3)
    close(moe.unpermute.interpret(out, rows, torch.full((6, 3), 1 / 3), 3), x)


def test_too_many_tokens_for_one_program():
    with pytest.raises(LaunchError, match="dimension T must be at least 0 and at most 8, got 9"):
        moe.gate_and_sort.interpret(torch.zeros(9, 1, 4), None, 2, 0)
