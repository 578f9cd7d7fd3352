"""Attention kernels: splits that join exactly, holes that are never read."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops import attention as torch_attention
from tilery.ops.kernels import attention
from tilery.tile import f32
from tilery.tile.errors import LaunchError


@pytest.mark.parametrize("splits", [1, 3])
def test_f32_is_close(splits):
    """Far closer than the tolerance, which bf16 needs; the parts joined equal the whole."""
    arguments = attention.mla_decode.arguments("plain_slots")
    wanted = attention.mla_decode.reference(**arguments)
    close(attention.mla_decode.interpret(**arguments), wanted)
    part, weight = attention.mla_partial.interpret(**arguments, splits=splits)
    close(attention.mla_combine.interpret(part, weight, f32), wanted)


def test_holes_are_not_read():
    cache, q = torch.randn(8, 24, generator=gen()), torch.randn(1, 2, 24, generator=gen(1))
    cache[0] = float("nan")
    slots = torch.tensor([[-1, 3, -1, 5]])
    out = attention.mla_decode.interpret(q, cache, slots, None, None, 16, 0.3)
    close(out, torch_attention.mla_decode(q, cache, slots, 16, 0.3))


def test_int8_rows_come_back():
    rows = torch.randn(5, 136, generator=gen())
    back = attention.unpack_int8_rows(attention.pack_int8_rows(rows, 128), 128)
    assert attention.pack_int8_rows(torch.randn(2, 576), 512).shape[1] == 656
    close(back, rows, atol=0.05)


def test_prefill_is_close_and_does_not_depend_on_the_part():
    arguments = attention.mha_prefill.arguments("chunk_with_mask")
    wanted = attention.mha_prefill.reference(**arguments)
    for part in (8, 16):
        close(attention.mha_prefill.interpret(**{**arguments, "part": part}), wanted)


def test_heads_must_agree():
    q, k, v = torch.zeros(2, 3, 24), torch.zeros(4, 2, 24), torch.zeros(4, 2, 16)
    with pytest.raises(LaunchError, match=r"k.shape\[1\] is N = 2, but q.shape\[1\] says N = 3"):
        attention.mha_prefill.interpret(q, k, v, None, 0.1, 16)
