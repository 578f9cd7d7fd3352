"""Cases of the indexer: logits in prefill and over pages, and the same with the selection of the best 2,048 fused."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from tilery.ops.bench.case import Case, Prepared, relative_error
from tilery.ops.bench.inputs import PAGE, Pages, even_lengths, normal
from tilery.ops.quant import quantize_groups

HEADS, DIM, TOPK = 64, 128, 2048
SAMPLED = 4


def cases() -> list[Case]:
    """Prefill over a plain run of keys, decode over pages; logits alone, then with the selection."""
    found = []
    for s_q, s_kv in ((2048, 8192), (2048, 65536), (8192, 8192), (8192, 65536)):
        shape = {"s_q": s_q, "s_kv": s_kv}
        for kernel, make, must, aim in (
            ("index_logits", make_prefill, 0.95, 1.15),
            ("index_select", make_prefill_select, 0.95, 1.05),
        ):
            build = functools.partial(make, s_q, s_kv)
            baseline = ("deep_gemm_mqa_logits_prefill_f32", shape)
            found.append(Case(kernel, {**shape, "heads": HEADS}, build, "fp8", must=must, aim=aim, baseline=baseline))
    for batch, next_n, mean in itertools.product((64, 128), (1, 2), (8192, 32768)):
        shape = {"batch": batch, "next_n": next_n, "mean_context": mean}
        baseline = ("deep_gemm_mqa_logits_paged_f32", shape)
        logits = functools.partial(make_logits_paged, batch, next_n, mean)
        select = functools.partial(make_select_paged, batch, next_n, mean)
        found.append(Case("index_logits_paged", shape, logits, "copy", baseline=baseline, cold=True))
        must_be, aimed = (1 / 1.1, 1.0) if mean == 32768 else (None, None)
        found.append(
            Case("index_select_paged", shape, select, "copy", must=must_be, aim=aimed, baseline=baseline, cold=True)
        )
    return sorted(found, key=lambda case: case.kernel)


def queries(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """e4m3 queries [count, 64, 128] and fp32 weights [count, 64] with the queries' scales folded in."""
    values, scale = quantize_groups(normal(generator, count * HEADS, DIM))
    weights = normal(generator, count, HEADS) * scale.view(count, HEADS) * (HEADS * DIM) ** -0.5
    return values.view(count, HEADS, DIM), weights


