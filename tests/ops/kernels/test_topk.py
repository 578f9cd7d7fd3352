"""Top-k kernels: the stated set for any data, and pieces that keep the tie rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.kernels.support import gen
from tests.ops.support import FEW, seeds
from tilery.ops.kernels import topk


def data(kind, rows, length, seed):
    return topk._scores(gen(seed), kind, rows, length)


@FEW
@given(
    kind=st.sampled_from(["normal", "ties", "relu", "holes", "extremes"]), length=st.integers(3, 90),
    k=st.integers(1, 40), seed=seeds,
)  # fmt: skip
def test_both_kernels_choose_the_stated_set(kind, length, k, seed):
    scores = data(kind, 2, length, seed)
    lens = torch.tensor([length, length // 2], dtype=torch.int32)
    wanted = topk._top_k_reference(scores, k, lens)
    assert torch.equal(topk.top_k.interpret(scores, k, lens), wanted)
    assert torch.equal(topk.top_k_tile.interpret(scores, k, 128, lens, None)[0][:, 0], wanted)


@pytest.mark.parametrize("kind", ["normal", "ties", "relu"])
def test_pieces_keep_the_tie_rule(kind):
    scores = data(kind, 3, 300, 5)
    lens = torch.tensor([300, 9, 170], dtype=torch.int32)
    got = topk.top_k_pieces.interpret(scores, 20, (64, 128), lens)
    assert torch.equal(got, topk._top_k_reference(scores, 20, lens))


def test_all_alike():
    scores = torch.zeros(1, 50)
    assert topk.top_k.interpret(scores, 7, None).tolist() == [list(range(7))]
    assert topk.top_k_tile.interpret(scores, 7, 64, None, None)[0].tolist() == [[list(range(7))]]


def test_no_candidates():
    assert topk.top_k.interpret(torch.empty(2, 0), 3, None).tolist() == [[-1] * 3] * 2


def test_widths():
    assert topk.piece_widths("cpu", 131072, 2048) == ()
    assert topk.piece_widths("cuda", 500, 2048) == (1024,)
    assert topk.piece_widths("cuda", 16384, 2048) == (8192, 4096)
    assert topk.piece_widths("cuda", 32768, 2048) == (8192, 8192)
    assert topk.piece_widths("cuda", 131072, 2048) == (8192, 8192, 8192)
    assert topk.piece_widths("cuda", 100000, 16384) == ()
