"""Dense attention on Hopper: what compiles without a GPU, what is refused, and, on a Hopper GPU, numerics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tilery.ops.cache import read_mla, write_mla
from tilery.ops.hopper import dense_mla, prefill
from tilery.ops.hopper.dense_mla import dense_mla_decode
from tilery.ops.hopper.prefill import mha_prefill
from tilery.ops.hopper.variant import Variant, build

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
SCALE = 576**-0.5
SHARED = 227 * 1024
VARIANTS = [*prefill.variants(), *dense_mla.variants()]


@pytest.mark.parametrize("variant", VARIANTS, ids=[v.name for v in VARIANTS])
def test_compiles_for_hopper(variant: Variant) -> None:
    built = build(variant)
    assert built.shared <= SHARED
    assert built.spills == 0
    assert (built.counts["HGMMA"] > 0) == ("combine" not in variant.name)


def test_decode_refuses_what_it_cannot_do() -> None:
    q, cache = torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16), torch.zeros(64, 576, dtype=torch.bfloat16)
    table, lengths = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="q must be"):
        dense_mla_decode(q[:, :, :3], cache, table, lengths, scale=SCALE)
    with pytest.raises(ValueError, match="on a GPU"):
        dense_mla_decode(q, cache, table, lengths, scale=SCALE)


def test_prefill_refuses_what_it_cannot_do() -> None:
    q, v = torch.zeros(4, 2, 192, dtype=torch.bfloat16), torch.zeros(4, 2, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head dimension"):
        mha_prefill(q, q, q, scale=1.0)
    with pytest.raises(ValueError, match="on a GPU"):
        mha_prefill(q, q, v, scale=1.0)


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


def exact_decode(q_SHD: Tensor, rows_LD: Tensor) -> tuple[Tensor, Tensor]:
    tokens, length = q_SHD.shape[0], rows_LD.shape[0]
    scores = torch.einsum("shd,kd->shk", q_SHD.double(), rows_LD.double()) * SCALE
    position = length - tokens + torch.arange(tokens, device=q_SHD.device)
    hidden = torch.arange(length, device=q_SHD.device) > position[:, None]
    scores.masked_fill_(hidden[:, None], float("-inf"))
    return torch.einsum("shk,kd->shd", scores.softmax(-1), rows_LD[:, :512].double()), scores.logsumexp(-1)


@on_hopper
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("lengths", "tokens", "heads", "spread"),
    [
        ([64], 1, 128, 1.0),
        ([1, 64, 65, 1000, 0, 4097, 2], 1, 128, 1.0),
        ([2, 64, 65, 1000, 4097, 3], 2, 128, 6.0),
        ([4, 65, 130, 1000, 700], 4, 16, 1.0),
        ([30000], 1, 32, 1.0),
        ([100 * i + 3 for i in range(150)], 3, 64, 1.0),
    ],
)
def test_decode(lengths: list[int], tokens: int, heads: int, spread: float, packed: bool) -> None:
    """Pages in random order, NaN in every row that no request owns, and in the output."""
    rand = torch.Generator("cuda").manual_seed(1)
    counts = [-(-length // 64) for length in lengths]
    pages = sum(counts) + 3
    order = torch.randperm(pages, generator=rand, device="cuda").int()
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32, device="cuda")
    cache = torch.full((pages * 64, 656), 255, dtype=torch.uint8, device="cuda") if packed else torch.full(
        (pages * 64, 576), float("nan"), dtype=torch.bfloat16, device="cuda")  # fmt: skip
    q = torch.randn(len(lengths), tokens, heads, 576, generator=rand, device="cuda").mul_(spread).bfloat16()
    kept, first = [], 0
    for i, (length, count) in enumerate(zip(lengths, counts)):
        table[i, :count] = order[first : first + count]
        first += count
        position = torch.arange(length, device="cuda")
        slots = table[i].long()[position // 64] * 64 + position % 64
        rows = torch.randn(length, 576, generator=rand, device="cuda")
        write_mla(cache, slots, rows[:, :512], rows[:, 512:])
        kept.append(read_mla(cache, slots, 512, torch.float32))
    out = torch.full((len(lengths), tokens, heads, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
    wanted = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    result, lse = dense_mla_decode(q, cache, table, wanted, scale=SCALE, out=out)
    assert result is out
    for i, rows in enumerate(kept):
        if not len(rows):
            assert bool((out[i] == 0).all())
            assert bool(torch.isneginf(lse[i]).all())
            continue
        exact, exact_lse = exact_decode(q[i], rows)
        assert relative(out[i], exact) < 3e-3
        torch.testing.assert_close(lse[i].double(), exact_lse, rtol=0, atol=1e-4)


@on_hopper
def test_decode_in_a_graph_follows_the_lengths() -> None:
    rand = torch.Generator("cuda").manual_seed(2)
    cache = torch.randn(64 * 64, 576, generator=rand, device="cuda").bfloat16()
    table = torch.arange(64, dtype=torch.int32, device="cuda").view(2, 32)
    q = torch.randn(2, 1, 16, 576, generator=rand, device="cuda").bfloat16()
    lengths = torch.tensor([5, 7], dtype=torch.int32, device="cuda")
    dense_mla_decode(q, cache, table, lengths, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = dense_mla_decode(q, cache, table, lengths, scale=SCALE)
    for now in ([5, 7], [2048, 1], [100, 1999]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        for i, length in enumerate(now):
            exact, _ = exact_decode(q[i], cache[i * 2048 : i * 2048 + length])
            assert relative(out[i], exact) < 3e-3


def exact_prefill(q_THD: Tensor, k_CHD: Tensor, v_CHV: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double().transpose(0, 1) for x in (q_THD, k_CHD, v_CHV))
    scores = q @ k.transpose(1, 2) * 192**-0.5
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        scores.masked_fill_(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1).transpose(0, 1)


def prompt(tokens: int, keys: int, heads: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    rand = torch.Generator("cuda").manual_seed(tokens + keys)
    q, k, v = (torch.randn(rows, heads, dim, generator=rand, device="cuda").mul_(spread).bfloat16()
               for rows, dim in ((tokens, 192), (keys, 192), (keys, 128)))  # fmt: skip
    return q, k, v


@on_hopper
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "causal", "spread"),
    [
        (1, 1, 2, True, 1.0),
        (128, 128, 1, True, 1.0),
        (1000, 1000, 16, True, 2.0),
        (64, 777, 4, True, 1.0),
        (257, 3000, 2, True, 1.0),
        (1, 500, 16, True, 1.0),
        (200, 333, 4, False, 1.0),
    ],
)
def test_prefill(tokens: int, keys: int, heads: int, causal: bool, spread: float) -> None:
    q, k, v = prompt(tokens, keys, heads, spread)
    out = torch.full((tokens, heads, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    for _ in range(2):  # the second call finds the queue as the first one left it
        _, lse = mha_prefill(q, k, v, scale=192**-0.5, causal=causal, out=out)
        exact, exact_lse = exact_prefill(q, k, v, causal)
        assert relative(out, exact) < 3e-3
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)


@on_hopper
def test_prefill_of_several_requests() -> None:
    queries, keys = [5, 128, 0, 300, 1], [5, 700, 0, 300, 64]
    q, k, v = prompt(sum(queries), sum(keys), 4)
    sums = [[sum(counts[:i]) for i in range(6)] for counts in (queries, keys)]
    starts = torch.tensor(sums, dtype=torch.int32, device="cuda")
    out, _ = mha_prefill(q, k, v, scale=192**-0.5, starts=starts, longest=300, longest_keys=700)
    for i, count in enumerate(queries):
        if count:
            rows, seen = slice(sums[0][i], sums[0][i + 1]), slice(sums[1][i], sums[1][i + 1])
            assert relative(out[rows], exact_prefill(q[rows], k[seen], v[seen], True)[0]) < 3e-3
