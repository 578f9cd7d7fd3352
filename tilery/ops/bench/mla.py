"""Cases of the attention kernels: sparse decode over packed rows, sparse prefill, dense decode, dense prefill."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from tilery.ops.bench.case import Case, Prepared, relative_error
from tilery.ops.bench.inputs import PAGE, Pages, normal, normal_lengths, packed_rows, unpack_rows

LATENT, ROPE, WIDTH = 512, 64, 576
SCALE = 192**-0.5
BOUND = 3e-3
FLASH_MLA_TOKENS = {4096: 528_300, 8192: 1_053_500, 16384: 2_107_700, 32768: 4_219_000}
"""Tokens of all 128 requests in FlashMLA's runs, by mean context: its rate times its time over the work per token."""
SAMPLED = 6
"""Tokens whose result is compared: the reference's float64 would not fit for all."""


def cases() -> list[Case]:
    return [*sparse_decode(), *sparse_prefill(), *dense_decode(), *dense_prefill()]


def attend(q_HD: Tensor, rows_KD: Tensor, sink_H: Tensor | None = None) -> Tensor:
    """One token's absorbed attention in float64: q [H, 576] over rows [K, 576] -> [H, 512]."""
    scores = q_HD.double() @ rows_KD.T * SCALE
    if sink_H is not None:
        scores = torch.cat((scores, sink_H.double()[:, None]), dim=1)
    weights = scores.softmax(-1)[:, : rows_KD.shape[0]]
    return weights @ rows_KD[:, :LATENT]


def sampled(total: int, generator: torch.Generator) -> list[int]:
    some = torch.randint(0, total, (SAMPLED - 2,), generator=generator, device=generator.device)
    return sorted({0, total - 1, *some.tolist()})


# ---- sparse ----------------------------------------------------------------------------------------------------------


def sparse_decode() -> list[Case]:
    rows: list[tuple[int, int, int, float | None, float | None]] = [
        (64, 128, 2048, 1.25, 1.5), (128, 128, 2048, 1.25, 1.5), (2, 128, 2048, 1.0, 1.3),
        (148, 128, 16384, None, None), (148, 64, 16384, None, None),
    ]  # fmt: skip
    compared = [
        Case(
            "sparse_mla_decode",
            {"batch": batch, "s_q": 2, "heads": heads, "topk": topk},
            functools.partial(make_sparse_decode, batch, 2, heads, topk),
            "bf16",
            must=must,
            aim=aim,
            baseline=("flash_mla_sparse_decode_fp8", {"batch": batch, "s_q": 2, "heads": heads, "topk": topk}),
            cold=True,
            error_bound=BOUND,
        )
        for batch, heads, topk, must, aim in rows
    ]
    few_heads = [
        Case(
            "sparse_mla_decode",
            {"batch": 64, "s_q": s_q, "heads": heads, "topk": 2048},
            functools.partial(make_sparse_decode, 64, s_q, heads, 2048),
            "copy",
            metric="share_of_copy",
            must=0.65 if s_q == 2 else None,
            aim=0.8 if s_q == 2 else None,
            cold=True,
            error_bound=BOUND,
        )
        for heads in (16, 32)
        for s_q in (1, 2)
    ]
    return compared + few_heads


