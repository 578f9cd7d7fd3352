"""The lightning indexer: selection against the engine's operators."""

import pytest
import torch

from tests.ops.kernels.support import gen
from tilery.ops import cache as torch_cache
from tilery.ops import indexer as torch_indexer
from tilery.ops.kernels import indexer
from tilery.ops.kernels.topk import piece_widths


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selects_what_the_engine_selects(device):
    """Packed pages through a block table, against slots; widths as either device would choose them."""
    keys = torch.zeros(4, torch_cache.PAGE * 132, dtype=torch.uint8)
    torch_cache.write_index(keys, torch.arange(256), torch.randn(256, 128, generator=gen()))
    q, weights = torch.randn(2, 4, 128, generator=gen(1)), torch.randn(2, 4, generator=gen(2))
    table, lens = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([128, 70], dtype=torch.int32)
    widths = piece_widths(device, 128, 16)
    got = indexer.select_decode.interpret(q, weights, keys, table, lens, None, None, 64, 16, widths)
    position = torch.arange(128)
    slots = table[:, position // 64].long() * 64 + position % 64
    slots = torch.where(position < lens[:, None], slots, -1)
    wanted = torch_indexer.select_decode(q, weights, keys, slots, 16)
    found = slots.gather(1, got.long())
    assert torch.equal(found.sort(1).values, wanted.sort(1).values)


@pytest.mark.parametrize("width", [0, 16])
def test_prefill_mask_is_the_engines(width):
    q, keys = torch.randn(9, 2, 16, generator=gen()), torch.randn(14, 16, generator=gen(1))
    weights = torch.randn(9, 2, generator=gen(2))
    got = indexer.select_prefill.interpret(q, weights, keys, None, 6, width, together=1)
    assert torch.equal(got, torch_indexer.select_prefill(q, weights, keys, 6))
