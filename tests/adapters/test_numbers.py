"""What the entry points return, against plain float64 arithmetic on the libraries' documented layouts.

Here the operators' references stand for the Hopper kernels, so that what an adapter does with layouts, masks and axes
is checked on any machine; with a Hopper GPU the kernels themselves are called.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tilery.adapters import deep_gemm, flash_mla
from tilery.ops import paged, products
from tilery.ops.bench.gemm import product
from tilery.ops.bench.inputs import block_quantised, group_quantised, normal, packed_rows, unpack_rows
from tilery.ops.hopper import dense_mla, gemm, grouped_gemm, index_logits, sparse_mla, sparse_prefill
from tilery.ops.quant import quantize_groups

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if HOPPER else "cpu"
SCALE = 576**-0.5


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    if HOPPER:
        return
    for module, name, reference in (
        (dense_mla, "dense_mla_decode", paged.dense_mla_decode),
        (sparse_mla, "sparse_mla_decode", paged.sparse_mla_decode),
        (sparse_prefill, "sparse_mla_prefill", paged.sparse_mla_prefill),
        (index_logits, "index_logits", paged.index_logits),
        (index_logits, "index_logits_paged", paged.index_logits_paged),
        (gemm, "fp8_gemm", products.fp8_gemm),
        (grouped_gemm, "fp8_gemm_contiguous", products.fp8_grouped_gemm_contiguous),
        (grouped_gemm, "fp8_gemm_masked", products.fp8_grouped_gemm_masked),
    ):
        monkeypatch.setattr(module, name, reference)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(5)


def attend(q_HD: Tensor, rows_KD: Tensor, sink_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token: (out [H, 512], natural log-sum-exp [H]) in float64."""
    scores = q_HD.double() @ rows_KD.double().T * SCALE
    lse = scores.logsumexp(1)
    out = (scores - lse[:, None]).exp() @ rows_KD.double()[:, :512]
    return (out if sink_H is None else out * torch.sigmoid(lse - sink_H.double())[:, None]), lse


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert float((found.double() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_sparse_decode(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch, tokens, heads, width = 2, 2, 64, 128
    rows = packed_rows(generator, 4 * 64)
    q = normal(generator, batch, tokens, heads, 576, dtype=torch.bfloat16)
    indices = torch.randint(0, 256, (batch, tokens, width), generator=generator, device=DEVICE, dtype=torch.int32)
    indices[0, 1, 5:9] = -1
    lengths, sink = torch.tensor([128, 40], dtype=torch.int32, device=DEVICE), normal(generator, heads)
    cache = rows.view(4, 64, 1, 656).view(dtype)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, None, None, 512, None, softmax_scale=SCALE, is_fp8_kvcache=True, indices=indices, attn_sink=sink,
        topk_length=lengths,
    )  # fmt: skip
    assert lse.shape == (batch, heads, tokens)
    for b in range(batch):
        for t in range(tokens):
            named = indices[b, t, : int(lengths[b])]
            wanted, total = attend(q[b, t], unpack_rows(rows[named[named >= 0].long()]), sink)
            close(out[b, t], wanted, 4e-3)
            torch.testing.assert_close(lse[b, :, t].double(), total, atol=2e-3, rtol=0)


def test_dense_decode_is_causal_among_the_newest(generator: torch.Generator) -> None:
    q = normal(generator, 2, 2, 64, 576, dtype=torch.bfloat16)
    cache = normal(generator, 5, 64, 1, 576, dtype=torch.bfloat16)
    table = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([100, 7], dtype=torch.int32, device=DEVICE)
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, None, softmax_scale=SCALE, causal=True)
    for b in range(2):
        rows = cache[table[b].long()].view(-1, 576)
        for t in range(2):
            wanted, total = attend(q[b, t], rows[: int(lengths[b]) - 1 + t])
            close(out[b, t], wanted, 4e-3)
            torch.testing.assert_close(lse[b, :, t].double(), total, atol=2e-3, rtol=0)


def test_sparse_prefill_takes_what_is_out_of_range_for_none(generator: torch.Generator) -> None:
    q, kv = (normal(generator, *shape, dtype=torch.bfloat16) for shape in ((3, 64, 576), (200, 1, 576)))
    indices = torch.randint(0, 200, (3, 1, 128), generator=generator, device=DEVICE, dtype=torch.int32)
    indices[0, 0, 3], indices[1, 0, 64:] = -1, 200
    out, largest, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, SCALE)
    assert largest is None
    for t in range(3):
        named = indices[t, 0]
        wanted, total = attend(q[t], kv[named[(named >= 0) & (named < 200)].long(), 0])
        close(out[t], wanted, 4e-3)
        torch.testing.assert_close(lse[t].double(), total, atol=2e-3, rtol=0)


