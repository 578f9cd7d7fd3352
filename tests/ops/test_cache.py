"""Cache rows: plain rows come back as they were, packed rows have the field's bytes."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, draw, dtypes, implementations, seeds
from tilery.ops.cache import packed_index_bytes, packed_mla_bytes
from tilery.ops.quant import quantize_groups


def e4m3(byte):
    """A byte read by the format's definition: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bf16(data):
    return struct.unpack("<f", b"\0\0" + data)[0]


def slots_of(seed, count, total):
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def test_sizes():
    assert packed_mla_bytes(512, 64) == 656
    assert packed_index_bytes(128) == 132
    with pytest.raises(ValueError, match="needs kv_lora_rank to be a multiple of 128, got 96"):
        packed_mla_bytes(96, 64)
    with pytest.raises(ValueError, match="needs index_head_dim to be 128, got 64"):
        packed_index_bytes(64)


@pytest.mark.parametrize("write", implementations("write_mla"))
def test_packed_mla_row_by_hand(write):
    """656 bytes: 512 e4m3, 4 fp32 powers of two, 64 bf16."""
    normal = draw(0)
    latent, rope = normal(3, 512) * torch.tensor([0.01, 1.0, 50.0])[:, None], normal(3, 64)
    cache = torch.full((8, 656), 99, dtype=torch.uint8)
    write(cache, torch.tensor([5, 0, 7]), latent, rope)
    assert (cache[[1, 2, 3, 4, 6]] == 99).all(), "other rows stay as they are"
    for token, slot in enumerate((5, 0, 7)):
        row = bytes(cache[slot].tolist())
        scales = struct.unpack("<4f", row[512:528])
        for group in range(4):
            exact = latent[token, group * 128 : group * 128 + 128].tolist()
            largest = max(map(abs, exact))
            assert scales[group] / 2 < largest / 448 <= scales[group]
            for position, value in enumerate(exact):
                got = e4m3(row[group * 128 + position]) * scales[group]
                assert abs(got - value) <= max(abs(value) / 16, scales[group] * 2.0**-10)
        for position in range(64):
            exact = rope[token, position].to(torch.bfloat16).item()
            assert bf16(row[528 + 2 * position : 530 + 2 * position]) == exact


@pytest.mark.parametrize("write", implementations("write_index"))
def test_packed_index_page_by_hand(write):
    """A page of 64 tokens: 64 x 128 e4m3 keys first, then 64 fp32 scales; 132 bytes a token."""
    keys = draw(1)(3, 128)
    cache = torch.zeros(2, 64 * 132, dtype=torch.uint8)
    write(cache, torch.tensor([3, 64 + 63, 64]), keys)
    values, scales = quantize_groups(keys)
    for token, (page, offset) in enumerate(((0, 3), (1, 63), (1, 0))):
        data = bytes(cache[page].tolist())
        (scale,) = struct.unpack("<f", data[8192 + 4 * offset : 8196 + 4 * offset])
        assert scale == scales[token, 0].item()
        got = [e4m3(byte) for byte in data[128 * offset : 128 * offset + 128]]
        assert got == values[token].float().tolist()
    assert cache.ne(0).sum() <= 3 * 132, "nothing else was written"


@FEW
@given(seeds, st.integers(1, 30), st.integers(1, 3), st.integers(1, 20), dtypes, st.booleans())
def test_mla_round_trip(seed, tokens, groups, rope, dtype, packed):
    normal = draw(seed)
    rope *= 2  # it is rotated in pairs
    latent, keys = normal(tokens, groups * 128, dtype=dtype), normal(tokens, rope, dtype=dtype)
    slots = slots_of(seed, tokens, 40)
    row = packed_mla_bytes(groups * 128, rope) if packed else groups * 128 + rope
    expected = torch.cat((latent, keys), 1).float()
    for write in implementations("write_mla"):
        cache = torch.zeros(40, row, dtype=torch.uint8 if packed else dtype)
        write(cache, slots, latent, keys)
        results = [read(cache, slots, groups * 128, torch.float32) for read in implementations("read_mla")]
        for got in results:
            assert torch.equal(got, results[0]), "every implementation reads the same numbers"
        if not packed:
            assert torch.equal(results[0], expected)
            continue
        scale = quantize_groups(latent)[1].repeat_interleave(128, 1)
        error = (results[0] - expected).abs()
        assert (error[:, : groups * 128] <= (latent.float().abs() / 16).maximum(scale * 2.0**-10)).all()
        assert torch.equal(results[0][:, groups * 128 :], keys.to(torch.bfloat16).float())


@FEW
@given(seeds, st.integers(1, 60), dtypes, st.booleans())
def test_index_round_trip(seed, tokens, dtype, packed):
    keys = draw(seed)(tokens, 128, dtype=dtype)
    slots = slots_of(seed, tokens, 192)
    for write in implementations("write_index"):
        cache = torch.zeros(3, 64 * 132, dtype=torch.uint8) if packed else torch.zeros(192, 128, dtype=dtype)
        write(cache, slots, keys)
        for read in implementations("read_index"):
            got = read(cache, slots, torch.float32)
            expected = keys.float()
            if packed:
                values, scale = quantize_groups(keys)
                expected = values.float() * scale
            assert torch.equal(got, expected)


def test_every_finite_e4m3_byte_reads_exactly():
    row = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    cache = torch.zeros(1, packed_mla_bytes(256, 2), dtype=torch.uint8)
    cache[0, :254] = row
    cache[0, 256:264] = torch.tensor([1.0, 0.25]).view(torch.uint8)
    expected = [e4m3(byte) * (1.0 if i < 128 else 0.25) for i, byte in enumerate(row.tolist())]
    for read in implementations("read_mla"):
        assert read(cache, torch.tensor([0]), 256, torch.float32)[0, :254].tolist() == expected


def test_a_hole_reads_some_row():
    cache = torch.arange(12.0).view(4, 3)
    for read in implementations("read_mla"):
        assert torch.equal(read(cache, torch.tensor([2, -1]), 2, torch.float32)[0], cache[2])


def test_a_cache_of_another_width_is_refused():
    for write in implementations("write_mla"):
        with pytest.raises(ValueError, match="a packed row of latent 128 has 140 bytes, the cache has 656"):
            write(torch.zeros(4, 656, dtype=torch.uint8), torch.tensor([0]), torch.zeros(1, 128), torch.zeros(1, 4))
