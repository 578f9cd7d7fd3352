"""Mixture of experts around its products: choose the experts, sort the tokens by expert, copy rows there and back.

    gate       score = sigmoid(logit) or softmax(logits);   choice = score + bias
               a group's worth = its two best choices added; the best `kept` groups stay
               experts = the k best choices among them (lowest id first on equal ones)
               weight  = score / (sum of the k scores + 1e-20) * factor
    sort       row(t, j) = offset[e] + |{(t', j') before (t, j) : expert(t', j') = e}|,   e = expert(t, j)
    permute    out[row(t, j)] = x[t]
    unpermute  out[t] = sum_j weight[t, j] * y[row(t, j)]

The gate holds a chunk of tokens as two halves of all experts, [B, E/2] each, a token within a warp: each of k rounds is
one maximum over order-preserving int32 keys and one minimum over ids, which a GPU reduces in one instruction (one tile
of 256 experts would spread a token over two warps, and every round over shared memory). Groups are judged on
[B, G, S] before, and handed over as one bit per group.

Tokens are sorted by counting: while it gates its tokens, each chunk notes per expert a word with a bit per token and
the number of those bits (`gate`); then each chunk adds up the counts of those before it, and the rank of a token is the
number of lower bits in its expert's word (`sort_by_expert`). `route` is both. Sums over chunks, and over the tokens of
a large chunk, are products on tensor cores with a few rows of ones or powers of two: exact, and without the bank
conflicts of a reduction across warps. Up to 8 tokens one program does all in one launch (`gate_and_sort`). The order is
that of a stable sort, so nothing depends on the chunks.

Legend: T tokens, G groups of S experts, E = G * S experts, K experts per token, N = T * K rows, H hidden, C chunks of
tokens, B tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import randn
from tilery.ops.kernels.topk import ordered
from tilery.tile import Dim, Float, InOut, Static, Tensor, TensorRef, Tile, Tolerance, bf16, e4m3, f32, i8, i32
from tilery.tile.passes.pad import power_of_two
from tilery.tile.schedule import Schedule
from tilery.tile.tolerance import EXACT

CHUNK = 32
"""Tokens of a chunk where there are many, a bit each of a word: the counts of 4096 tokens are 128 rows, which every
chunk adds up."""
FEW, SMALL_CHUNK = 256, 4
"""Up to 256 tokens chunks of 4, so that 64 tokens keep 16 multiprocessors busy."""
SMALL = 8
"""Tokens that one program gates and sorts by itself."""
TAKEN, DROPPED, NONE = -(2**31), -(2**31) + 1, 2**31 - 1
"""Keys of experts already chosen and of those not to be chosen, below every number's; an id above all."""
FEW_ROWS = 16
"""The least rows of a product on tensor cores."""

T, G, S = Dim("T"), Dim("G", min=1, max=32), Dim("S", min=1, max=512)
C, K, E, H, W, N = Dim("C"), Dim("K", min=1), Dim("E", min=1), Dim("H", min=1), Dim("W", min=1), Dim("N")

CLOSE = Tolerance(1e-6, 1e-5)
PLAIN = {"softmax": False, "normalize": True, "factor": 1.0}


# ---- the gate on tiles -------------------------------------------------------------------------------------------


def best_groups(choice: Tile, kept: int) -> Tile:
    """bool [B, G]: the `kept` groups whose two best choices add up to most, the lowest group first on equal sums."""
    groups, size = choice.shape[1:]
    first = tile.argmax(choice, axis=2)
    others = tile.where(tile.arange(size)[None, None, :] == first[:, :, None], float("-inf"), choice)
    worth = tile.max(choice, axis=2) + tile.max(others, axis=2)
    mine, other = worth[:, :, None], worth[:, None, :]
    earlier = tile.arange(groups)[None, None, :] < tile.arange(groups)[None, :, None]
    return tile.sum((other > mine) | ((other == mine) & earlier), axis=2) < kept


def scores(logits: Tile, softmax: bool) -> Tile:
    """[B, G, S]"""
    if not softmax:
        return tile.sigmoid(logits)
    power = tile.exp(logits - tile.max(tile.max(logits, axis=2), axis=1)[:, None, None])
    return power / tile.sum(tile.sum(power, axis=2), axis=1)[:, None, None]


