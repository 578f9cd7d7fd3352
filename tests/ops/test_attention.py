"""Attention against loops; absorbed decode equals un-absorbed prefill; a hole has no influence at all."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, close, draw, dtypes, implementations, seeds
from tilery.ops.cache import packed_mla_bytes, read_mla, write_mla

sizes = st.integers(1, 20)


def filled_cache(normal, slots, latent, rope, dtype, packed):
    cache = torch.zeros(slots, packed_mla_bytes(latent, rope) if packed else latent + rope)
    cache = cache.to(torch.uint8 if packed else dtype)
    write_mla(cache, torch.arange(slots), normal(slots, latent, dtype=dtype), normal(slots, rope, dtype=dtype))
    return cache


def slot_table(seed, tokens, width, slots):
    """Distinct slots in any order, -1 sprinkled among them, at least one slot a row."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.stack([torch.randperm(slots, generator=generator)[:width] for _ in range(tokens)])
    holes = torch.rand(tokens, width, generator=generator) < 0.4
    holes[torch.arange(tokens), torch.randint(width, (tokens,), generator=generator)] = False
    return table.masked_fill(holes, -1)


@FEW
@given(seeds, st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), dtypes, st.booleans(), st.booleans())
def test_mla_decode(seed, tokens, heads, width, dtype, packed, holes):
    normal, latent, rope = draw(seed), 128, 8
    cache = filled_cache(normal, 48, latent, rope, dtype, packed)
    table = slot_table(seed, tokens, width, 48)
    table = table if holes else table.clamp(min=0)
    q = normal(tokens, heads, latent + rope, dtype=dtype)
    expected = torch.empty(tokens, heads, latent, dtype=torch.float64)
    for t in range(tokens):
        rows = read_mla(cache, table[t][table[t] >= 0], latent, torch.float32).double()
        for n in range(heads):
            expected[t, n] = (rows @ q[t, n].double() * 0.09).softmax(0) @ rows[:, :latent]
    for function in implementations("mla_decode"):
        got = function(q, cache, table, latent, 0.09)
        assert got.dtype == dtype
        close(got, expected, dtype)


def test_rows_that_are_not_named_have_no_influence():
    """Unnamed rows are other requests': whatever overflowed there must not reach this one."""
    normal = draw(3)
    cache = filled_cache(normal, 16, 128, 8, torch.float32, packed=False)
    q, table = normal(2, 3, 136), torch.tensor([[4, -1, 7], [-1, -1, 9]])
    for function in implementations("mla_decode"):
        expected = function(q, cache, table, 128, 0.1)
        poisoned = torch.full_like(cache, float("nan"))
        poisoned[[4, 7, 9]] = cache[[4, 7, 9]]
        assert torch.equal(function(q, poisoned, table, 128, 0.1), expected)
        poisoned[9] = float("nan")
        got = function(q, poisoned, table, 128, 0.1)
        assert torch.equal(got[0], expected[0])
        assert got[1].isnan().all()


@FEW
@given(seeds, st.integers(1, 9), st.integers(0, 9), st.integers(1, 3), st.tuples(sizes, sizes), dtypes, st.booleans())
def test_mha_prefill(seed, tokens, earlier, heads, dims, dtype, masked):
    normal, context, (dim, value_dim) = draw(seed), tokens + earlier, dims
    q, k = normal(tokens, heads, dim, dtype=dtype), normal(context, heads, dim, dtype=dtype)
    v = normal(context, heads, value_dim, dtype=dtype)
    allowed = (normal(tokens, context) > 0) | torch.eye(tokens, context).roll(earlier, 1).bool() if masked else None
    expected = torch.empty(tokens, heads, value_dim, dtype=torch.float64)
    for t in range(tokens):
        seen = torch.arange(context) <= earlier + t
        seen = seen & allowed[t] if allowed is not None else seen
        for n in range(heads):
            weights = (k[seen, n].double() @ q[t, n].double() * 0.2).softmax(0)
            expected[t, n] = weights @ v[seen, n].double()
    for function in implementations("mha_prefill"):
        got = function(q, k, v, allowed, 0.2)
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        close(got, expected, dtype)


@FEW
@given(seeds, st.integers(1, 8), st.integers(0, 8), st.integers(1, 3))
def test_absorbed_decode_equals_prefill(seed, tokens, earlier, heads):
    """q . (W_UK c) = (W_UK^T q) . c: the same attention, whichever side the weights are multiplied to."""
    normal, context, latent, rope, nope, value = draw(seed), tokens + earlier, 16, 6, 10, 12
    rows = normal(context, latent + rope)
    w_uk, w_uv = normal(heads, nope, latent) * 0.3, normal(heads, latent, value) * 0.3
    q_nope, q_rope = normal(tokens, heads, nope), normal(tokens, heads, rope)
    k_nope = torch.einsum("cl,ndl->cnd", rows[:, :latent], w_uk)
    k = torch.cat((k_nope, rows[:, None, latent:].expand(-1, heads, -1)), 2)
    v = torch.einsum("cl,nlv->cnv", rows[:, :latent], w_uv)
    positions = torch.arange(context).expand(tokens, -1)
    table = positions.masked_fill(positions > torch.arange(earlier, context)[:, None], -1)
    absorbed = torch.cat((torch.einsum("tnd,ndl->tnl", q_nope, w_uk), q_rope), 2)
    for prefill in implementations("mha_prefill"):
        expected = prefill(torch.cat((q_nope, q_rope), 2), k, v, None, 0.25)
        for decode in implementations("mla_decode"):
            got = torch.einsum("tnl,nlv->tnv", decode(absorbed, rows, table, latent, 0.25), w_uv)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