def keys(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """e4m3 keys [count, 128] and their fp32 scales [count]."""
    values, scale = quantize_groups(normal(generator, count, DIM))
    return values, scale[:, 0].contiguous()


def scores(q_ND: Tensor, weight_N: Tensor, keys_CD: Tensor, scale_C: Tensor) -> Tensor:
    """One token's scores in float64 [C]."""
    products = (keys_CD.double() @ q_ND.double().T).relu_()
    return (products @ weight_N.double()) * scale_C.double()


def sampled(total: int, generator: torch.Generator) -> list[int]:
    some = torch.randint(0, total, (SAMPLED - 2,), generator=generator, device=generator.device)
    return sorted({0, total - 1, *some.tolist()})


def bounds(s_q: int, s_kv: int) -> tuple[Tensor, Tensor, int]:
    """Each row's first key and the one past its last, and the pairs in all: the newest queries of a causal context, as
    in the rival's runs."""
    start = torch.zeros(s_q, dtype=torch.int32, device="cuda")
    end = torch.arange(s_kv - s_q + 1, s_kv + 1, dtype=torch.int32, device="cuda")
    return start, end, int(end.long().sum())


def make_prefill(s_q: int, s_kv: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.index_logits import index_logits

    (q, weights), (k, scale), (start, end, pairs) = queries(generator, s_q), keys(generator, s_kv), bounds(s_q, s_kv)
    out = torch.empty(s_q, s_kv, device="cuda")

    def run() -> Tensor:
        return index_logits(q, weights, k, scale, start, end, out=out, fill=False)

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for token in sampled(s_q, generator):
            seen = int(end[token])
            wanted.append(scores(q[token], weights[token], k[:seen], scale[:seen]))
            found.append(result[token, :seen])
        return relative_error(torch.cat(found), torch.cat(wanted))

    size = s_q * HEADS * (DIM + 4.0) + s_kv * (DIM + 4.0) + 4.0 * pairs
    return Prepared(run, error, 2.0 * HEADS * DIM * pairs, size, outputs=(out,), complete=False)


def selection_error(found: Tensor, wanted_scores: Tensor) -> float:
    """How much less the selected positions score than the best ones could: 0 for a perfect selection.

    (sum of the best k scores - sum of the selected ones' scores) / sum of |best k scores|; infinite if a position is
    chosen twice, is out of range, or the count is wrong.
    """
    found = found[found >= 0].long()
    k = min(TOPK, wanted_scores.numel())
    if found.numel() != k or found.unique().numel() != k or int(found.max()) >= wanted_scores.numel():
        return float("inf")
    best = wanted_scores.topk(k).values
    return float((best.sum() - wanted_scores[found].sum()).abs() / best.abs().sum().clamp_min(1e-30))


def make_prefill_select(s_q: int, s_kv: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.index_select import index_select

    (q, weights), (k, scale), (start, end, pairs) = queries(generator, s_q), keys(generator, s_kv), bounds(s_q, s_kv)
    out = torch.empty(s_q, TOPK, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        return index_select(q, weights, k, scale, start, end, out=out)

    def error(result: Tensor) -> float:
        worst = 0.0
        for token in sampled(s_q, generator):
            seen = int(end[token])
            worst = max(worst, selection_error(result[token], scores(q[token], weights[token], k[:seen], scale[:seen])))
        return worst

    size = s_q * HEADS * (DIM + 4.0) + s_kv * (DIM + 4.0) + 4.0 * s_q * TOPK
    return Prepared(run, error, 2.0 * HEADS * DIM * pairs, size, outputs=(out,))


def paged(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A paged key cache uint8 [count, 64 * 132], and the keys [count * 64, 128] and scales it holds."""
    values, scale = keys(generator, count * PAGE)
    pages = torch.cat((values.view(torch.uint8).view(count, -1), scale.view(torch.uint8).view(count, -1)), dim=1)
    return pages, values, scale


def make_logits_paged(batch: int, next_n: int, mean: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.index_logits import index_logits_paged

    pages = Pages.draw(generator, even_lengths(generator, batch, mean))
    cache, values, scale = paged(generator, pages.count)
    q, weights = queries(generator, batch * next_n)
    out = torch.empty(batch * next_n, pages.table.shape[1] * PAGE, device="cuda")

    def run() -> Tensor:
        return index_logits_paged(q, weights, cache, pages.table, pages.lengths, out=out, fill=False)

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for request in sampled(batch, generator):
            slots = pages.slots(request)
            for query in range(next_n):
                seen = slots[: slots.numel() - (next_n - 1 - query)]
                wanted.append(
                    scores(q[request * next_n + query], weights[request * next_n + query], values[seen], scale[seen])
                )
                found.append(result[request * next_n + query, : seen.numel()])
        return relative_error(torch.cat(found), torch.cat(wanted))

    total = float(pages.lengths.sum())
    size = total * (DIM + 4.0) + batch * next_n * HEADS * (DIM + 4.0) + 4.0 * total * next_n
    return Prepared(run, error, 2.0 * HEADS * DIM * total * next_n, size, outputs=(out,), complete=False)


def make_select_paged(batch: int, next_n: int, mean: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.index_select import index_select_paged

    pages = Pages.draw(generator, even_lengths(generator, batch, mean))
    cache, values, scale = paged(generator, pages.count)
    q, weights = queries(generator, batch * next_n)
    out = torch.empty(batch * next_n, TOPK, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        return index_select_paged(q, weights, cache, pages.table, pages.lengths, out=out)

    def error(result: Tensor) -> float:
        worst = 0.0
        for request in sampled(batch, generator):
            slots = pages.slots(request)
            for query in range(next_n):
                seen = slots[: slots.numel() - (next_n - 1 - query)]
                wanted = scores(
                    q[request * next_n + query], weights[request * next_n + query], values[seen], scale[seen]
                )
                worst = max(worst, selection_error(result[request * next_n + query], wanted))
        return worst

    total = float(pages.lengths.sum())
    size = total * (DIM + 4.0) + batch * next_n * (HEADS * (DIM + 4.0) + 4.0 * TOPK)
    return Prepared(run, error, 2.0 * HEADS * DIM * total * next_n, size, outputs=(out,))