def select(
    logits: TensorRef, bias: TensorRef | None, first: Any, chunk: int, k: int, kept: int, softmax: bool,
    normalize: bool, factor: Any,
) -> tuple[list[Tile], Tile, Tile]:  # fmt: skip
    """Tokens first .. first + chunk of [T, G, S] -> (bool [B, E/2] twice: which experts are chosen; experts, weights
    [B, k])."""
    groups, size = logits.shape[1:]
    tokens, token = tile.span(first, chunk), tile.arange(chunk, first)
    real = token < logits.shape[0]
    stays = None
    if kept:  # before the halves are read, whose layout a GPU's compiler then keeps for the rounds
        whole = scores(logits[tokens, :, :], softmax)
        whole = whole if bias is None else whole + bias[:, :][None, :, :]
        stays = tile.sum(tile.where(best_groups(whole, kept), 1 << tile.arange(groups)[None, :], 0), axis=1)[:, None]
    half = tile.cdiv(groups * size, 2)
    ids = [tile.arange(half), tile.arange(half, half)]
    inside = [i < groups * size for i in ids]
    halves = [logits.load((tokens, i // size, i % size), where=w[None, :]) for i, w in zip(ids, inside)]
    score = tile.sigmoid
    if softmax:
        halves = [tile.where(w[None, :], x, float("-inf")) for w, x in zip(inside, halves)]
        top = tile.max(tile.maximum(*halves), axis=1)[:, None]
        power = tile.sum(tile.exp(halves[0] - top) + tile.exp(halves[1] - top), axis=1)[:, None]

        def score(x: Tile) -> Tile:
            return tile.exp(x - top) / power

    keys = []
    for i, w, x in zip(ids, inside, halves):
        choice = score(x) if bias is None else score(x) + bias.load((i // size, i % size), where=w)[None, :]
        free = w[None, :] if stays is None else w[None, :] & (((stays >> (i // size)[None, :]) & 1) != 0)
        keys.append(tile.where(free, ordered(choice), DROPPED))
    place, experts = tile.arange(k)[None, :], tile.zeros([chunk, k], i32)
    for j in range(k):
        top_key = tile.max(tile.maximum(*keys), axis=1)[:, None]
        least = tile.minimum(*(tile.where(x == top_key, i[None, :], NONE) for x, i in zip(keys, ids)))
        winner = tile.min(least, axis=1)[:, None]
        keys = [tile.where(i[None, :] == winner, TAKEN, x) for x, i in zip(keys, ids)]
        experts = tile.where(place == j, winner, experts)
    row = token[:, None] + tile.zeros([chunk, k], i32)
    weights = score(logits.load((row, experts // size, experts % size), where=real[:, None]))
    if normalize:
        weights = weights / (tile.sum(weights, axis=1) + 1e-20)[:, None]
    return [(x == TAKEN) & real[:, None] for x in keys], experts, weights * factor


def popcount(word: Tile) -> Tile:
    """How many bits of an i32 are set; LLVM knows this form and emits one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 63


def first_rows(sums: Tile, count: int) -> list[Tile]:
    """The first rows of [16, W], as i32 [W]."""
    row = tile.arange(FEW_ROWS)[:, None]
    return [tile.sum(tile.where(row == i, sums, 0.0), axis=0).to(i32) for i in range(count)]


def members_of(chosen: Tile, chunk: int) -> tuple[Tile, Tile]:
    """bool [B, W], B <= 32 -> (i32 [W]: bit t is chosen[t]; how many are set)."""
    t = tile.arange(chunk)
    if chunk < FEW_ROWS:
        word = tile.sum(tile.where(chosen, (1 << t)[:, None], 0), axis=0)
        return word, popcount(word)
    # Rows 0 and 1 gather 16 bits each, which f32 holds exactly; row 2 counts.
    row, power = tile.arange(FEW_ROWS)[:, None], (((t & 15) + 127) << 23).bitcast(f32)[None, :]
    left = tile.where(row == 2, 1.0, tile.where(row == (t // 16)[None, :], power, 0.0)).to(bf16)
    low, high, count = first_rows(tile.dot(left, chosen.to(bf16)), 3)
    return low | (high << 16), count


# ---- references --------------------------------------------------------------------------------------------------


def _choose(
    logits: TorchTensor, bias: TorchTensor | None, k: int, kept: int, softmax: bool, normalize: bool, factor: float
) -> tuple[TorchTensor, TorchTensor]:
    groups, size = logits.shape[1:]
    score = logits.flatten(1).softmax(1) if softmax else logits.flatten(1).sigmoid()
    choice = score if bias is None else score + bias.flatten()
    if kept:
        worth = choice.unflatten(1, (groups, size)).topk(2, dim=2).values.sum(2)
        order = worth.argsort(dim=1, descending=True, stable=True)[:, :kept]
        dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(1, order, False)
        choice = choice.masked_fill(dropped.repeat_interleave(size, 1), float("-inf"))
    experts = choice.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = score.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * factor, experts.int()


def count_chunks(experts: TorchTensor, count: int, chunk: int) -> TorchTensor:
    """[ceil(T / chunk), count] bf16: how often each chunk of tokens names each expert."""
    chunks = -(-len(experts) // chunk)
    counts = torch.zeros(chunks, count, dtype=torch.bfloat16, device=experts.device)
    for c in range(chunks):
        counts[c] = torch.bincount(experts[c * chunk : (c + 1) * chunk].flatten(), minlength=count)
    return counts


def chunk_members(experts: TorchTensor, count: int, chunk: int) -> TorchTensor:
    """[ceil(T / chunk), count] i32: bit t is set where token t of the chunk names the expert."""
    members = torch.zeros(-(-len(experts) // chunk), count, dtype=torch.int64, device=experts.device)
    for t, row in enumerate(experts.long()):
        members[t // chunk, row] += 1 << (t % chunk)
    return torch.where(members >= 2**31, members - 2**32, members).int()


def _gate_reference(
    logits: TorchTensor, bias: TorchTensor | None, k: int, kept: int, softmax: bool, normalize: bool, factor: float,
    chunk: int,
) -> tuple[TorchTensor, ...]:  # fmt: skip
    weights, experts = _choose(logits, bias, k, kept, softmax, normalize, factor)
    count = logits.shape[1] * logits.shape[2]
    return weights, experts, count_chunks(experts, count, chunk), chunk_members(experts, count, chunk)


def _sort_reference(
    experts: TorchTensor, counts: TorchTensor, members: TorchTensor, chunk: int
) -> tuple[TorchTensor, ...]:
    flat = experts.flatten().long()
    total = torch.bincount(flat, minlength=counts.shape[1]).int()
    order = flat.argsort(stable=True)
    rows = torch.empty_like(flat, dtype=torch.int32)
    rows[order] = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    return rows.view_as(experts), order.int(), total, (total.cumsum(0) - total).int()


def _gate_and_sort_reference(
    logits: TorchTensor, bias: TorchTensor | None, k: int, kept: int, softmax: bool, normalize: bool, factor: float
) -> tuple[TorchTensor, ...]:
    weights, experts, counts, members = _gate_reference(logits, bias, k, kept, softmax, normalize, factor, SMALL)
    return weights, experts, *_sort_reference(experts, counts, members, SMALL)


# ---- gate ----------------------------------------------------------------------------------------------------------


def _gate_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """One token per warp of a small chunk, four of a large one; the launch overlaps the end of what runs before."""
    return Schedule(warps=4 if env.get("T", FEW + 1) <= FEW else 8, pdl=True) if target == "triton" else None


@tile.kernel(reference=_gate_reference, tolerance=(CLOSE, EXACT, EXACT, EXACT), schedule=_gate_schedule)
def gate(
    logits: Tensor[T, G, S, f32], bias: Tensor[G, S, f32] | None, k: Static[int], kept: Static[int],
    softmax: Static[bool] = False, normalize: Static[bool] = True, factor: float = 1.0, chunk: Static[int] = CHUNK,
):  # fmt: skip
    """Router logits [T, G, S] (expert e is e % S of group e // S) -> (weights [T, k] f32, experts [T, k] i32, counts
    [ceil(T / chunk), E] bf16: how many tokens of a chunk chose an expert; members [ceil(T / chunk), E] i32: which, bit
    t for token t of the chunk). chunk <= 32.

    `kept` 0: no groups count, all experts compete (G = 1 or not). The k choices stand from best to worst; on equal
    choices the lowest id wins, on equal groups the lowest group. 1 <= k <= kept * S experts remain; S >= 2 where groups
    count. NaN is not allowed. Source: DeepSeek-V3 report, section 2.1.2 (sigmoid, bias, groups); Qwen3-MoE (softmax).
    """
    weights, experts = tile.empty([T, k], f32), tile.empty([T, k], i32)
    counts = tile.empty([tile.cdiv(T, chunk), G * S], bf16)
    members = tile.empty([tile.cdiv(T, chunk), G * S], i32)
    for c in tile.parallel(tile.cdiv(T, chunk)):
        halves, own, share = select(logits, bias, c * chunk, chunk, k, kept, softmax, normalize, factor)
        tokens = tile.span(c * chunk, chunk)
        weights[tokens, :] = share
        experts[tokens, :] = own
        for number, chosen in enumerate(halves):
            word, count = members_of(chosen, chunk)
            part = tile.span(number * chosen.shape[1], chosen.shape[1])
            members[c, part] = word
            counts[c, part] = count.to(bf16)
    return weights, experts, counts, members


def _logits(rand: torch.Generator, tokens: int, groups: int, size: int, device: str = "cpu") -> dict[str, Any]:
    """Logits with ties: some experts are copies of others, and one token likes all alike."""
    logits = randn(rand, tokens, groups, size, device=device)
    if tokens > 1 and size > 2:
        logits[:, :, 2] = logits[:, :, 1]
        logits[1] = 0.5
    return {"logits": logits}


@gate.case
def deepseek(rand: torch.Generator) -> dict[str, Any]:
    bias = randn(rand, 4, 8) * 0.1
    bias[:, 2] = bias[:, 1]
    return {**_logits(rand, 37, 4, 8), "bias": bias, "k": 4, "kept": 2, **PLAIN, "factor": 2.5, "chunk": 32}


@gate.case
def softmax_no_groups(rand: torch.Generator) -> dict[str, Any]:
    rest = {**PLAIN, "softmax": True, "normalize": False}
    return {**_logits(rand, 5, 1, 20), "bias": None, "k": 3, "kept": 0, **rest, "chunk": 4}


@gate.case
def one_token_odd_groups(rand: torch.Generator) -> dict[str, Any]:
    bias = randn(rand, 3, 5)
    return {**_logits(rand, 1, 3, 5), "bias": bias, "k": 6, "kept": 2, **PLAIN, "chunk": 4}


@gate.case
def no_tokens(rand: torch.Generator) -> dict[str, Any]:
    return {**_logits(rand, 0, 2, 4), "bias": None, "k": 2, "kept": 1, **PLAIN, "chunk": 4}


def _v32(rand: torch.Generator, device: str, tokens: int) -> dict[str, Any]:
    bias = randn(rand, 8, 32, device=device) * 0.1
    logits = randn(rand, tokens, 8, 32, device=device)
    return {"logits": logits, "bias": bias, "k": 8, "kept": 4, **PLAIN, "factor": 2.5}


@gate.bench
def gate_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_v32(rand, device, 4096), "chunk": CHUNK}


@gate.bench
def gate_64(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_v32(rand, device, 64), "chunk": SMALL_CHUNK}


# ---- sorting by expert ---------------------------------------------------------------------------------------------


def _sort_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """The counts of up to 128 chunks in one step, as far as 128 KiB of them fit on chip."""
    rows = max(FEW_ROWS, min(128, power_of_two(env.get("C", 128)), 65536 // power_of_two(env.get("E", 256))))
    return Schedule(blocks={"counts": rows}, warps=8, stages=1, pdl=True) if target == "triton" else None


@tile.kernel(reference=_sort_reference, tolerance=EXACT, schedule=_sort_schedule)
def sort_by_expert(
    experts: Tensor[T, K, i32], counts: Tensor[C, E, bf16], members: Tensor[C, E, i32], chunk: Static[int] = CHUNK
):
    """experts [T, K] in 0 .. E-1, distinct in a row, and `gate`'s counts and members of the same `chunk` (C =
    ceil(T / chunk)) -> (rows [T, K] i32: where the copy of token t for its j-th expert goes, order [T * K] i32: which
    t * K + j a row holds, total [E] and offset [E] i32: an expert's rows are offset .. offset + total).

    The order is that of a stable sort of the flattened experts: by expert, then by token. C * chunk <= 2^24.
    """
    rows, order = tile.empty([T, K], i32), tile.empty([T * K], i32)
    total, offset = tile.empty([E], i32), tile.empty([E], i32)
    flat, flat_rows = experts.view(i32, [T * K]), rows.view(i32, [T * K])
    for c in tile.parallel(tile.cdiv(T + 1, chunk)):  # one program even without tokens: it writes the totals
        size = chunk * K
        entries, entry = tile.span(c * size, size), tile.arange(size, c * size)
        expert = flat.load((entries,), other=-1)
        real, expert = expert >= 0, tile.maximum(expert, 0)
        word = members.load((c, expert), where=real)
        sums, row = tile.zeros([FEW_ROWS, E], f32), tile.arange(FEW_ROWS)[:, None]
        for b in tile.range(tile.blocks(C, "counts")):
            left = tile.where((row == 0) | ((row == 1) & (b.index < c)[None, :]), 1.0, 0.0)
            sums = tile.dot(left.to(bf16), counts[b, :], sums)
        everywhere, before = first_rows(sums, 2)
        start = tile.cumsum(everywhere) - everywhere
        if c == 0:
            total[:] = everywhere
            offset[:] = start
        earlier = (1 << (tile.arange(size) // K)) - 1
        place = tile.take(start + before, expert, axis=0) + popcount(word & earlier)
        flat_rows[entries] = place
        order.store(place, entry, where=real)
    return rows, order, total, offset


def _sorted_arguments(
    rand: torch.Generator, tokens: int, k: int, count: int, chunk: int, device: str = "cpu"
) -> dict[str, Any]:
    experts = randn(rand, tokens, count, device=device).argsort(1)[:, :k].int().contiguous()
    counts, members = count_chunks(experts, count, chunk), chunk_members(experts.cpu(), count, chunk).to(device)
    return {"experts": experts, "counts": counts, "members": members, "chunk": chunk}


@sort_by_expert.case
def three_chunks(rand: torch.Generator) -> dict[str, Any]:
    return _sorted_arguments(rand, 70, 4, 12, 32)


@sort_by_expert.case
def six_per_token(rand: torch.Generator) -> dict[str, Any]:
    return _sorted_arguments(rand, 33, 6, 20, 4)


@sort_by_expert.bench
def sort_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return _sorted_arguments(rand, 4096, 8, 256, CHUNK, device)


@tile.graph
def route(
    logits: Tensor[T, G, S, f32], bias: Tensor[G, S, f32] | None, k: Static[int], kept: Static[int],
    softmax: Static[bool] = False, normalize: Static[bool] = True, factor: float = 1.0, chunk: Static[int] = CHUNK,
):  # fmt: skip
    """`gate`, then `sort_by_expert`: (weights, experts, rows, order, total, offset) of any number of tokens."""
    weights, experts, counts, members = gate(logits, bias, k, kept, softmax, normalize, factor, chunk)
    rows, order, total, offset = sort_by_expert(experts, counts, members, chunk)
    return weights, experts, rows, order, total, offset


def chunk_for(tokens: int) -> int:
    """The `chunk` of `route` for a number of tokens."""
    return SMALL_CHUNK if tokens <= FEW else CHUNK


@tile.kernel(
    reference=_gate_and_sort_reference,
    tolerance=(CLOSE, EXACT, EXACT, EXACT, EXACT, EXACT),
    schedule=Schedule(warps=SMALL),
)
def gate_and_sort(
    logits: Tensor[Dim("T", max=SMALL), G, S, f32], bias: Tensor[G, S, f32] | None, k: Static[int], kept: Static[int],
    softmax: Static[bool] = False, normalize: Static[bool] = True, factor: float = 1.0,
):  # fmt: skip
    """`gate` and `sort_by_expert` in one launch, for up to 8 tokens: (weights, experts, rows, order, total, offset)."""
    few = Dim("T", max=SMALL)
    weights, experts, rows = tile.empty([few, k], f32), tile.empty([few, k], i32), tile.empty([few, k], i32)
    order = tile.empty([few * k], i32)
    total, offset = tile.empty([G * S], i32), tile.empty([G * S], i32)
    for _ in tile.parallel(1):
        tokens = tile.span(0, SMALL)
        halves, own, share = select(logits, bias, 0, SMALL, k, kept, softmax, normalize, factor)
        weights[tokens, :] = share
        experts[tokens, :] = own
        earlier, row = tile.full([], 0, i32), tile.zeros([SMALL, k], i32)
        for number, chosen in enumerate(halves):
            half, one = chosen.shape[1], chosen.to(i32)
            counts, part = tile.sum(one, axis=0), tile.span(number * half, half)
            start = tile.cumsum(counts) - counts + earlier
            total[part] = counts
            offset[part] = start
            place = start[None, :] + tile.cumsum(one, axis=0) - one
            here = (own >= number * half) & (own < (number + 1) * half)
            row = tile.where(here, tile.take(place, tile.where(here, own - number * half, 0), axis=1), row)
            earlier = earlier + tile.sum(counts)
        rows[tokens, :] = row
        token = tile.arange(SMALL)[:, None]
        order.store(row, token * k + tile.arange(k)[None, :], where=token < few)
    return weights, experts, rows, order, total, offset


@gate_and_sort.case
def small_deepseek(rand: torch.Generator) -> dict[str, Any]:
    bias = randn(rand, 4, 4) * 0.1
    return {**_logits(rand, 7, 4, 4), "bias": bias, "k": 4, "kept": 2, **PLAIN, "factor": 2.5}


@gate_and_sort.case
def small_softmax(rand: torch.Generator) -> dict[str, Any]:
    return {**_logits(rand, 8, 1, 12), "bias": None, "k": 3, "kept": 0, **PLAIN, "softmax": True}


@gate_and_sort.case
def small_empty(rand: torch.Generator) -> dict[str, Any]:
    return {**_logits(rand, 0, 2, 4), "bias": None, "k": 2, "kept": 1, **PLAIN}


@gate_and_sort.bench
def decode_8(rand: torch.Generator, device: str) -> dict[str, Any]:
    return _v32(rand, device, 8)


# ---- permute and unpermute -----------------------------------------------------------------------------------------


def _permute_reference(
    x: TorchTensor, scale: TorchTensor | None, rows: TorchTensor, out: TorchTensor, out_scale: TorchTensor | None,
    k: int,
) -> None:  # fmt: skip
    token, slot = torch.where(rows >= 0)
    raw = torch.uint8 if x.element_size() == 1 else x.dtype
    out.view(raw)[rows[token, slot].long()] = x.view(raw)[token]
    if scale is not None and out_scale is not None:
        out_scale[rows[token, slot].long()] = scale[token]


def _permute_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return Schedule(warps=2) if target == "triton" else None  # 128 bytes a thread of 7168


@tile.kernel(reference=_permute_reference, tolerance=EXACT, schedule=_permute_schedule)
def permute(
    x: Tensor[T, H, (*Float, e4m3, i8)], scale: Tensor[T, W, f32] | None, rows: Tensor[T, K, i32],
    out: InOut[N, H, (*Float, e4m3, i8)], out_scale: InOut[N, W, f32] | None, k: Static[int],
):  # fmt: skip
    """out[rows[t, j]] = x[t], and the same for the quantisation scales where there are any; rows -1 are skipped.

    x [T, H] and out [N, H] share a dtype; scale [T, W], out_scale [N, W]. Rows that nobody names stay as they are (the
    caller may pad experts to whole tiles). Each row is read once and written k = K times.
    """
    for t in tile.parallel(T):
        v = x[t, :]
        s = scale[t, :] if scale else None
        for row in [rows[t, j] for j in range(k)]:  # all read before the first write
            out.store((row, slice(None)), v, where=row >= 0)
            if scale:
                out_scale.store((row, slice(None)), s, where=row >= 0)


def _rows(rand: torch.Generator, tokens: int, k: int, below: int, device: str = "cpu") -> TorchTensor:
    return torch.randperm(below, generator=rand, device=rand.device)[: tokens * k].view(tokens, k).int().to(device)


@permute.case
def fp8_with_scales(rand: torch.Generator) -> dict[str, Any]:
    rows = _rows(rand, 5, 3, 20)
    rows[2, 1] = -1
    x, out = randn(rand, 5, 384).to(torch.float8_e4m3fn), torch.zeros(20, 384).to(torch.float8_e4m3fn)
    return {"x": x, "scale": randn(rand, 5, 3), "rows": rows, "out": out, "out_scale": torch.zeros(20, 3), "k": 3}


@permute.case
def plain_rows(rand: torch.Generator) -> dict[str, Any]:
    x, out = randn(rand, 3, 70, dtype=torch.bfloat16), torch.zeros(6, 70, dtype=torch.bfloat16)
    return {"x": x, "scale": None, "rows": _rows(rand, 3, 2, 6), "out": out, "out_scale": None, "k": 2}


@permute.bench
def permute_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {
        "x": randn(rand, 4096, 7168, device=device).to(torch.float8_e4m3fn),
        "scale": randn(rand, 4096, 56, device=device),
        "rows": _rows(rand, 4096, 8, 32768, device),
        "out": torch.zeros(32768, 7168, device=device, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "out_scale": torch.zeros(32768, 56, device=device),
        "k": 8,
    }


def _unpermute_reference(y: TorchTensor, rows: TorchTensor, weights: TorchTensor, k: int) -> TorchTensor:
    picked = y[rows.clamp(min=0).long()].float() if len(y) else torch.zeros(*rows.shape, y.shape[1])
    return (picked * torch.where(rows < 0, 0.0, weights)[..., None]).sum(1).to(y.dtype)


def _unpermute_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return Schedule(blocks={"column": 1024}, warps=4) if target == "triton" else None


@tile.kernel(reference=_unpermute_reference, tolerance=Tolerance(1e-5, 8e-3), schedule=_unpermute_schedule)
def unpermute(y: Tensor[N, H, Float], rows: Tensor[T, K, i32], weights: Tensor[T, K, f32], k: Static[int]):
    """out[t] = sum over j of weights[t, j] * y[rows[t, j]], summed in f32: y [N, H] -> [T, H] of y's dtype.

    k = K, known while tracing so that all reads are under way at once. Rows of -1 (an expert elsewhere) count nothing.
    Source: the combine step of DeepSeek-V3, section 2.1.2.
    """
    out = tile.empty([T, H], y.dtype)
    for t, column in tile.parallel(T, tile.blocks(H, "column")):
        total = tile.zeros([column.extent], f32)
        for j in range(k):
            row = rows[t, j]
            share = tile.where(row >= 0, weights[t, j], 0.0)
            total = total + share * y.load((row, column), where=row >= 0).to(f32)
        out[t, column] = total.to(y.dtype)
    return out


@unpermute.case
def with_holes(rand: torch.Generator) -> dict[str, Any]:
    rows = _rows(rand, 5, 3, 17)
    rows[1, 0] = -1
    rows[4, :] = -1
    return {"y": randn(rand, 17, 21), "rows": rows, "weights": torch.rand(5, 3, generator=rand), "k": 3}


@unpermute.case
def bf16_rows(rand: torch.Generator) -> dict[str, Any]:
    y = randn(rand, 32, 40, dtype=torch.bfloat16)
    return {"y": y, "rows": _rows(rand, 4, 8, 32), "weights": torch.rand(4, 8, generator=rand), "k": 8}


@unpermute.bench
def unpermute_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    y = randn(rand, 32768, 7168, dtype=torch.bfloat16, device=device)
    weights = torch.rand(4096, 8, generator=rand, device=rand.device).to(device)
    return {"y": y, "rows": _rows(rand, 4096, 8, 32768, device), "weights": weights, "k": 8}
