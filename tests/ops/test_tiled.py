"""The kernels of the tile language as implementations of operators, against the references, at a few fixed shapes.

The kernels themselves are tested with the language (`tests/ops/kernels`): here it is what the wrappers add.
"""

import pytest
import torch

from tests.ops.support import draw
from tilery.ops import registry
from tilery.ops.cache import packed_mla_bytes

OPS = registry.select()
REFERENCE = registry.select(overrides={"*": "reference"})
TILED = [name for name, chosen in OPS.chosen.items() if chosen == "tile"]
pytestmark = pytest.mark.skipif(not TILED, reason="no C++ compiler here")

LATENT, ROPE, HEADS, NOPE, SLOTS = 128, 16, 4, 32, 192


def tables(normal, tokens):
    return normal(tokens, ROPE // 2), normal(tokens, ROPE // 2)


def caches(kind):
    """(MLA rows, indexer rows), random but valid."""
    normal = draw(3)
    if kind is torch.uint8:
        rows = (
            torch.zeros(SLOTS, packed_mla_bytes(LATENT, ROPE), dtype=kind),
            torch.zeros(SLOTS // 64, 64 * 132, dtype=kind),
        )
    else:
        rows = (torch.zeros(SLOTS, LATENT + ROPE, dtype=kind), torch.zeros(SLOTS, 128, dtype=kind))
    every = torch.arange(SLOTS)
    REFERENCE.write_mla(rows[0], every, normal(SLOTS, LATENT), normal(SLOTS, ROPE))
    REFERENCE.write_index(rows[1], every, normal(SLOTS, 128))
    return rows


def close(got, expected, atol=2e-5):
    if not isinstance(got, tuple):
        got, expected = (got,), (expected,)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=atol)


def test_the_default_path_runs_kernels_of_the_tile_language():
    wanted = "rms_norm add_rms_norm swiglu embed mla_prolog mla_indexer_prolog split_queries rotate_queries "
    wanted += "index_queries read_mla read_index route_grouped"
    assert set(wanted.split()) <= set(TILED)


@pytest.mark.parametrize("tokens", [1, 5])
def test_elementwise(tokens):
    normal = draw(tokens)
    wide, other, weight, bias = normal(tokens, 96), normal(tokens, 64), normal(64), normal(64)
    x = wide[:, 16:80]  # a view of a wider product
    close(OPS.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
    close(OPS.add_rms_norm(x, other, weight, 1e-6), REFERENCE.add_rms_norm(x, other, weight, 1e-6))
    close(OPS.layer_norm(x, weight, bias, 1e-6), REFERENCE.layer_norm(x, weight, bias, 1e-6))
    close(OPS.swiglu(wide), REFERENCE.swiglu(wide))
    deep = normal(2, 3, 64)
    close(OPS.rms_norm(deep, weight, 1e-6), REFERENCE.rms_norm(deep, weight, 1e-6))


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_embed(table):
    normal = draw(0)
    arguments = (
        normal(40, 64).to(table),
        torch.tensor([3, 0, 39]),
        normal(9, 8),
        normal(9, 8),
        torch.tensor([8, 0, 1]),
    )
    close(OPS.embed(*arguments, torch.float32), REFERENCE.embed(*arguments, torch.float32), 0)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("query_norm", [True, False])
def test_prologs(tokens, kind, query_norm):
    normal = draw(tokens)
    fused = normal(tokens, 48 + LATENT + ROPE + 128)
    q, kv, key = fused.split((48, LATENT + ROPE, 128), dim=1)
    weights = (normal(48) if query_norm else None, normal(LATENT))
    slots = torch.tensor([70, 3, 64, 130, 191])[:tokens]
    got, expected = caches(kind), caches(kind)
    where = (*tables(normal, tokens), slots)
    first = [
        ops.mla_prolog(q, kv, *weights, *where, rows[0], 1e-6) for ops, rows in ((OPS, got), (REFERENCE, expected))
    ]
    close(*first)
    arguments = (q, kv, key, *weights, normal(128), normal(128), *where)
    close(
        OPS.mla_indexer_prolog(*arguments, *got, 1e-6),
        REFERENCE.mla_indexer_prolog(*arguments, *expected, 1e-6),
    )
    every = torch.arange(SLOTS)
    step = 1e-4 if kind is torch.float32 else 0.06  # a value between two numbers of the format may go to either
    for read, a, b in (("read_mla", got[0], expected[0]), ("read_index", got[1], expected[1])):
        extra = (LATENT, torch.float32) if read == "read_mla" else (torch.float32,)
        rows = [getattr(REFERENCE, read)(rows, every, *extra) for rows in (a, b)]
        torch.testing.assert_close(*rows, rtol=step, atol=1e-2 * step)
        close(getattr(OPS, read)(a, slots, *extra), getattr(REFERENCE, read)(a, slots, *extra), 0)


def test_queries():
    normal = draw(2)
    q, rope = normal(5, HEADS, NOPE + ROPE), tables(normal, 5)
    (nope, absorbed), (nope_r, absorbed_r) = (ops.split_queries(q, *rope, LATENT) for ops in (OPS, REFERENCE))
    close((nope, absorbed[:, :, LATENT:].contiguous()), (nope_r, absorbed_r[:, :, LATENT:].contiguous()))
    assert absorbed.shape == (5, HEADS, LATENT + ROPE)
    close(OPS.rotate_queries(q[1:], *(t[1:] for t in rope)), REFERENCE.rotate_queries(q[1:], *(t[1:] for t in rope)))
    q, weights = normal(5, HEADS, 128), normal(5, HEADS)
    close(OPS.index_queries(q, weights, *rope, 0.3), REFERENCE.index_queries(q, weights, *rope, 0.3))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
def test_decode(tokens, kind):
    normal = draw(tokens)
    q, rows = normal(tokens, HEADS, LATENT + ROPE), caches(kind)[0]
    slots = torch.stack([torch.randperm(SLOTS)[:70] for _ in range(tokens)])
    slots[0, 5:] = -1
    close(OPS.mla_decode(q, rows, slots, LATENT, 0.1), REFERENCE.mla_decode(q, rows, slots, LATENT, 0.1), 1e-4)


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 4), (1, 1)])
def test_gate(tokens, groups, kept):
    normal = draw(tokens)
    logits, bias = normal(tokens, 16), normal(16) * 0.1
    arguments = (logits, bias, 4, groups, kept, True, 2.5)
    close(OPS.route_grouped(*arguments), REFERENCE.route_grouped(*arguments))
