"""Indexer prolog: the scores that its outputs give; the guard against interleaved RoPE."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery import tile
from tilery.ops import cache as operators
from tilery.ops import elementwise
from tilery.ops.indexer import indexer_scores
from tilery.ops.kernels import indexer_prolog
from tilery.ops.kernels._common import hadamard, hadamard_128, hadamard_matrix, hadamard_rows, tables
from tilery.ops.kernels.cache import PAGE_BYTES
from tilery.tile import Dim, Tensor, bf16, f32


def _inputs(tokens: int, heads: int):
    cos, sin = tables(tokens, 64)
    q = torch.randn(tokens, heads, 128, generator=gen(1))
    weights = torch.randn(tokens, heads, generator=gen(2))
    key = torch.randn(tokens, 128, generator=gen(3))
    weight, bias = torch.rand(128, generator=gen(4)) + 0.5, torch.randn(128, generator=gen(5)) * 0.1
    return q, weights, key, weight, bias, cos, sin


def _exact_scores(q, weights, key, weight, bias, cos, sin):
    k = elementwise.layer_norm(key, weight, bias, 1e-6)
    k = torch.cat((elementwise.rope_half_split(k[:, :64], cos, sin), k[:, 64:]), 1)
    q = torch.cat((elementwise.rope_half_split(q[..., :64], cos, sin), q[..., 64:]), 2)
    return indexer_scores(q, weights * (q.shape[1] * 128) ** -0.5, k)


def test_plain_outputs_score_exactly():
    q, weights, key, weight, bias, cos, sin = _inputs(5, 4)
    rows = torch.zeros(5, 128)
    indexer_prolog.index_key.interpret(key, weight, bias, cos, sin, torch.arange(5), rows)
    turned, w = indexer_prolog.index_query.interpret(q, weights, cos, sin, (4 * 128) ** -0.5)
    close(indexer_scores(turned, w, rows), _exact_scores(q, weights, key, weight, bias, cos, sin))


@pytest.mark.parametrize("transform", [False, True])
def test_fp8_outputs_score_alike(transform):
    """Hadamard on both sides leaves the products as they are; FP8 adds about 3 % of noise per product."""
    q, weights, key, weight, bias, cos, sin = _inputs(6, 16)
    pages = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)
    slots = torch.arange(6)
    indexer_prolog.index_key_fp8.interpret(key, weight, bias, cos, sin, slots, pages, 1e-6, transform)
    q8, w = indexer_prolog.index_query_fp8.interpret(q, weights, cos, sin, (16 * 128) ** -0.5, transform)
    got = indexer_scores(q8.float(), w, operators.read_index(pages, slots, torch.float32))
    wanted = _exact_scores(q, weights, key, weight, bias, cos, sin)
    assert float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_int8_outputs_score_alike():
    q, weights, key, weight, bias, cos, sin = _inputs(6, 16)
    keys, scales = torch.zeros(6, 128, dtype=torch.int8), torch.zeros(6, dtype=torch.float16)
    indexer_prolog.index_key_int8.interpret(key, weight, bias, cos, sin, torch.arange(6), keys, scales)
    q8, q_scale, w = indexer_prolog.index_query_int8.interpret(q, weights, cos, sin, (16 * 128) ** -0.5)
    got = indexer_scores(q8.float(), w.float() * q_scale.float(), keys.float() * scales.float()[:, None])
    wanted = _exact_scores(q, weights, key, weight, bias, cos, sin)
    assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_rope_is_half_split():
    """Interleaved pairs, as MLA has them, would give other queries and select wrong tokens."""
    q, weights, *_, cos, sin = _inputs(3, 2)
    turned, _ = indexer_prolog.index_query.interpret(q, weights, cos, sin, 1.0)
    close(turned[..., :64], elementwise.rope_half_split(q[..., :64], cos, sin))
    assert not torch.allclose(turned[..., :64], elementwise.rope_interleaved(q[..., :64], cos, sin), atol=0.1)
    assert torch.equal(turned[..., 64:], q[..., 64:])


def test_both_hadamard_transforms_are_sylvesters():
    rows = Dim("rows")

    @tile.kernel
    def matrix():
        h = tile.empty([128, 128], bf16)
        for _ in tile.parallel(1):
            for start, size in ((0, 32), (32, 32), (64, 64)):
                h[tile.span(start, size), :] = hadamard_rows(128, start, size)
        return h

    @tile.kernel
    def transform(x: Tensor[rows, 128, f32]):
        y = tile.empty([rows, 128], f32)
        for r in tile.parallel(tile.blocks(rows, "r")):
            y[r, :] = hadamard_128(x[r, :])
        return y

    x = torch.randn(3, 128, generator=gen())
    assert torch.equal(matrix.interpret().float(), hadamard_matrix(128, torch.device("cpu")))
    close(transform.interpret(x), hadamard(x), rtol=0.0078125)


def test_the_rotation_of_a_query_is_not_fused():
    """Torch rounds each of its products. A fused multiply-add rounds about 1 value in 45,000 to the bf16 number next to
    it, and H spreads that over the row: small results are then several steps of FP8 off."""
    pytest.importorskip("triton")
    from tilery.tile.targets.triton import emit, report

    low = indexer_prolog.index_query_fp8.lower("triton", T=4096, N=64, R=64, transform=True)
    assert report(emit(low.kernel, low.schedule)).count("FFMA") == 0


def test_what_fusing_the_rotation_would_do():
    """The bf16 numbers before the Hadamard product, with products rounded apart and with one fused."""
    q, cos, sin = torch.randn(512, 64, 64, generator=gen()).bfloat16().float(), *tables(512, 64)
    x, y, c, s = q[..., :32], q[..., 32:], cos[:, None], sin[:, None]
    apart = (x * c - y * s).bfloat16()
    fused = (x.double() * c.double() - (y * s).double()).float().bfloat16()  # exact but for the last rounding
    step = (apart.float() - fused.float()).abs() / apart.float().abs().clamp(min=1e-30)
    assert 0 < int((apart != fused).sum()) < apart.numel() / 10_000
    assert float(step.max()) < 2.0**-7
