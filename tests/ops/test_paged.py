"""Operators over paged caches: references and plain loops, implementations and references, choice, messages."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import replace

import pytest
import torch

from tilery.ops import paged, registry, scheduled_paged
from tilery.ops.cache import read_index, read_mla, write_index, write_mla
from tilery.ops.quant import E4M3
from tilery.ops.registry import Platform

REFERENCE = registry.select(overrides={"*": "reference"})
OPS = registry.select()
CUDA = Platform("cuda", "sm_90", True, 1)
INDEX = ["index_logits", "index_logits_paged", "index_select", "index_select_paged"]
ATTENTION = ["dense_mla_decode", "sparse_mla_decode", "sparse_mla_prefill", "mha_prefill_varlen"]
NAN, INF = float("nan"), float("inf")

tiled = pytest.mark.skipif(OPS.chosen["index_logits"] != "tile", reason="no C++ compiler here")
HERE = ["batched", pytest.param("tile", marks=tiled)]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(*dims):
    return torch.tensor(dims, dtype=torch.int32)


def latent_rows(count, packed=False, seed=1):
    rows = randn(seed, count, 576)
    if not packed:
        return rows
    cache = torch.zeros(count, 656, dtype=torch.uint8)
    write_mla(cache, torch.arange(count), rows[:, :512], rows[:, 512:])
    return cache


def dense(lengths, tokens=1, heads=2, packed=False):
    """Rows behind the lengths are NaN (plain rows), and entries of the table behind them are no pages."""
    count, pages = len(lengths), max(1, -(-max(lengths) // 64))
    cache = latent_rows(64 * pages * count, packed).view(pages * count, 64, -1)
    own = torch.randperm(pages * count, generator=torch.Generator().manual_seed(3)).view(count, pages).int()
    for b, length in enumerate(lengths):
        if not packed:
            for p in range(pages):
                cache[own[b, p], max(0, length - 64 * p) :] = NAN
        own[b, -(-length // 64) :] = 1 << 30
    return (randn(4, count, tokens, heads, 576), cache, own, numbers(*lengths)), {"scale": 0.05}


def sparse(lead=(3,), heads=2, width=70, packed=True, sink=True, lengths=True):
    """Holes; a token without rows; rows that nobody names, or behind the lengths, are NaN."""
    rows = latent_rows(128, packed)
    draw = torch.Generator().manual_seed(5)
    tokens = math.prod(lead)
    indices = torch.stack([torch.randperm(128, generator=draw)[:width] for _ in range(tokens)]).int()
    indices[torch.rand(tokens, width, generator=draw) < 0.3] = -1
    indices[tokens // 2] = -1
    counts = numbers(*[(width, 0, 64, 1, 65)[t % 5] for t in range(tokens)]).view(lead)
    options = {"scale": 0.05, "sink": randn(6, heads) * 3 if sink else None, "lengths": counts if lengths else None}
    if not packed:
        kept = indices.masked_fill(torch.arange(width) >= counts.view(-1, 1), -1) if lengths else indices
        unnamed = torch.ones(128, dtype=torch.bool)
        unnamed[kept[kept >= 0].long()] = False
        rows[unnamed] = NAN
    return (randn(7, *lead, heads, 576), rows, indices.view(*lead, width)), options


def varlen(queries, keys, causal=True, heads=2, dims=(24, 16)):
    q, k, v = (
        randn(8, sum(queries), heads, dims[0]),
        randn(9, sum(keys), heads, dims[0]),
        randn(10, sum(keys), heads, 1),
    )
    v = v * randn(11, dims[1])
    options = {"scale": 0.2, "causal": causal}
    if len(queries) > 1:
        starts = torch.tensor([[0, *queries], [0, *keys]]).cumsum(1).int()
        options |= {"starts": starts, "longest": max(queries), "longest_keys": max(keys)}
    return (q, k, v), options


def ranges(bounds, length, heads=4, tied=False):
    tokens = len(bounds)
    starts, ends = (numbers(*side) for side in zip(*bounds))
    scales = torch.rand(length, generator=torch.Generator().manual_seed(12)) + 0.5
    keys = randn(13, length, 128).to(E4M3)
    if tied:  # a third of the keys score 0, the others come in threes
        scales[::3] = 0
        keys = keys.view(torch.uint8)[torch.arange(length) // 9 * 9].view(E4M3)
        scales[torch.arange(length) % 3 > 0] = 1.0
    q = randn(14, tokens, heads, 128).to(E4M3)
    return q, randn(15, tokens, heads) / 100, keys, scales, starts, ends


def pages(lengths, step=1, heads=4):
    count, width = len(lengths), max(1, -(-max(lengths) // 64))
    cache = torch.zeros(count * width, 64 * 132, dtype=torch.uint8)
    write_index(cache, torch.arange(64 * len(cache)), randn(16, 64 * len(cache), 128))
    own = torch.randperm(len(cache), generator=torch.Generator().manual_seed(17)).view(count, width).int()
    for b, length in enumerate(lengths):
        own[b, -(-length // 64) :] = 1 << 30
    q = randn(18, count * step, heads, 128).to(E4M3)
    return q, randn(19, count * step, heads) / 100, cache, own, numbers(*lengths)


def case(name):
    """(arguments, options) of an operator, ragged."""
    return {
        "dense_mla_decode": lambda: dense([65, 0, 64, 1, 130], tokens=2),
        "sparse_mla_decode": lambda: sparse((2, 3)),
        "sparse_mla_prefill": lambda: sparse((5,)),
        "mha_prefill_varlen": lambda: varlen([5, 0, 9, 1], [7, 3, 9, 65]),
        "index_logits": lambda: (ranges([(0, 130), (5, 5), (64, 65), (3, 64), (0, 1)], 130), {}),
        "index_logits_paged": lambda: (pages([65, 0, 64, 1, 130], step=2), {}),
        "index_select": lambda: (ranges([(0, 130), (5, 5), (64, 65), (3, 64), (0, 1)], 130, tied=True), {"k": 20}),
        "index_select_paged": lambda: (pages([65, 0, 64, 1, 130], step=3), {"k": 20}),
    }[name]()


def having(implementation):
    """Our operators through one implementation; what the tile language does not have, through torch."""
    names = dict.fromkeys(ATTENTION + INDEX, implementation)
    if implementation == "tile":
        names["mha_prefill_varlen"] = "batched"
    return registry.select(overrides=names)


# ---- references against plain loops ----------------------------------------------------------------------------------


def softmax_loop(q, keys, values, scale, sink=None):
    """(output, log-sum-exp) of one query over lists of keys and values, score by score."""
    if not len(keys):
        return torch.zeros(values.shape[-1]).double(), -INF
    scores = [float(torch.dot(q.double(), key.double())) * scale for key in keys]
    total = sum(math.exp(s) for s in scores)
    beside = total + (math.exp(sink) if sink is not None else 0.0)
    mixed = sum(math.exp(s) / beside * value.double() for s, value in zip(scores, values))
    return mixed, math.log(total)


def same(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_dense_decode_is_attention_over_the_pages(packed):
    lengths, tokens = [0, 1, 64, 65], 3
    (q, cache, own, counts), options = dense(lengths, tokens, packed=packed)
    out, lse = REFERENCE.dense_mla_decode(q, cache, own, counts, **options)
    assert out.dtype == lse.dtype == torch.float32
    for b, length in enumerate(lengths):
        numbers_of = [int(own[b, p // 64]) * 64 + p % 64 for p in range(length)]
        rows = read_mla(cache.view(-1, cache.shape[-1]), torch.tensor(numbers_of).long(), 512, torch.float64)
        for s in range(tokens):
            seen = rows[: max(0, length - tokens + 1 + s)]
            mixed, total = softmax_loop(q[b, s, 1], seen, seen[:, :512], 0.05)
            same(out[b, s, 1], mixed)
            same(lse[b, s, 1], total)
    assert not out.isnan().any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_sparse_attention_is_attention_over_the_named_rows(packed, sink, lengths):
    (q, rows, indices), options = sparse((5,), width=67, packed=packed, sink=sink, lengths=lengths)
    out, lse = REFERENCE.sparse_mla_prefill(q, rows, indices, **options)
    for t in range(5):
        count = int(options["lengths"][t]) if lengths else 67
        named = [i for i in indices[t, :count].tolist() if i >= 0]
        kept = read_mla(rows, torch.tensor(named).long(), 512, torch.float64)
        mixed, total = softmax_loop(q[t, 0], kept, kept[:, :512], 0.05, float(options["sink"][0]) if sink else None)
        same(out[t, 0], mixed)
        same(lse[t, 0], total)
    options["lengths"] = options["lengths"].view(1, 5) if lengths else None
    again, _ = REFERENCE.sparse_mla_decode(q[None], rows, indices[None], **options)
    assert torch.equal(again[0], out)


def test_sinks_at_the_ends_of_the_numbers():
    (q, rows, indices), options = sparse((3,), lengths=False, sink=False)
    plain, lse = REFERENCE.sparse_mla_prefill(q, rows, indices, **options)
    for sink, expected in ((-INF, plain), (INF, torch.zeros_like(plain))):
        for name in ("reference", "batched"):
            out, same_lse = having(name).sparse_mla_prefill(q, rows, indices, scale=0.05, sink=torch.full((2,), sink))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(same_lse, lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_requests_end_to_end_are_attention_of_their_own(causal):
    queries, keys = [3, 0, 4, 1], [5, 2, 4, 1]
    (q, k, v), options = varlen(queries, keys, causal)
    out, lse = REFERENCE.mha_prefill_varlen(q, k, v, **options)
    first, base = 0, 0
    for count, context in zip(queries, keys):
        for t in range(count):
            seen = slice(base, base + (context - count + t + 1 if causal else context))
            mixed, total = softmax_loop(q[first + t, 1], k[seen, 1], v[seen, 1], 0.2)
            same(out[first + t, 1], mixed)
            same(lse[first + t, 1], total)
        first, base = first + count, base + context


def test_a_chunk_is_its_prefix_and_itself():
    (q, k, v), options = varlen([6], [20])
    whole, total = REFERENCE.mha_prefill_varlen(q, k, v, **options)
    prefix, own = (
        REFERENCE.mha_prefill_varlen(q, k[some], v[some], scale=0.2, causal=causal)
        for some, causal in ((slice(0, 14), False), (slice(14, 20), True))
    )
    joined = torch.logaddexp(prefix[1], own[1])
    torch.testing.assert_close(joined, total)
    parts = [part * (lse - joined).exp()[..., None] for part, lse in (prefix, own)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    mask = torch.ones(6, 20, dtype=torch.bool)
    torch.testing.assert_close(whole, REFERENCE.mha_prefill(q, k, v, mask, 0.2), rtol=1e-5, atol=1e-6)


def score_loop(q, weights, key, scale):
    products = [float(torch.dot(head, key.double())) for head in q.double()]
    return sum(w * max(p, 0.0) for w, p in zip(weights.tolist(), products)) * float(scale)


def test_scores_are_weighted_products_inside_the_ranges():
    given = ranges([(0, 66), (0, 0), (64, 65), (5, 3), (1, 64)], 66, heads=3)
    q, weights, keys, scales, starts, ends = given
    out = torch.full((5, 70), NAN)[:, :66]
    assert REFERENCE.index_logits(*given, out) is out
    for t in range(5):
        for at in range(66):
            if not int(starts[t]) <= at < int(ends[t]):
                assert out[t, at] == -INF
            elif at % 13 == 0 or at > 60:
                same(out[t, at], score_loop(q[t], weights[t], keys[at], scales[at]))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_paged_scores_end_where_each_token_stands(step):
    lengths = [0, 1, 64, 65]
    q, weights, cache, own, counts = pages(lengths, step, heads=3)
    limits = torch.full((4 * step,), 99, dtype=torch.int32)
    out = REFERENCE.index_logits_paged(q, weights, cache, own, counts, limits=limits)
    assert out.shape == (4 * step, 128)
    for b, length in enumerate(lengths):
        for s in range(step):
            row, end = b * step + s, length - step + 1 + s
            assert int(limits[row]) == end
            assert (out[row, max(end, 0) :] == -INF).all()
            for at in {0, end // 2, end - 1} if end > 0 else ():
                slot = torch.tensor([int(own[b, at // 64]) * 64 + at % 64])
                key = read_index(cache, slot, torch.float32)[0]
                same(out[row, at], score_loop(q[row], weights[row], key, 1.0))


def winners(scores, k):
    """By a sort of (score, position), lowest position first among equals."""
    order = sorted((-score, at) for at, score in enumerate(scores.tolist()) if score != -INF)
    return sorted(at for _, at in order[:k])


def chosen(row):
    found = [at for at in row.tolist() if at >= 0]
    assert len(set(found)) == len(found)
    return sorted(found)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_selections_are_the_best_and_of_equals_the_first(k):
    given = ranges([(0, 130), (5, 5), (64, 65), (3, 64), (0, 1)], 130, tied=True)
    scores, out = REFERENCE.index_logits(*given), REFERENCE.index_select(*given, k=k)
    assert (out.dtype, out.shape) == (torch.int32, (5, k))
    assert [chosen(row) for row in out] == [winners(row, k) for row in scores]
    assert len(set(scores[0].tolist())) < 90, "there are ties"
    own = pages([65, 0, 64, 1], step=3)
    scores, out = REFERENCE.index_logits_paged(*own), REFERENCE.index_select_paged(*own, k=k)
    assert [chosen(row) for row in out] == [winners(row, k) for row in scores]


# ---- implementations against references ------------------------------------------------------------------------------


def compare(name, got, expected):
    """Scores and attention of fp32 operands within the order of sums, so that equal sets are chosen."""
    if "select" in name:
        assert [chosen(row) for row in got.cpu()] == [chosen(row) for row in expected]
        return
    for x, y in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, expected))):
        torch.testing.assert_close(x.cpu().float(), y.float(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("name", ATTENTION + INDEX)
def test_implementations(name, implementation):
    """Ragged; results are written where asked, over NaN."""
    operator = getattr(having(implementation), name)
    given, options = case(name)
    expected = getattr(REFERENCE, name)(*given, **options)
    compare(name, operator(*given, **options), expected)
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    out = torch.full(first.shape, -7 if "select" in name else NAN, dtype=first.dtype)
    got = operator(*given, **options, out=out)
    assert (got if isinstance(got, torch.Tensor) else got[0]) is out
    compare(name, got, expected)


@pytest.mark.parametrize("implementation", HERE)
def test_other_forms(implementation):
    """Results in bf16, no sink, no lengths; ends of paged ranges; in torch, plain rows in bf16 with NaN beside those
    that are named, and packed pages."""
    ops = having(implementation)
    (q, rows, indices), options = sparse((5,), packed=implementation == "tile", sink=False, lengths=False)
    if implementation != "tile":  # where each dtype is one kernel more to compile
        q, rows = q.bfloat16(), rows.bfloat16()
        given, scale = dense([65, 0, 64, 1, 130], tokens=2, packed=True)
        compare("dense", ops.dense_mla_decode(*given, **scale), REFERENCE.dense_mla_decode(*given, **scale))
    outs = [torch.full((5, 2, 512), NAN, dtype=torch.bfloat16) for _ in range(2)]
    got, expected = (o.sparse_mla_prefill(q, rows, indices, **options, out=x) for o, x in zip((ops, REFERENCE), outs))
    torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=4e-3)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    given = pages([65, 3], step=2)
    both = [torch.zeros(4, dtype=torch.int32) for _ in range(2)]
    ops.index_logits_paged(*given, limits=both[0])
    REFERENCE.index_logits_paged(*given, limits=both[1])
    assert both[0].tolist() == both[1].tolist() == [64, 65, 2, 3]
    (q, k, v), _ = varlen([3], [4])
    assert ops.mha_prefill_varlen(q, k, v, scale=1.0, causal=False)[0].shape == (3, 2, 16)


@pytest.mark.parametrize("implementation", ["reference", *HERE])
def test_nothing_to_do(implementation):
    """No tokens, no requests, no rows, no keys, empty tables and lists."""
    ops = having(implementation)
    (q, cache, own, counts), _ = dense([3, 2])
    out, lse = ops.dense_mla_decode(q, cache, own[:, :0], counts * 0, scale=1.0)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert ops.dense_mla_decode(q[:0], cache, own[:0], counts[:0], scale=1.0)[1].shape == (0, 1, 2)
    assert ops.dense_mla_decode(q[:, :0], cache, own, counts, scale=1.0)[0].shape == (2, 0, 2, 512)
    (q, rows, indices), _ = sparse((2,))
    for some, named in ((rows, indices[:, :0]), (rows[:0], indices * 0 - 1)):
        out, lse = ops.sparse_mla_decode(q, some, named, scale=1.0, sink=torch.zeros(2))
        assert (out == 0).all()
        assert (lse == -INF).all()
    (q, k, v), _ = varlen([3], [3])
    out, lse = ops.mha_prefill_varlen(q, k[:0], v[:0], scale=1.0, causal=False)
    assert (out == 0).all()
    assert (lse == -INF).all()
    q, weights, keys, scales, starts, ends = ranges([(0, 0), (0, 0)], 4)
    assert ops.index_logits(q, weights, keys[:0], scales[:0], starts, ends).shape == (2, 0)
    assert ops.index_select(q, weights, keys[:0], scales[:0], starts, ends, k=3).tolist() == [[-1] * 3] * 2
    assert ops.index_select(q[:0], weights[:0], keys, scales, starts[:0], ends[:0], k=3).shape == (0, 3)
    q, weights, cache, own, counts = pages([0, 0])
    assert ops.index_select_paged(q, weights, cache, own[:, :0], counts, k=3).tolist() == [[-1] * 3] * 2
    assert ops.index_logits_paged(q[:0], weights[:0], cache, own[:0], counts[:0]).shape == (0, 64)
    assert (ops.index_logits_paged(q, weights, cache[:0], own, counts) == -INF).all()


def test_slices():
    assert [*paged.slices(5, 10, 25)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [*paged.slices(2, 10, 5)] == [slice(0, 1), slice(1, 2)]
    assert [*paged.slices(3, 0)] == [*paged.slices(0, 4)] == []


def test_selections_a_slice_at_a_time(monkeypatch):
    given, own = ranges([(0, 130)] * 5, 130), pages([65, 0, 64, 1, 130], step=2)
    whole = (REFERENCE.index_select(*given, k=9), REFERENCE.index_select_paged(*own, k=9))
    monkeypatch.setattr(paged.slices, "__defaults__", (1500,))
    assert [*paged.slices(5, 520)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr(scheduled_paged, "WORKSPACE_BYTES", 1 << 18)
    assert torch.equal(REFERENCE.index_select(*given, k=9), whole[0])
    assert torch.equal(REFERENCE.index_select_paged(*own, k=9), whole[1])
    for name in ATTENTION + INDEX:
        test_implementations(name, "batched")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", ["batched", "tile", "hopper"])
@pytest.mark.parametrize("name", ATTENTION + INDEX)
def test_on_a_gpu(name, implementation):
    """All ways there, at sizes that Hopper's kernels take, in bf16."""
    platform = Platform.detect("cuda")
    rows = {row.name: row for info in registry.list_operators(platform) if info.name == name
            for row in info.implementations}  # fmt: skip
    if implementation not in rows or not rows[implementation].available:
        pytest.skip(f"no {implementation!r} of {name!r} here")
    given, options = {
        "dense_mla_decode": lambda: dense([65, 0, 64, 1, 130], tokens=2, heads=16),
        "sparse_mla_decode": lambda: sparse((2, 3), heads=64),
        "sparse_mla_prefill": lambda: sparse((5,), heads=64, packed=False),
        "mha_prefill_varlen": lambda: varlen([5, 0, 9, 1], [7, 3, 9, 65], dims=(192, 128)),
        "index_logits": lambda: (ranges([(0, 130), (5, 5), (64, 65), (3, 64), (0, 1)], 130, heads=16), {}),
        "index_logits_paged": lambda: (pages([65, 0, 64, 1, 130], step=2, heads=16), {}),
        "index_select": lambda: (ranges([(0, 130), (5, 5), (64, 65)], 130, heads=16), {"k": 200}),
        "index_select_paged": lambda: (pages([65, 0, 64, 1, 130], step=3, heads=16), {"k": 200}),
    }[name]()
    floats = {torch.float32: torch.bfloat16} if name in ATTENTION else {}
    given = tuple(x.to(floats.get(x.dtype, x.dtype)) for x in given)
    expected = getattr(REFERENCE, name)(*given, **options)
    there = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    got = getattr(registry.select(platform, {name: implementation}), name)(*(x.cuda() for x in given), **there)
    if "select" in name:  # k is more than any range holds, so rounding cannot choose
        compare(name, got, expected)
        return
    for x, y in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, expected))):
        finite = y.float().isfinite()
        assert torch.equal(x.cpu().float()[~finite], y.float()[~finite])
        x, y = x.cpu().double()[finite], y.double()[finite]
        assert float((x - y).norm() / y.norm()) < 5e-3


