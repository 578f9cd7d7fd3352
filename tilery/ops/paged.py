"""Attention and selection over paged caches, as serving engines call them: operators with results beside the output.

Pages hold 64 rows. A row's number is page * 64 + offset; a request's block table lists its pages in order. MLA rows
are floats [.., 576] or packed bytes [.., 656] (see `cache.py`), 512 values of latent and 64 of rope; indexer pages are
packed bytes [C, 64 * 132]. Tables, lengths, ranges and indices are int32 and lie on the device; entries of a table
behind a request's length are not read, and may be anything.

Log-sum-exps are natural, fp32; an empty sum is -inf, and its output zeros. `out` may be given: attention's dense, bf16
or fp32 (where it is not, it is made in q's dtype). All raise `ValueError` for shapes, dtypes and layouts that do not
fit, and compute in float64 here; the numbers are looked at on the host, which implementations need not do.

Legend: B requests, S newest tokens of a request, T query tokens, H heads, K indices of a token, P pages of a block
table, C cache pages, L keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tilery.ops.cache import PAGE, read_mla
from tilery.ops.products import require
from tilery.ops.quant import E4M3
from tilery.ops.registry import operator
from tilery.ops.topk import top_k_positions

LATENT, DIM, PACKED = 512, 576, 656
"""Of an MLA row: values of latent; all values; bytes, if packed."""
KEY, KEY_PAGE = 128, PAGE * 132
"""Values of an indexer key; bytes of a page of them."""
FLOATS = (torch.bfloat16, torch.float32)
INT32, FP32 = (torch.int32,), (torch.float32,)
SCORES = 1 << 28
"""Bytes of scores at a time, where selections write them."""


# ---- checks ----------------------------------------------------------------------------------------------------------


def _result(q: Tensor, lead: tuple[int, ...], width: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output [.., width], log-sum-exp [..]), the first `out` if given."""
    if out is None:
        out = torch.empty(*lead, width, dtype=q.dtype, device=q.device)
    require("out", out, FLOATS, *lead, width)
    return out, torch.empty(lead, dtype=torch.float32, device=q.device)


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def _check_rows(name: str, rows: Tensor) -> Tensor:
    """MLA rows as [rows, 576] or [rows, 656]."""
    packed = rows.dtype is torch.uint8
    lead = (None, PAGE) if rows.dim() == 3 else (None,)
    require(name, rows, (torch.uint8,) if packed else FLOATS, *lead, PACKED if packed else DIM)
    return rows.view(-1, rows.shape[-1])


def _check_table(block_table: Tensor, lengths: Tensor) -> None:
    require("block_table", block_table, INT32, None, None, dense=False)
    require("lengths", lengths, INT32, len(block_table))


def check_dense(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [C * 64, ..], output, log-sum-exp) of `dense_mla_decode`."""
    _check_table(block_table, lengths)
    require("q", q, FLOATS, len(block_table), None, None, DIM)
    rows = _check_rows("cache", cache)
    if len(rows) % PAGE:
        raise ValueError(f"cache must be whole pages of {PAGE} rows, got {len(rows)} rows")
    _check_scale(scale)
    return rows, *_result(q, tuple(q.shape[:3]), LATENT, out)


def check_sparse(
    q: Tensor, rows: Tensor, indices: Tensor, scale: float, sink: Tensor | None, lengths: Tensor | None,
    out: Tensor | None, name: str = "cache",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of `sparse_mla_decode`."""
    if q.dim() < 3:
        raise ValueError(f"q must be [.., H, {DIM}], not {list(q.shape)}")
    lead, heads = tuple(q.shape[:-2]), q.shape[-2]
    require("q", q, FLOATS, *lead, heads, DIM)
    flat = _check_rows(name, rows)
    require("indices", indices, INT32, *lead, None)
    if sink is not None:
        require("sink", sink, FP32, heads)
    if lengths is not None:
        require("lengths", lengths, INT32, *lead)
    _check_scale(scale)
    return flat, *_result(q, (*lead, heads), LATENT, out)


