"""What a Hopper GPU gets: which arguments reach a hand-scheduled kernel, and which go to the next best."""

import pytest
import torch

from tests.ops.support import draw
from tilery.ops import scheduled
from tilery.ops.attention import mla_decode

pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 with Gluon")


def decode(heads=16, width=576, dtype=torch.bfloat16, tokens=2):
    normal = draw(0)
    slots = torch.tensor([[3, 0, -1], [5, -1, -1]])[:tokens]
    return normal(tokens, heads, width, dtype=dtype), normal(8, width, dtype=dtype), slots, 512, 0.1


@pytest.fixture
def seen(monkeypatch):
    """What reaches the kernel for plain rows."""
    from tilery.ops.hopper import sparse_prefill

    calls = []

    def fake(q, kv, indices, *, scale):
        calls.append((q, kv, indices, scale))
        return mla_decode(q, kv, indices.long(), 512, scale), None

    monkeypatch.setattr(sparse_prefill, "sparse_mla_prefill", fake)
    return calls


def test_plain_bf16_rows_reach_their_kernel(seen):
    given = decode()
    out = scheduled.mla_decode(*given)
    ((q, kv, indices, scale),) = seen
    assert (q.dtype, q.shape, kv is given[1], scale) == (torch.bfloat16, (2, 16, 576), True, 0.1)
    assert indices.dtype == torch.int32
    assert torch.equal(indices.long(), given[2])
    assert torch.equal(out, mla_decode(*given))


@pytest.mark.parametrize("changed", [{"heads": 5}, {"width": 520}, {"dtype": torch.float32}])
def test_other_rows_do_not(seen, changed, monkeypatch):
    from tilery.ops import tiled

    monkeypatch.setattr(tiled, "mla_decode", mla_decode)
    given = decode(**changed)
    assert torch.equal(scheduled.mla_decode(*given), mla_decode(*given))
    assert not seen


@pytest.mark.parametrize(("dtype", "taken"), [(torch.bfloat16, True), (torch.float32, False)])
def test_packed_rows_are_for_bf16_queries(dtype, taken, monkeypatch):
    """The kernel rounds nothing that a caller gave in fp32."""
    from tilery.ops import tiled
    from tilery.ops.bench.inputs import packed_rows
    from tilery.ops.hopper import sparse_mla

    q, _, slots, latent, scale = decode(dtype=dtype)
    cache = packed_rows(torch.Generator().manual_seed(1), 8)
    calls = []

    def fake(q, rows, indices, *, scale):
        calls.append((rows.shape, indices.dtype))
        return mla_decode(q[:, 0], cache, indices[:, 0].long(), 512, scale)[:, None], None

    monkeypatch.setattr(sparse_mla, "sparse_mla_decode", fake)
    monkeypatch.setattr(tiled, "mla_decode", mla_decode)
    assert torch.equal(scheduled.mla_decode(q, cache, slots, latent, scale), mla_decode(q, cache, slots, latent, scale))
    assert calls == ([((8, 1, 656), torch.int32)] if taken else [])
