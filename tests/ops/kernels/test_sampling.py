"""Sampling: the draw's distribution, batches, the fast path, and messages."""

import pytest
import torch

from tests.ops.kernels.support import gen
from tilery.ops.kernels import sampling, sampling_pieces
from tilery.tile.errors import LaunchError


def arguments(kind, rows, vocab, seed=0, spread=2.0):
    rand = gen(seed)
    logits = torch.randn(rows, vocab, generator=rand) * spread
    return {"logits": logits, **sampling.parameters(rand, [kind] * rows)}


@pytest.mark.parametrize("kind", [(1.0, 0, 1.0, 0.0), (0.7, 4, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.5, 6, 0.8, 0.1)])
def test_frequencies_are_the_probabilities(kind):
    """20000 draws from one distribution: each token within 5 standard deviations of its share."""
    draws, vocab = 20000, 12
    a = arguments(kind, 1, vocab)
    a = {name: x.expand(draws, *x.shape[1:]).contiguous() for name, x in a.items()}
    a["position"] = torch.arange(draws)
    tokens, logprobs = sampling.sample(**a)
    t, k, p, low = kind
    weights = torch.softmax(a["logits"][0].double() / t, 0)
    order = weights.argsort(descending=True)
    kept = weights[order] * (weights[order] >= low * weights.max()) * (torch.arange(vocab) < (k or vocab))
    kept = kept * (kept.cumsum(0) - kept < p * kept.sum())
    wanted = torch.zeros(vocab, dtype=torch.float64).scatter_(0, order, kept / kept.sum())
    share = torch.bincount(tokens, minlength=vocab) / draws
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 1e-12).all()
    assert torch.allclose(logprobs, weights.log()[tokens].float(), atol=2e-5)


def test_a_row_does_not_depend_on_its_batch():
    a = arguments((1.0, 0, 0.9, 0.0), 7, 300)
    tokens, logprobs = sampling.sample(**a)
    for r in (0, 3, 6):
        alone = sampling.sample(**{name: x[r : r + 1] for name, x in a.items()})
        assert alone[0][0] == tokens[r]
        assert alone[1][0] == logprobs[r]


def test_seed_and_position_change_the_draw():
    a = arguments((2.0, 0, 1.0, 0.0), 1, 5000)
    tokens = {int(sampling.sample(**{**a, "position": torch.tensor([n])})[0]) for n in range(8)}
    tokens |= {int(sampling.sample(**{**a, "seed": a["seed"] + (n << 32)})[0]) for n in range(1, 8)}
    assert len(tokens) > 12


def test_i32_and_i64_seeds_are_the_same():
    a = arguments((1.0, 0, 1.0, 0.0), 4, 100)
    a["seed"] = torch.tensor([0, 1, -5, 2**31 - 1])
    narrow = {**a, "seed": a["seed"].int(), "position": a["position"].int()}
    assert torch.equal(sampling.sample(**a)[0], sampling.sample(**narrow)[0])


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_pieces_give_the_same_tokens(spread):
    """Peaked and flat rows of each kind: through the lists, and where these do not suffice through memory."""
    kinds = sampling.EVERY_KIND
    rand = gen(3)
    logits = torch.randn(len(kinds), 1000, generator=rand) * spread
    logits[:, ::7] = logits[:, 1::7][:, : logits[:, ::7].shape[1]].round()[:, :1]
    a = {"logits": logits, **sampling.parameters(rand, kinds)}
    wanted = sampling.sample_reference(**a)
    for tokens, logprobs in (
        sampling.sample(**a),
        sampling_pieces.sample_in_pieces(**a, runs=4, lanes=16, room=16),
        sampling_pieces.sample_in_pieces(**a, runs=8, lanes=64, room=64),
        sampling_pieces.sample_fast(**a),
    ):
        assert torch.equal(tokens, wanted[0])
        assert torch.allclose(logprobs, wanted[1], atol=2e-5)


def test_argmax_takes_the_lowest_id():
    x = (torch.randn(6, 333, generator=gen()) * 2).round()
    x[4, 7], x[5] = float("nan"), float("-inf")
    tokens = sampling.argmax(x, 2, 32)
    best = x.max(1, keepdim=True).values
    first = torch.where(x == best, torch.arange(333), 999).amin(1)
    assert torch.equal(tokens[:4], first[:4])
    assert tokens[4:].tolist() == [-1, -1]


def test_greedy_rows_of_sample_are_argmax():
    a = arguments((0.0, 5, 0.5, 0.1), 5, 777)
    a["logits"] = a["logits"].round()
    assert torch.equal(sampling.sample(**a)[0], sampling.argmax(a["logits"], 2, 64))


def test_parameters_of_other_rows():
    a = arguments((1.0, 0, 1.0, 0.0), 3, 20)
    with pytest.raises(LaunchError, match=r"top_k.shape\[0\] is R = 2, but logits.shape\[0\] says R = 3"):
        sampling.sample(**{**a, "top_k": a["top_k"][:2]})