# ---- which implementation runs ---------------------------------------------------------------------------------------


def test_choice_on_a_cpu():
    chosen = registry.select(Platform("cpu", "AVX2", True, 1)).chosen
    assert {chosen[name] for name in ATTENTION + INDEX} <= {"tile", "batched"}
    assert chosen["mha_prefill_varlen"] == "batched"
    (info,) = [info for info in registry.list_operators() if info.name == "index_select_paged"]
    assert ("hopper", "needs cuda, this is cpu") in [(row.name, row.reason) for row in info.implementations]


def test_choice_without_a_compiler(monkeypatch):
    monkeypatch.setenv("TILERY_NO_NATIVE", "1")
    chosen = registry.select(Platform("cpu", "AVX2", True, 1)).chosen
    assert {chosen[name] for name in ATTENTION + INDEX} == {"batched"}


def test_choice_on_gpus():
    pytest.importorskip("triton")
    hopper, ada, ampere = (registry.select(replace(CUDA, isa=isa)).chosen for isa in ("sm_90", "sm_89", "sm_80"))
    assert {hopper[name] for name in ATTENTION + INDEX} == {"hopper"}
    assert {ada[name] for name in ATTENTION[:3] + INDEX} == {ampere[name] for name in ATTENTION[:3]} == {"tile"}
    assert {ampere[name] for name in INDEX} == {ada["mha_prefill_varlen"], ampere["mha_prefill_varlen"]} == {"batched"}
    assert registry.select(replace(CUDA, isa="sm_120")).chosen["index_logits"] == "tile"
    (info,) = [i for i in registry.list_operators(replace(CUDA, isa="sm_80")) if i.name == "index_logits"]
    reasons = {row.name: row.reason for row in info.implementations}
    assert reasons["tile"] == "needs compute capability 8.9 (sm_89) for e4m3, this is sm_80"
    assert reasons["hopper"] == "needs compute capability 9.0 (sm_90), this is sm_80"


