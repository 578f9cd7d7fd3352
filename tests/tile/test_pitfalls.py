"""Mistakes that once gave wrong numbers or a baffling error: each is now right, or refused with a clear text."""

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, Tensor, b1, f32, i8, i32, u8
from tilery.tile.errors import LaunchError, SanitizeError, TraceError

N, M = Dim("N"), Dim("M")


@tile.kernel
def as_words(x: Tensor[N, 8, u8]):
    y = tile.empty([N, 2], i32)
    for n in tile.parallel(N):
        y[n, :] = x.view(i32, [N, 2])[n, :]
    return y


def test_a_viewed_tensor_must_be_contiguous():
    x = torch.arange(64, dtype=torch.uint8).view(4, 16)
    assert torch.equal(as_words(x.view(8, 8)), x.view(torch.int32).view(8, 2))
    with pytest.raises(LaunchError, match=r"x must be contiguous, since the kernel views its memory"):
        as_words(x[:, :8])
    with pytest.raises(SanitizeError, match="a viewed tensor must be contiguous"):
        as_words.interpret(x[:, :8])


def test_a_block_cannot_be_carried_out_of_its_iteration():
    @tile.kernel
    def carried(x: Tensor[N, f32]):
        y = tile.empty([1], f32)
        for _ in tile.parallel(1):
            last = 0.0
            for b in tile.range(tile.blocks(N, "part")):
                last = x[b]
            y[0] = tile.sum(last)
        return y

    with pytest.raises(TraceError, match="'last' has the shape of one block of the loop 'part'"):
        carried(torch.randn(5))


def test_not_of_a_bool_is_logical_on_every_target():
    @tile.kernel
    def negated(x: Tensor[N, f32]):
        y, z = tile.empty([N], b1), tile.empty([N], i32)
        for n in tile.parallel(tile.blocks(N, "n")):
            y[n] = ~(x[n] > 0.0)
            z[n] = tile.where(~(x[n] > 0.0), 1, 0)
        return y, z

    x = torch.tensor([1.0, -1.0, 0.0])
    y, z = negated(x)
    assert y.tolist() == [False, True, True]
    assert z.tolist() == [0, 1, 1]


def test_small_integers_are_summed_in_32_bits():
    @tile.kernel
    def totals(x: Tensor[N, M, i8]):
        y, z = tile.empty([N], i32), tile.empty([N, M], i32)
        for n in tile.parallel(N):
            y[n] = tile.sum(x[n, :])
            z[n, :] = tile.cumsum(x[n, :])
        return y, z

    x = torch.full((2, 10), 100, dtype=torch.int8)
    y, z = totals(x)
    assert y.tolist() == [1000, 1000]
    assert z[0].tolist() == list(range(100, 1001, 100))


def test_adding_zero_keeps_the_meaning_of_signed_zero():
    @tile.kernel
    def plus_zero(x: Tensor[N, f32]):
        y = tile.empty([N], f32)
        for n in tile.parallel(tile.blocks(N, "n")):
            y[n] = x[n] + 0.0
        return y

    assert not bool(torch.signbit(plus_zero(torch.tensor([-0.0]))).any())


def test_a_condition_known_while_lowering_is_folded():
    @tile.kernel(reference=lambda x: torch.where(x > 0, x, x))
    def folded(x: Tensor[N, f32]):
        y = tile.empty([N], f32)
        for n in tile.parallel(tile.blocks(N, "n")):
            always = tile.full([], 1, i32) > 0
            y[n] = tile.where(always, x[n], tile.where(~always, 7.0, x[n]))
        return y

    x = torch.randn(5)
    assert torch.equal(folded(x), x)
    folded.verify(x)
