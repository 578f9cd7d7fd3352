"""Embedding lookup: ranks of a parallel table add up, unknown ids give zeros."""

import torch

from tests.ops.kernels.support import gen
from tilery.ops.kernels import embedding
from tilery.tile import f32


def test_ranks_add_up_to_the_whole_table():
    table, ids = torch.randn(20, 7, generator=gen()), torch.tensor([0, 19, 10, 9, 3])
    parts = [embedding.embedding.interpret(table[a : a + 10], ids, a, f32) for a in (0, 10)]
    assert torch.equal(parts[0] + parts[1], table[ids])
    assert torch.equal(parts[0][1], torch.zeros(7))


def test_no_tokens():
    out = embedding.embedding.interpret(torch.randn(4, 3), torch.zeros(0, dtype=torch.int64), 0, f32)
    assert out.shape == (0, 3)