HOSTS = {
    "dense_mla_decode": ("dense_mla", "dense_mla_decode"),
    "sparse_mla_decode": ("sparse_mla", "sparse_mla_decode"),
    "sparse_mla_prefill": ("sparse_prefill", "sparse_mla_prefill"),
    "mha_prefill_varlen": ("prefill", "mha_prefill"),
    "index_logits": ("index_logits", "index_logits"),
    "index_logits_paged": ("index_logits", "index_logits_paged"),
    "index_select": ("index_select", "index_select"),
    "index_select_paged": ("index_select", "index_select_paged"),
}


def hopper_case(name):
    given, options = {
        "dense_mla_decode": lambda: dense([65, 0], tokens=2, heads=16),
        "sparse_mla_decode": lambda: sparse((2, 3), heads=16),
        "sparse_mla_prefill": lambda: sparse((5,), heads=16, packed=False),
        "mha_prefill_varlen": lambda: varlen([5, 1], [7, 3], dims=(192, 128)),
        "index_logits": lambda: (ranges([(0, 130), (5, 5)], 130, heads=16), {"fill": 1}),
        "index_logits_paged": lambda: (pages([65, 1], step=4, heads=16), {"fill": 0, "limits": numbers(*range(8))}),
        "index_select": lambda: (ranges([(0, 130), (5, 5)], 130, heads=16), {"k": 9}),
        "index_select_paged": lambda: (pages([65, 1], step=4, heads=16), {"k": 9}),
    }[name]()
    return tuple(x.bfloat16() if x.dtype == torch.float32 and name in ATTENTION else x for x in given), options


