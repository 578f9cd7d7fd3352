"""Cache rows and blocks: what one kernel writes the other reads; holes; the other groups' rows stay."""

import pytest
import torch

from tests.ops.kernels.support import gen
from tilery.ops import cache as operators
from tilery.ops.kernels import cache
from tilery.tile import f32
from tilery.tile.errors import LaunchError


def test_packed_rows_are_656_and_132_bytes():
    assert cache.ROW.evaluate({"L": 512, "R": 64}) == operators.packed_mla_bytes(512, 64) == 656
    assert 64 * operators.packed_index_bytes(128) == cache.PAGE_BYTES


def test_written_rows_are_the_operators_bytes():
    latent, rope = torch.randn(7, 512, generator=gen()), torch.randn(7, 64, generator=gen(1))
    slots = torch.tensor([3, 0, 9, 4, 1, 8, 7])
    a, b = torch.zeros(10, 656, dtype=torch.uint8), torch.zeros(10, 656, dtype=torch.uint8)
    cache.write_mla_fp8.interpret(a, slots, latent, rope)
    operators.write_mla(b, slots, latent, rope)
    assert torch.equal(a, b)
    assert torch.equal(
        cache.read_mla_fp8.interpret(a, slots, 512, f32), operators.read_mla(b, slots, 512, torch.float32)
    )


def test_index_keys_are_the_operators_bytes():
    keys, slots = torch.randn(5, 128, generator=gen()), torch.tensor([63, 64, 0, 127, 70])
    a, b = (torch.zeros(2, cache.PAGE_BYTES, dtype=torch.uint8) for _ in range(2))
    cache.write_index_fp8.interpret(a, slots, keys)
    operators.write_index(b, slots, keys)
    assert torch.equal(a, b)
    assert torch.equal(cache.read_index_fp8.interpret(a, slots, f32), operators.read_index(b, slots, torch.float32))


def test_slots_below_zero_write_nothing_and_read_zeros():
    rows = torch.ones(4, 6)
    cache.write_mla.interpret(rows, torch.tensor([-1, 2]), torch.full((2, 4), 5.0), torch.full((2, 2), 7.0))
    assert torch.equal(rows[[0, 1, 3]], torch.ones(3, 6))
    assert rows[2].tolist() == [5.0] * 4 + [7.0] * 2
    assert cache.read_rows.interpret(rows, torch.tensor([-1, 2]), f32).tolist() == [[0.0] * 6, rows[2].tolist()]


def test_a_row_of_the_wrong_size():
    slots = torch.tensor([0])
    with pytest.raises(LaunchError, match=r"cache.shape\[1\] must be .* = 656, got 640"):
        cache.write_mla_fp8.interpret(
            torch.zeros(4, 640, dtype=torch.uint8), slots, torch.zeros(1, 512), torch.zeros(1, 64)
        )


def test_blocks_there_and_back():
    rows = torch.randint(0, 256, (6, 90), generator=gen(), dtype=torch.uint8)
    blocks = torch.tensor([4, 1])
    out = cache.gather_blocks.interpret(rows, blocks)
    assert torch.equal(out, rows[blocks])
    back = torch.zeros_like(rows)
    cache.scatter_blocks.interpret(back, blocks, out)
    assert torch.equal(back[blocks], rows[blocks])
    assert not back[[0, 2, 3, 5]].any()