def check_varlen(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor | None, starts: Tensor | None,
    longest: int | None, longest_keys: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp) of `mha_prefill_varlen`."""
    require("q", q, FLOATS, None, None, None)
    tokens, heads, width = q.shape
    require("k", k, (q.dtype,), None, heads, width)
    require("v", v, (q.dtype,), len(k), heads, None)
    _check_scale(scale)
    if starts is not None:
        require("starts", starts, INT32, 2, None)
        if longest is None or longest_keys is None:
            raise ValueError("starts needs longest and longest_keys")
    elif causal and tokens > len(k):
        raise ValueError(f"{tokens} queries cannot be the newest of {len(k)} keys")
    return _result(q, (tokens, heads), v.shape[2], out)


def _check_queries(q: Tensor, weights: Tensor) -> None:
    require("q", q, (E4M3,), None, None, KEY)
    require("weights", weights, FP32, *q.shape[:2])


def _check_fill(fill: int) -> None:
    if fill not in (0, 1, 2):
        raise ValueError(f"fill must be 0, 1 or 2, got {fill}")


def check_keys(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor) -> None:
    """Checks what `index_logits` and `index_select` are given."""
    _check_queries(q, weights)
    require("keys", keys, (E4M3,), None, KEY)
    require("key_scales", key_scales, FP32, len(keys))
    require("starts", starts, INT32, len(q))
    require("ends", ends, INT32, len(q))


def check_pages(q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor) -> int:
    """Checks what `index_logits_paged` and `index_select_paged` are given. Returns S, 1 of no requests."""
    _check_queries(q, weights)
    require("cache", cache, (torch.uint8,), None, KEY_PAGE)
    _check_table(block_table, lengths)
    requests = len(block_table)
    if len(q) % max(requests, 1) or (len(q) > 0) != (requests > 0):
        raise ValueError(f"q must have the same number of rows for each of {requests} requests, got {len(q)}")
    return len(q) // requests if requests else 1


def scores_for(out: Tensor | None, tokens: int, length: int, fill: int, q: Tensor) -> Tensor:
    """`out`, checked, or new scores."""
    _check_fill(fill)
    if out is None:
        return torch.empty(tokens, length, dtype=torch.float32, device=q.device)
    require("out", out, FP32, tokens, length, dense=False)
    if length and out.stride(1) != 1:
        raise ValueError("out must have dense rows")
    return out


def ends_of(lengths: Tensor, step: int) -> Tensor:
    """[B] -> [B * step] int32: where each row's keys end, the newest of `step` tokens seeing all of them."""
    return (lengths[:, None] + torch.arange(1 - step, 1, dtype=torch.int32, device=lengths.device)).view(-1)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attend(q_THD: Tensor, rows_KD: Tensor, seen_TK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [T, H, 512], log-sum-exp [T, H]) in float64."""
    scores = torch.einsum("thd,kd->thk", q_THD.double(), rows_KD) * scale
    scores = scores.masked_fill(~seen_TK[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return torch.einsum("thk,kl->thl", weights, rows_KD[:, :LATENT]), lse


@operator
def dense_mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of each request's S newest tokens over its cache rows: (out [B, S, H, 512], lse [B, S, H]).

    q [B, S, H, 576], bf16 or fp32, dense. cache: MLA rows, whole pages, [C * 64, ..] or [C, 64, ..], dense.
    block_table [B, P]; lengths [B] in 0 .. 64 P counts a request's rows, the queries' own included: query s sees those
    below lengths[b] - S + 1 + s. scale > 0 multiplies the scores. Rows behind a length have no influence, be they NaN.
    Implementations may round rows to bf16, packed ones to f16 (exact if their scales lie within 2^-15 .. 2^7), and
    queries to bf16 or f16. Source: DeepSeek-V2 report, section 2.1.2.
    """
    rows, out, lse = check_dense(q, cache, block_table, lengths, scale, out)
    tokens = q.shape[1]
    for b, length in enumerate(lengths.tolist()):
        own = read_mla(rows, _slots(block_table[b], length), LATENT, torch.float64)
        position = torch.arange(length, device=q.device)
        seen = position < ends_of(lengths[b : b + 1], tokens)[:, None]
        values, sums = _attend(q[b], own, seen, scale)
        out[b], lse[b] = values.to(out.dtype), sums.float()
    return out, lse