@pytest.mark.parametrize("name", HOSTS)
def test_what_is_for_hopper_reaches_its_kernels(name, monkeypatch):
    """With the host function's names: the contract's arguments are bound to its signature."""
    pytest.importorskip("triton.experimental.gluon")
    module, function = HOSTS[name]
    host = importlib.import_module(f"tilery.ops.hopper.{module}")
    signature = inspect.signature(getattr(host, function))
    seen = []
    monkeypatch.setattr(host, function, lambda *given, **named: seen.append(signature.bind(*given, **named).arguments))
    given, options = hopper_case(name)
    wrapper = getattr(scheduled_paged, f"{name}_hopper")
    wrapper(*given, **options)
    assert len(seen) == 1
    for key, value in inspect.signature(getattr(paged, name)).bind(*given, **options).arguments.items():
        assert seen[0][key] is value
    ours = list(inspect.signature(getattr(paged, name)).parameters)
    assert ours == [key for key in signature.parameters if key != "config"]


@tiled
@pytest.mark.parametrize("name", HOSTS)
def test_what_is_not_for_hopper_goes_to_the_next_best(name, monkeypatch):
    """fp32 queries; four heads of the indexer."""
    pytest.importorskip("triton.experimental.gluon")
    module, function = HOSTS[name]
    monkeypatch.setattr(importlib.import_module(f"tilery.ops.hopper.{module}"), function, None)
    given, options = case(name)
    got = getattr(scheduled_paged, f"{name}_hopper")(*given, **options)
    compare(name, got, getattr(REFERENCE, name)(*given, **options))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index_select", {"k": 2049}),
        ("index_select_paged", {"k": 2049}),
        ("index_logits_paged", {"block_table": torch.zeros(1, 2, dtype=torch.int32)}),  # eight tokens of one request
        ("dense_mla_decode", {"out": torch.zeros(2, 2, 16, 512)}),
        ("dense_mla_decode", {"q": torch.zeros(2, 65, 16, 576).bfloat16()}),
        ("dense_mla_decode", {"q": torch.zeros(2, 2, 8, 576).bfloat16()}),
        ("dense_mla_decode", {"block_table": torch.zeros(2, 0, dtype=torch.int32)}),
        ("sparse_mla_decode", {"cache": torch.zeros(64, 576).bfloat16()}),
        ("sparse_mla_prefill", {"indices": torch.zeros(5, 0, dtype=torch.int32)}),
        ("sparse_mla_prefill", {"kv": torch.zeros(64 * 576 + 1).bfloat16()[1:].view(64, 576)}),
        ("index_logits", {"weights": torch.zeros(33)[1:].view(2, 16)}),
    ],
)
def test_what_a_kernel_does_not_take(name, change, monkeypatch):
    pytest.importorskip("triton.experimental.gluon")
    module, function = HOSTS[name]
    monkeypatch.setattr(importlib.import_module(f"tilery.ops.hopper.{module}"), function, None)
    seen = []
    monkeypatch.setattr(scheduled_paged, name, lambda *given, **options: seen.append(given))
    given, options = hopper_case(name)
    arguments = inspect.signature(getattr(paged, name)).bind(*given, **options)
    arguments.arguments.update(change)
    getattr(scheduled_paged, f"{name}_hopper")(*arguments.args, **arguments.kwargs)
    assert len(seen) == 1