def test_products(generator: torch.Generator) -> None:
    a, b = group_quantised(generator, 256, 256), block_quantised(generator, 256, 256)
    d = torch.empty(256, 256, dtype=torch.bfloat16, device=DEVICE)
    deep_gemm.fp8_gemm_nt(a, b, d, disable_ue8m0_cast=True)
    close(d, product(*a, *b), 4e-3)
    grouped = (b[0].view(2, 128, 256), b[1].view(2, 1, 2))
    rows = torch.tensor([0] * 120 + [-1] * 8 + [1] * 128, dtype=torch.int32, device=DEVICE)
    sorted_rows = torch.empty(256, 128, dtype=torch.bfloat16, device=DEVICE)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, grouped, sorted_rows, rows)
    close(sorted_rows[:120], product(a[0][:120], a[1][:120], grouped[0][0], grouped[1][0]), 4e-3)
    close(sorted_rows[128:], product(a[0][128:], a[1][128:], grouped[0][1], grouped[1][1]), 4e-3)
    slots = (a[0].view(2, 128, 256), a[1].view(2, 128, 2))
    counts, out = torch.tensor([3, 100], dtype=torch.int32, device=DEVICE), sorted_rows.new_empty(2, 128, 128)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(slots, grouped, out, counts, 50)
    for g, count in enumerate((3, 100)):
        close(out[g, :count], product(slots[0][g, :count], slots[1][g, :count], grouped[0][g], grouped[1][g]), 4e-3)


def scored(q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    return (keys.double() @ q.double().T).relu() @ weights.double() * scales.double()


def test_logits(generator: torch.Generator) -> None:
    count, length = 4, 192
    q = quantize_groups(normal(generator, count * 64, 128))[0].view(count, 64, 128)
    keys, scales = quantize_groups(normal(generator, length, 128))
    weights, scales = normal(generator, count, 64), scales[:, 0].contiguous()
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 5, 64, 9], [192, 70, 65, 9]))
    plain: Any = deep_gemm.fp8_mqa_logits(q, (keys, scales), weights, starts, ends)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if end > start:
            close(plain[row, start:end], scored(q[row], weights[row], keys[start:end], scales[start:end]), 1e-3)
        outside = torch.cat((plain[row, :start], plain[row, end:]))
        assert bool((outside == float("-inf")).all())
    parts = (keys.view(torch.uint8).view(3, -1), scales.view(torch.uint8).view(3, -1))
    cache = torch.cat(parts, 1).view(3, 64, 1, 132)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([100, 30], dtype=torch.int32, device=DEVICE)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 132)
    decode = deep_gemm.fp8_paged_mqa_logits(
        q.view(2, 2, 64, 128), cache, weights, lengths, table, schedule, 100, clean_logits=True
    )
    assert decode.shape == (4, 100)
    for row in range(4):
        seen = int(lengths[row // 2]) - 1 + row % 2
        slots = (table[row // 2].long()[:, None] * 64 + torch.arange(64, device=DEVICE)).flatten()[:seen]
        close(decode[row, :seen], scored(q[row], weights[row], keys[slots], scales[slots]), 1e-3)
        assert bool((decode[row, seen:] == float("-inf")).all())