def _slots(table_P: Tensor, length: int) -> Tensor:
    position = torch.arange(length, device=table_P.device)
    return table_P.long()[position // PAGE] * PAGE + position % PAGE


@operator
def sparse_mla_decode(
    q: Tensor, cache: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Absorbed attention of each token over the cache rows that it names: (out [.., H, 512], lse [.., H]).

    q [.., H, 576], bf16 or fp32, dense, at least one leading dimension. cache: MLA rows, [rows, ..] or [C, 64, ..],
    dense. indices [.., K]: rows in any order, -1 for none; `lengths` [..]: only so many of the first indices count.
    sink fp32 [H]: a further score in the softmax that has no value; lse leaves it out. Precision as `dense_mla_decode`.
    Unlike `mla_decode`, a token may name no row. Source: DeepSeek-V3.2-Exp for chosen rows.
    """
    rows, out, lse = check_sparse(q, cache, indices, scale, sink, lengths, out)
    _sparse(q, rows, indices, scale, sink, lengths, out, lse)
    return out, lse


@operator
def sparse_mla_prefill(
    q: Tensor, kv: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_mla_decode` of many tokens: q [T, H, 576] over kv, MLA rows [L, ..], by indices [T, K]."""
    check_flat(q, kv)
    rows, out, lse = check_sparse(q, kv, indices, scale, sink, lengths, out, "kv")
    _sparse(q, rows, indices, scale, sink, lengths, out, lse)
    return out, lse


def check_flat(q: Tensor, kv: Tensor) -> None:
    if q.dim() != 3 or kv.dim() != 2:
        raise ValueError(f"q must be [T, H, {DIM}] and kv [L, ..], not {list(q.shape)} and {list(kv.shape)}")


def _sparse(
    q: Tensor, rows: Tensor, indices: Tensor, scale: float, sink: Tensor | None, lengths: Tensor | None, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    tokens, width = lse.shape[:-1].numel(), indices.shape[-1]
    counts = [width] * tokens if lengths is None else lengths.flatten().tolist()
    flat_q, flat_out, flat_lse = q.flatten(0, -3), out.view(tokens, -1, LATENT), lse.view(tokens, -1)
    for t, own in enumerate(indices.reshape(tokens, width)):
        named = own[: max(counts[t], 0)]
        kept = read_mla(rows, named[named >= 0].long(), LATENT, torch.float64)
        seen = torch.ones(1, len(kept), dtype=torch.bool, device=q.device)
        values, sums = _attend(flat_q[t : t + 1], kept, seen, scale)
        flat_out[t], flat_lse[t] = (values * share(sums, sink)[..., None]).to(out.dtype)[0], sums.float()[0]


def share(lse: Tensor, sink: Tensor | None) -> Tensor:
    """How much of the softmax is left beside a sink [H]: e^lse / (e^lse + e^sink), in lse's dtype."""
    if sink is None:
        return torch.ones_like(lse)
    return torch.where(lse == float("-inf"), 0.0, torch.sigmoid(lse - sink.to(lse.dtype)))


@operator
def mha_prefill_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, out: Tensor | None = None,
    starts: Tensor | None = None, longest: int | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Un-absorbed attention of one or several requests, with log-sum-exps: (out [T, H, V], lse [T, H]).

    q [T, H, D], k [L, H, D], v [L, H, V] of one dtype, bf16 or fp32, dense. With `causal`, query t of T sits at
    position L - T + t, T <= L, and sees positions up to its own; else all. Several requests lie end to end: starts
    [2, B + 1] holds the running sums of their queries and keys, from 0, and each is attention of its own; `longest` and
    `longest_keys`, then needed, bound one request's queries and keys and change no result. scale > 0. The two halves of
    a chunk (its cached prefix, not causal, and itself) are joined by their log-sum-exps. Source: Dao 2023.
    """
    out, lse = check_varlen(q, k, v, scale, causal, out, starts, longest, longest_keys)
    for own, keys in requests_of(starts, len(q), len(k)):
        scores = torch.einsum("thd,chd->thc", q[own].double(), k[keys].double()) * scale
        tokens, _, context = scores.shape
        if causal:
            seen = torch.ones(tokens, context, dtype=torch.bool, device=q.device).tril(context - tokens)
            scores.masked_fill_(~seen[:, None], float("-inf"))
        sums = scores.logsumexp(-1)
        weights = (scores - sums.masked_fill(sums == float("-inf"), 0.0)[..., None]).exp()
        out[own] = torch.einsum("thc,chv->thv", weights, v[keys].double()).to(out.dtype)
        lse[own] = sums.float()
    return out, lse


def requests_of(starts: Tensor | None, tokens: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Each request's queries and keys."""
    first, second = [[0, tokens], [0, keys]] if starts is None else starts.tolist()
    for b in range(len(first) - 1):
        yield slice(first[b], first[b + 1]), slice(second[b], second[b + 1])


# ---- scores and selection --------------------------------------------------------------------------------------------


def _scores(q_THD: Tensor, weights_TH: Tensor, keys_LD: Tensor, scales_L: Tensor) -> Tensor:
    """[T, L] fp32, of float64."""
    out = torch.empty(len(q_THD), len(keys_LD), dtype=torch.float32, device=q_THD.device)
    keys = keys_LD.double().T
    for t in range(len(q_THD)):
        out[t] = (weights_TH[t].double() @ (q_THD[t].double() @ keys).relu() * scales_L.double()).float()
    return out


@operator
def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor,
    out: Tensor | None = None, *, fill: int = 2,
) -> Tensor:  # fmt: skip
    """Scores of each query against a range of keys: [T, L] fp32, for starts[t] <= l < ends[t]

        key_scales[l] * sum_h weights[t, h] * relu(q[t, h] . keys[l])

    and -inf elsewhere: everywhere with `fill` 2; with 1, what lies behind the range is not defined, with 0 nor is what
    lies before it. q e4m3 [T, H, 128], weights fp32 [T, H] (the queries' scales and all constants folded in), keys
    e4m3 [L, 128], key_scales fp32 [L], starts and ends [T] in 0 .. L (a range may be empty), all dense. `out`: fp32
    with dense rows. Implementations may sum products in a tensor core's FP8 units (on Hopper 1.3e-4 relative L2).
    Source: DeepSeek-V3.2-Exp report.
    """
    check_keys(q, weights, keys, key_scales, starts, ends)
    out = scores_for(out, len(q), len(keys), fill, q)
    position = torch.arange(len(keys), device=q.device)
    inside = (position >= starts[:, None]) & (position < ends[:, None])
    return out.copy_(_scores(q, weights, keys, key_scales).masked_fill(~inside, float("-inf")))


@operator
def index_logits_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    fill: int = 2, limits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`index_logits` of each request's S newest tokens against its own cached keys: [B * S, 64 P] fp32.

    q e4m3 [B * S, H, 128], weights fp32 [B * S, H], cache: indexer pages, dense; block_table [B, P]; lengths [B] in
    0 .. 64 P counts the newest token: row b * S + s sees positions below lengths[b] - S + 1 + s. Scores elsewhere, and
    `fill`, as there. `limits` [B * S], if given, is filled with those ends.
    """
    step = check_pages(q, weights, cache, block_table, lengths)
    out = scores_for(out, len(q), block_table.shape[1] * PAGE, fill, q)
    ends = ends_of(lengths, step)
    if limits is not None:
        require("limits", limits, INT32, len(q))
        limits.copy_(ends)
    out.fill_(float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        rows = slice(b * step, (b + 1) * step)
        keys, scales = key_pages(cache, block_table[b, : -(-length // PAGE)])
        scores = _scores(q[rows], weights[rows], keys[:length], scales[:length])
        hidden = torch.arange(length, device=q.device) >= ends[rows, None]
        out[rows, :length] = scores.masked_fill(hidden, float("-inf"))
    return out


def key_pages(cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """(keys e4m3 [n * 64, 128], scales fp32 [n * 64]) of n pages."""
    raw = cache.index_select(0, pages.long())
    values, scales = raw[:, : PAGE * KEY].contiguous(), raw[:, PAGE * KEY :].contiguous()
    return values.view(E4M3).view(-1, KEY), scales.view(torch.float32).view(-1)


Scorer = Callable[..., Tensor]
"""`index_logits` or `index_logits_paged`."""
Chooser = Callable[[Tensor, int], Tensor]
"""`top_k_positions`."""


@operator
def index_select(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Positions [T, k] int32 of the k keys of each query's range that score highest, -1 where there are fewer.

    Arguments as `index_logits`, `out` dense. Tie rule: of equal scores the lowest position wins. The order within a
    row, the -1s included, is not specified. Scores that implementations round differently may choose differently.
    """
    return select_by(index_logits, top_k_positions, q, weights, keys, key_scales, starts, ends, k, out)


@operator
def index_select_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Positions [B * S, k] int32 within its request of the k keys that score highest, -1 where there are fewer.

    Arguments as `index_logits_paged`; `out`, ties and order as `index_select`.
    """
    return select_paged_by(index_logits_paged, top_k_positions, q, weights, cache, block_table, lengths, k, out)


def _chosen_for(out: Tensor | None, tokens: int, k: int, q: Tensor) -> Tensor:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if out is None:
        return torch.empty(tokens, k, dtype=torch.int32, device=q.device)
    require("out", out, INT32, tokens, k)
    return out


def select_by(
    score: Scorer, choose: Chooser, q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor,
    ends: Tensor, k: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """`index_select` with `score` for `index_logits` and `choose` for `top_k_positions`, a slice of queries at a
    time."""
    check_keys(q, weights, keys, key_scales, starts, ends)
    out = _chosen_for(out, len(q), k, q).fill_(-1)
    for rows in slices(len(q), 4 * len(keys)):
        chosen = choose(score(q[rows], weights[rows], keys, key_scales, starts[rows], ends[rows]), k)
        out[rows, : chosen.shape[1]] = chosen.to(torch.int32)
    return out


def select_paged_by(
    score: Scorer, choose: Chooser, q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor,
    k: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same of `index_select_paged`, a slice of requests at a time."""
    step = check_pages(q, weights, cache, block_table, lengths)
    out = _chosen_for(out, len(q), k, q).fill_(-1)
    for some in slices(len(block_table), 4 * step * block_table.shape[1] * PAGE):
        rows = slice(some.start * step, some.stop * step)
        chosen = choose(score(q[rows], weights[rows], cache, block_table[some], lengths[some]), k)
        out[rows, : chosen.shape[1]] = chosen.to(torch.int32)
    return out


def slices(count: int, size: int, room: int = SCORES) -> Iterator[slice]:
    """Cuts `count` things of `size` bytes each into runs of at most `room` bytes, but of at least one; none of
    nothing."""
    step = max(1, room // size) if size else 1
    for start in range(0, count if size else 0, step):
        yield slice(start, min(start + step, count))