# ---- messages --------------------------------------------------------------------------------------------------------


def refused(name, match, *given, **named):
    """By the reference and by all portable implementations."""
    functions = [getattr(REFERENCE, name), getattr(scheduled_paged, f"{name}_batched")]
    functions += [getattr(scheduled_paged, name)] if hasattr(scheduled_paged, name) else []
    for function in functions:
        with pytest.raises(ValueError, match=match):
            function(*given, **named)


def test_messages_of_attention():
    (q, cache, own, counts), _ = dense([65, 3])
    name = "dense_mla_decode"
    refused(name, r"^q must be dense bfloat16 or float32 \[2, any, any, 576\], not float16 \[2, 1, 2, 576\]$",
            q.half(), cache, own, counts, scale=1.0)  # fmt: skip
    refused(name, r"^cache must be dense uint8 \[any, 64, 656\], not uint8 \[4, 64, 576\]$",
            q, cache.to(torch.uint8), own, counts, scale=1.0)  # fmt: skip
    refused(name, r"^cache must be whole pages of 64 rows, got 63 rows$", q, cache[0, 1:], own, counts, scale=1.0)
    refused(name, r"^block_table must be int32 \[any, any\], not int64 \[2, 2\]$",
            q, cache, own.long(), counts, scale=1.0)  # fmt: skip
    refused(name, r"^lengths must be dense int32 \[2\], not int32 \[1\]$", q, cache, own, counts[:1], scale=1.0)
    refused(name, r"^scale must be positive, got 0.0$", q, cache, own, counts, scale=0.0)
    refused(name, r"^out must be dense bfloat16 or float32 \[2, 1, 2, 512\], not float32 \[2, 1, 2, 576\]$",
            q, cache, own, counts, scale=1.0, out=q)  # fmt: skip
    (q, rows, indices), _ = sparse((2,))
    for name in ("sparse_mla_decode", "sparse_mla_prefill"):
        refused(name, r"^indices must be dense int32 \[2, any\], not int64", q, rows, indices.long(), scale=1.0)
        refused(name, r"^sink must be dense float32 \[2\]", q, rows, indices, scale=1.0, sink=torch.ones(3))
        refused(name, r"^lengths must be dense int32 \[2\]", q, rows, indices, scale=1.0, lengths=numbers(1))
    refused("sparse_mla_decode", r"^q must be \[\.\., H, 576\], not \[2, 576\]$", q[0], rows, indices, scale=1.0)
    refused("sparse_mla_prefill", r"^q must be \[T, H, 576\] and kv \[L, ..\], not \[1, 2, 2, 576\] and \[128, 656\]$",
            q[None], rows, indices[None], scale=1.0)  # fmt: skip
    (q, k, v), _ = varlen([3], [3])
    name = "mha_prefill_varlen"
    refused(name, r"^k must be dense float32 \[any, 2, 24\], not bfloat16", q, k.bfloat16(), v, scale=1.0)
    refused(name, r"^3 queries cannot be the newest of 2 keys$", q, k[:2], v[:2], scale=1.0)
    refused(name, r"^starts must be dense int32 \[2, any\]", q, k, v, scale=1.0, starts=numbers(0, 3))
    refused(name, r"^starts needs longest and longest_keys$", q, k, v, scale=1.0, starts=numbers([0, 3], [0, 3]))