def make_sparse_decode(batch: int, s_q: int, heads: int, topk: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.sparse_mla import sparse_mla_decode

    context = max(32768, 2 * topk)
    pages = batch * context // PAGE if batch * context <= 1 << 22 else (1 << 22) // PAGE
    cache = packed_rows(generator, pages * PAGE)
    tokens = batch * s_q
    indices = torch.empty(tokens, topk, dtype=torch.int32, device="cuda")
    for token in range(tokens):
        # A request's rows lie anywhere: its pages are shuffled over the cache.
        indices[token] = torch.randint(0, pages * PAGE, (topk,), generator=generator, device="cuda")
    indices = indices.view(batch, s_q, topk)
    q = normal(generator, batch, s_q, heads, WIDTH, dtype=torch.bfloat16)
    sink = normal(generator, heads)
    out = torch.empty(batch, s_q, heads, LATENT, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return sparse_mla_decode(q, cache.view(pages, PAGE, -1), indices, scale=SCALE, sink=sink, out=out)[0]

    def error(result: Tensor) -> float:
        found, wanted = result.flatten(0, 1), []
        chosen = sampled(tokens, generator)
        for token in chosen:
            rows = unpack_rows(cache[indices.view(tokens, topk)[token].long()])
            wanted.append(attend(q.flatten(0, 1)[token], rows, sink))
        return relative_error(found[chosen], torch.stack(wanted))

    flops = 2.0 * tokens * topk * heads * (WIDTH + LATENT)
    size = tokens * (topk * (656.0 + 4) + heads * 2 * (WIDTH + LATENT))
    return Prepared(run, error, flops, size, outputs=(out,))


def sparse_prefill() -> list[Case]:
    return [
        Case(
            "sparse_mla_prefill",
            {"s_q": 4096, "s_kv": length, "heads": 128, "topk": 2048},
            functools.partial(make_sparse_prefill, 4096, length, 128, 2048),
            "bf16",
            must=0.97,
            aim=1.08,
            baseline=("flash_mla_sparse_prefill_bf16", {"s_q": 4096, "s_kv": length}),
            error_bound=BOUND,
        )
        for length in (8192, 32768, 65536)
    ]


def make_sparse_prefill(s_q: int, s_kv: int, heads: int, topk: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.sparse_prefill import sparse_mla_prefill

    kv = normal(generator, s_kv, WIDTH, dtype=torch.bfloat16)
    q = normal(generator, s_q, heads, WIDTH, dtype=torch.bfloat16)
    indices = torch.stack(
        [torch.randperm(s_kv, generator=generator, device="cuda")[:topk].to(torch.int32) for _ in range(s_q)]
    )
    out = torch.empty(s_q, heads, LATENT, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return sparse_mla_prefill(q, kv, indices, scale=SCALE, out=out)[0]

    def error(result: Tensor) -> float:
        chosen = sampled(s_q, generator)
        wanted = torch.stack([attend(q[token], kv[indices[token].long()].double()) for token in chosen])
        return relative_error(result[chosen], wanted)

    flops = 2.0 * s_q * topk * heads * (WIDTH + LATENT)
    size = 2.0 * (s_kv * WIDTH + s_q * heads * (WIDTH + LATENT)) + 4.0 * s_q * topk
    return Prepared(run, error, flops, size, outputs=(out,))


# ---- dense -----------------------------------------------------------------------------------------------------------


def dense_decode() -> list[Case]:
    """The bf16 cache beside FlashMLA, the FP8 rows beside our own bf16 kernel at the same lengths."""
    found = []
    for packed, s_q, mean in itertools.product((False, True), (1, 2), (4096, 8192, 16384, 32768)):
        shape = {"batch": 128, "s_q": s_q, "heads": 128, "mean_context": mean}
        found.append(
            Case(
                "dense_mla_decode_fp8" if packed else "dense_mla_decode",
                shape,
                functools.partial(make_dense_decode, 128, s_q, 128, mean, packed),
                "bf16",
                must=1.0 if packed else 0.95,
                aim=1.3 if packed else 1.03,
                baseline=None if packed else ("flash_mla_dense_decode", shape),
                cold=True,
                error_bound=BOUND,
            )
        )
    return found


def make_dense_decode(
    batch: int, s_q: int, heads: int, mean: int, packed: bool, generator: torch.Generator
) -> Prepared:
    from tilery.ops.hopper.dense_mla import dense_mla_decode

    pages = Pages.draw(generator, normal_lengths(generator, batch, FLASH_MLA_TOKENS[mean] / 128, s_q))
    slots = pages.count * PAGE
    plain = None if packed else normal(generator, slots, WIDTH, dtype=torch.bfloat16)
    cache = packed_rows(generator, slots) if plain is None else plain
    q = normal(generator, batch, s_q, heads, WIDTH, dtype=torch.bfloat16)
    out = torch.empty(batch, s_q, heads, LATENT, dtype=torch.bfloat16, device="cuda")

    def attention(rows: Tensor) -> Tensor:
        paged = rows.view(pages.count, PAGE, -1)
        return dense_mla_decode(q, paged, pages.table, pages.lengths, scale=SCALE, out=out)[0]

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for request in sampled(batch, generator):
            rows = cache[pages.slots(request)]
            rows = unpack_rows(rows) if packed else rows.double()
            for query in range(s_q):
                seen = rows[: rows.shape[0] - (s_q - 1 - query)]
                wanted.append(attend(q[request, query], seen))
                found.append(result[request, query])
        return relative_error(torch.stack(found), torch.stack(wanted))

    rival = None
    if packed:
        wide = normal(generator, slots, WIDTH, dtype=torch.bfloat16)
        rival = functools.partial(attention, wide)
    total = float(pages.lengths.sum())
    flops = 2.0 * total * s_q * heads * (WIDTH + LATENT)
    size = total * (656 if packed else 1152) + 2.0 * batch * s_q * heads * (WIDTH + LATENT)
    return Prepared(functools.partial(attention, cache), error, flops, size, outputs=(out,), rival=rival)


def dense_prefill() -> list[Case]:
    asked: dict[int, tuple[float | None, float | None]] = {2048: (None, None), 8192: (0.9, 1.0), 32768: (0.9, 1.0)}
    return [
        Case(
            "mha_prefill",
            {"tokens": tokens, "heads": 128, "d_qk": 192, "d_v": 128},
            functools.partial(make_dense_prefill, tokens, 128),
            "bf16",
            must=must,
            aim=aim,
            baseline=("fa3_prefill_192_128_causal", {"tokens": tokens}),
            error_bound=BOUND,
        )
        for tokens, (must, aim) in asked.items()
    ]


def make_dense_prefill(tokens: int, heads: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.prefill import mha_prefill

    q, k = (normal(generator, tokens, heads, 192, dtype=torch.bfloat16) for _ in range(2))
    v = normal(generator, tokens, heads, 128, dtype=torch.bfloat16)
    out = torch.empty_like(v)

    def run() -> Tensor:
        return mha_prefill(q, k, v, scale=SCALE, causal=True, out=out)[0]

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for token in sampled(tokens, generator):
            head = token % heads
            scores = k[: token + 1, head].double() @ q[token, head].double() * SCALE
            wanted.append(scores.softmax(0) @ v[: token + 1, head].double())
            found.append(result[token, head])
        return relative_error(torch.stack(found), torch.stack(wanted))

    flops = 2.0 * heads * (192 + 128) * tokens * (tokens + 1) / 2
    size = 2.0 * tokens * heads * (192 * 2 + 128 * 2)
    return Prepared(run, error, flops, size, outputs=(out,))
