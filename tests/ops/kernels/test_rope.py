"""Rotary embedding: both styles against the operators, positions and sections."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops import elementwise
from tilery.ops.kernels import rope
from tilery.ops.kernels._common import tables


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("heads", [1, 5, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_whole_heads_are_the_operators(tokens, heads, interleaved):
    x, (cos, sin) = torch.randn(tokens, heads, 12, generator=gen()), tables(tokens, 12)
    operator = elementwise.rope_interleaved if interleaved else elementwise.rope_half_split
    close(rope.rope.interpret(x, cos, sin, interleaved), operator(x, cos, sin))


def test_inplace_leaves_the_rest_alone():
    x, (cos, sin) = torch.randn(3, 2, 20, generator=gen()), tables(3, 8)
    y = x.clone()
    rope.rope_inplace.interpret(y, cos, sin, interleaved=True, last=True)
    assert torch.equal(y[..., :12], x[..., :12])
    assert torch.equal(y, rope.rope.interpret(x, cos, sin, interleaved=True, last=True))


def test_gathered_positions_are_rows_of_the_table():
    x, (cos, sin) = torch.randn(4, 2, 8, generator=gen()), tables(50, 8, first=0)
    positions = torch.tensor([49, 0, 7, 7])
    a = rope.rope_at.interpret(x, positions, cos, sin)
    assert torch.equal(a, rope.rope.interpret(x, cos[positions], sin[positions]))


@pytest.mark.parametrize(("sections", "cyclic"), [((4,), False), ((2, 1, 1), False), ((2, 1, 1), True)])
def test_equal_positions_on_all_axes_are_plain_rope(sections, cyclic):
    x, (cos, sin) = torch.randn(5, 2, 8, generator=gen()), tables(9, 8, first=0)
    positions = torch.randint(0, 9, (5,), generator=gen())
    y = rope.mrope.interpret(x, positions.expand(len(sections), 5), cos, sin, sections, cyclic)
    assert torch.equal(y, rope.rope_at.interpret(x, positions, cos, sin))


def test_cyclic_sections_go_round_while_they_last():
    assert rope.sections_reference((4, 2, 1), cyclic=True) == [0, 1, 2, 0, 1, 0, 0]
    assert rope.sections_reference((4, 2, 1), cyclic=False) == [0, 0, 0, 0, 1, 1, 2]
