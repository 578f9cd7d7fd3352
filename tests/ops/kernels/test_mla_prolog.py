"""MLA prolog: against the engine's chain of operators; the absorbed layout."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops import cache as operators
from tilery.ops import elementwise
from tilery.ops.kernels import mla_prolog
from tilery.ops.kernels._common import tables
from tilery.ops.kernels.cache import int8_row_parts
from tilery.tile.errors import LaunchError


def _args(tokens: int, rank: int = 192, latent: int = 512, rope: int = 64):
    slots = torch.randperm(2 * tokens, generator=gen(7))[:tokens]
    return mla_prolog.projected(gen(), tokens, rank, latent, rope, slots, torch.float32)


def _chain(args, cache):
    """What the engine does, one operator at a time."""
    latent = args["kv_weight"].shape[0]
    c = elementwise.rms_norm(args["kv"][:, :latent], args["kv_weight"], 1e-6)
    operators.write_mla(
        cache, args["slots"], c, elementwise.rope_interleaved(args["kv"][:, latent:], args["cos"], args["sin"])
    )
    return elementwise.rms_norm(args["q"], args["q_weight"], 1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5, 17])
@pytest.mark.parametrize("packed", [False, True])
def test_the_engines_chain_of_operators(tokens, packed):
    args = _args(tokens)
    shape, dtype = ((2 * tokens, 656), torch.uint8) if packed else ((2 * tokens, 576), torch.float32)
    a, b = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    kernel = mla_prolog.mla_prolog_packed if packed else mla_prolog.mla_prolog
    close(kernel.interpret(**args, cache=a), _chain(args, b))
    close(a, b, atol=1.0 if packed else 1e-5)


def test_int8_row_holds_what_the_three_tensors_hold():
    args = _args(3, latent=256, rope=16)
    row, parts = torch.zeros(6, 256 + 8 + 32, dtype=torch.int8), mla_prolog.int8_caches(6, 256, 16)
    a = mla_prolog.mla_prolog_int8_row.interpret(**args, cache=row)
    b = mla_prolog.mla_prolog_int8.interpret(**args, **parts)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    values, scales, rope = int8_row_parts(row, 256)
    assert torch.equal(values, parts["latents"])
    assert torch.equal(scales, parts["scales"])
    assert torch.equal(rope, parts["ropes"])


def test_int8_round_trip_is_within_half_a_step():
    args = _args(4, rank=128)
    parts = mla_prolog.int8_caches(8, 512, 64)
    q, scale = mla_prolog.mla_prolog_int8.interpret(**args, **parts)
    wanted = elementwise.rms_norm(args["q"], args["q_weight"], 1e-6)
    assert ((q.float() * scale[:, None] - wanted).abs() <= 0.5001 * scale[:, None]).all()
    latent = elementwise.rms_norm(args["kv"][:, :512], args["kv_weight"], 1e-6).unflatten(1, (4, 128))
    got, step = parts["latents"][args["slots"]].float().unflatten(1, (4, 128)), parts["scales"][args["slots"], :, None]
    assert ((got * step - latent).abs() <= 0.5001 * step).all()


def test_query_fills_only_the_rope_part_of_the_absorbed_layout():
    cos, sin = tables(3, 8)
    q, absorbed = torch.randn(3, 2, 20, generator=gen()), torch.full((3, 2, 24), 9.0)
    nope = mla_prolog.mla_query.interpret(q, cos, sin, absorbed)
    assert torch.equal(nope, q[..., :12])
    assert (absorbed[..., :16] == 9.0).all()
    close(absorbed[..., 16:], elementwise.rope_interleaved(q[..., 12:], cos, sin))


def test_a_latent_of_part_groups():
    args = _args(1, latent=192)
    with pytest.raises(LaunchError, match=r"mla_prolog_packed: .*dimension L must be a multiple of 128, got 192"):
        mla_prolog.mla_prolog_packed.interpret(**args, cache=torch.zeros(2, 326, dtype=torch.uint8))