def test_messages_of_the_indexer():
    given = ranges([(0, 5), (0, 6)], 6)
    q, weights, keys, scales, starts, ends = given
    for name in ("index_logits", "index_select"):
        refused(name, r"^q must be dense float8_e4m3fn \[any, any, 128\], not float32", q.float(), *given[1:])
        refused(name, r"^weights must be dense float32 \[2, 4\], not", q, weights[:, :3], *given[2:])
        refused(name, r"^keys must be dense float8_e4m3fn \[any, 128\], not", q, weights, keys[:, :64], *given[3:])
        refused(name, r"^key_scales must be dense float32 \[6\], not", *given[:3], scales[:5], starts, ends)
        refused(name, r"^starts must be dense int32 \[2\], not int64", *given[:4], starts.long(), ends)
    refused("index_logits", r"^fill must be 0, 1 or 2, got 3$", *given, fill=3)
    refused("index_logits", r"^out must have dense rows$", *given, out=torch.zeros(6, 2).T)
    refused("index_select", r"^k must be at least 1, got 0$", *given, k=0)
    refused("index_select", r"^out must be dense int32 \[2, 4\], not int64", *given, k=4, out=torch.zeros(2, 4).long())
    q, weights, cache, own, counts = given = pages([5, 6, 7], step=2)
    for name in ("index_logits_paged", "index_select_paged"):
        refused(name, r"^q must have the same number of rows for each of 3 requests, got 5$",
                q[:5], weights[:5], cache, own, counts)  # fmt: skip
        refused(name, r"^q must have the same number of rows for each of 0 requests, got 6$",
                q, weights, cache, own[:0], counts[:0])  # fmt: skip
        refused(name, r"^cache must be dense uint8 \[any, 8448\], not", q, weights, cache[:, 4:], own, counts)
    refused("index_logits_paged", r"^limits must be dense int32 \[6\], not int32 \[3\]$", *given, limits=counts)
