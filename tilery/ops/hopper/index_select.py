"""Which keys the lightning indexer keeps, on Hopper: the k best of each query's range, exactly.

Short ranges are scored into memory and selected from there. For long ones, most scores are never written:

1. every query is scored against 1,024 or more keys, evenly spread, and gets a threshold that k keys likely reach;
2. the scorer keeps what reaches the threshold: a warp appends (score, position) to a list of its own, so there
   are no atomics, and a query has eight lists of 1,024;
3. the k best of the lists are the k best of all if no list overflowed and they hold k;
4. queries for which that is not so, whatever the data, are scored in full and selected by bisection.

Of equal scores the lowest position wins; the order of a row's positions is not specified. Nothing is planned on the
host, so all of it can be captured in a graph.

Legend: S query tokens, H heads, L keys, B requests, P pages of a request, C cache pages.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from tilery.ops.hopper import topk
from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper.index_logits import (
    EXTRA,
    PREFILL_BLOCKS,
    QUERY_STAGES,
    REGISTERS,
    TILE,
    add,
    bounds,
    descriptors,
    extent,
    index_logits,
    index_logits_paged,
    plan,
    prefill_config,
    produce,
    programs,
    weigh,
)
from tilery.ops.hopper.topk import SCRATCH, TABLE
from tilery.ops.hopper.variant import Variant

LISTS = gl.constexpr(8)
ROOM = gl.constexpr(1024)
"""Entries of a list."""
FITS = gl.constexpr(7680)
"""A range of so many keys fits into the lists whatever the scores: keys are dealt to them in turn."""
NEVER = gl.constexpr(-0x7F800001)
"""The order number of -inf."""
LONG = 16384
"""Ranges may be longer than this before sampling pays."""

_KEEP = gl.constexpr("""{
    .reg .pred p, q;
    .reg .b32 m, n;
    setp.ge.f32 p, $3, $4; setp.ge.and.s32 p, $5, $6, p; setp.lt.and.s32 p, $5, $7, p;
    vote.sync.ballot.b32 m, p, -1;
    and.b32 n, m, $10; popc.b32 n, n; add.s32 n, n, $8;
    setp.lt.and.s32 p, n, $11, p; selp.b32 $0, n, -1, p;
    and.b32 m, m, $9; popc.b32 m, m; add.s32 $1, m, $8;
    mov.b64 $2, {$3, $5};
}""")


@gluon.jit
def ordered(x):
    """i32 of the order of f32 x (-0 below 0 is made 0 first)."""
    bits = (x + 0.0).to(gl.int32, bitcast=True)
    return gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@gluon.jit(do_not_specialize=["length", "k"])
def guess_kernel(
    samples, starts, ends, thresholds, counts, failed, failures, length, k, SAMPLE: gl.constexpr
):  # fmt: skip
    """A row's threshold, from its samples [SAMPLE]; clears the row's counts and failure, and the list of failures."""
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    row = gl.program_id(0)
    start = gl.load(starts + row)
    end = gl.load(ends + row)
    at = gl.arange(0, SAMPLE, flat)
    key = (at.to(gl.int64) * length // SAMPLE).to(gl.int32)
    inside = (key >= start) & (key < end)
    x = ordered(gl.load(samples + row.to(gl.int64) * SAMPLE + at))
    x = gl.where(inside, x, NEVER - 1)
    have = gl.sum(inside.to(gl.int32), 0)
    range_length = gl.maximum(end - start, 1)
    share = have.to(gl.float32) * k.to(gl.float32) / range_length.to(gl.float32)
    rank = (share + 5.0 * gl.sqrt(share) + 16.0).to(gl.int32)
    low = NEVER
    high = gl.max(x, 0)
    for _ in range(18):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = gl.sum((x >= middle).to(gl.int32), 0) >= rank
        low = gl.where(enough, middle, low)
        high = gl.where(enough, high, middle)
    everything = (end - start <= FITS) | (have < rank)
    bits = gl.where(low < 0, low ^ 0x7FFFFFFF, low)
    gl.store(thresholds + row, gl.where(everything, float("-inf"), bits.to(gl.float32, bitcast=True)))
    gl.store(failed + row, 0)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = gl.arange(0, 2 * LISTS, line)
    gl.store(counts + row * 2 * LISTS + slot, slot * 0)
    if row == 0:
        gl.store(failures, 0)


@gluon.jit
def keep(
    thresholds, kept, counts, failed, starts, ends, queries, block, skip, todo,
    q_s, w_s, k_s, s_s, q_full, q_empty, full, empty,
    HEADS: gl.constexpr, STEP: gl.constexpr, QB: gl.constexpr, QW: gl.constexpr, STAGES: gl.constexpr,
    WK: gl.constexpr, wk: gl.constexpr, wq: gl.constexpr,
):  # fmt: skip
    """As `consume`, but appends what reaches the row's threshold to the warp's list.

    A block of queries that is shared by two programs fills its lists from both ends; the queries of one that is shared
    by more fail.
    """
    N: gl.constexpr = QW * HEADS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    result: gl.constexpr = gl.DistributedLinearLayout(
        [], [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 2]
    )
    threads: gl.constexpr = gl.DistributedLinearLayout([], [[1], [2], [4], [8], [16]], [[32], [64]], [], [128])
    thread = gl.arange(0, 128, threads)
    odd = thread & 1
    upper = thread & 2
    within = gl.arange(0, TILE, gl.SliceLayout(1, result))
    column = gl.arange(0, 2, gl.SliceLayout(0, result))
    which = wq * QW + column
    mine = 0x33333333 << (2 * column)[None, :] + (within * 0)[:, None]
    lane = (within & 7)[:, None] * 4 + 2 * column[None, :] + ((within >> 3) & 1)[:, None]
    before = mine & ((1 << lane) - 1)
    head = (within & 15)[:, None] == 0
    zero = gl.zeros([TILE, N], gl.float32, mma)
    layout: gl.constexpr = gl.BlockedLayout([1, QB], [32, 1], [gl.num_warps(), 1], [1, 0])
    one = gl.arange(0, 1, gl.SliceLayout(1, layout))
    it = 0
    qi = 0
    while todo > 0:
        block_start, block_end = bounds(starts, ends, one + block, queries, STEP, QB, False, layout)
        first, count = extent(block_start, block_end)
        count = gl.max(count, 0)
        key0 = (gl.max(first, 0) + skip) * TILE
        tiles = gl.minimum(count - skip, todo)
        if tiles > 0:
            sq = qi % QUERY_STAGES
            mbarrier.wait(q_full.index(sq), (qi // QUERY_STAGES) & 1)
            weight = w_s.index(sq)._reinterpret(gl.float32, [QB * HEADS], flat).slice(wq * N, N)
            weight = weight.load(gl.SliceLayout(0, mma)) * 0.5
            heads = q_s.index(sq).slice(wq * N, N).permute((1, 0))
            query = block * STEP + which
            there = query < queries
            start = gl.load(starts + query, mask=there, other=0)[None, :]
            end = gl.load(ends + query, mask=there, other=0)[None, :]
            least = gl.load(thresholds + query, mask=there, other=0.0)[None, :]
            part = gl.where(skip > 0, 1, 0)
            room = gl.where((skip > 0) & (skip + todo < count), 0, ROOM)
            number = query[None, :] * LISTS + wk * 4 + (within >> 4)[:, None]
            target = kept + number.to(gl.int64) * ROOM + part * (ROOM - 1)
            length = mine * 0
            for j in range((wk + WK - it % WK) % WK, tiles, WK):
                s = (it + j) % STAGES
                mbarrier.wait(full.index(s), ((it + j) // STAGES) & 1)
                products = warpgroup_mma(k_s.index(s), heads, zero, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, deps=(products,))
                score = weigh(products, weight, odd, upper, HEADS, QW, result)
                scale = s_s.index(s)._reinterpret(gl.float32, [TILE], flat).load(gl.SliceLayout(1, result))
                mbarrier.arrive(empty.index(s), count=1)
                key = key0 + j * TILE + within[:, None]
                slot, length, entry = gl.inline_asm_elementwise(
                    _KEEP, "=&r,=&r,=&l,f,f,r,r,r,r,r,r,r",
                    [score * scale[:, None], least, key, start, end, length, mine, before, room],
                    dtype=(gl.int32, gl.int32, gl.int64), is_pure=False, pack=1,
                )  # fmt: skip
                gl.store(target + gl.where(part > 0, -slot, slot), entry, mask=slot >= 0)
            mbarrier.arrive(q_empty.index(sq), count=1)
            place = query[None, :] * (2 * LISTS) + part * LISTS + wk * 4 + (within >> 4)[:, None]
            gl.store(counts + place, length, mask=there[None, :] & head)
            gl.store(failed + query[None, :] + within[:, None] * 0, 1, mask=there[None, :] & head & (room == 0))
            it += tiles
            qi += 1
        if count > 0:
            todo -= count + EXTRA - skip
        block += 1
        skip = 0


@gluon.jit(do_not_specialize=["queries"])
def keep_kernel(
    q_desc, w_desc, k_desc, s_desc, thresholds, kept, counts, failed, starts, ends, queries,
    HEADS: gl.constexpr, QW: gl.constexpr, WK: gl.constexpr, WQ: gl.constexpr, STAGES: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    QB: gl.constexpr = QW * WQ
    block, skip, todo = plan(starts, ends, queries, QB, QB, False, BLOCKS)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [QUERY_STAGES] + q_desc.block_shape, q_desc.layout)  # noqa: RUF005
    w_s = gl.allocate_shared_memory(w_desc.dtype, [QUERY_STAGES] + w_desc.block_shape, w_desc.layout)  # noqa: RUF005
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)  # noqa: RUF005
    s_s = gl.allocate_shared_memory(s_desc.dtype, [STAGES] + s_desc.block_shape, s_desc.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUERY_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=WK * WQ)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WQ)
    gl.warp_specialize(
        [
            (keep, (thresholds, kept, counts, failed, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s,
                    q_full, q_empty, full, empty, HEADS, QB, QB, QW, STAGES, WK, 0, 0)),
            (keep, (thresholds, kept, counts, failed, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s,
                    q_full, q_empty, full, empty, HEADS, QB, QB, QW, STAGES, WK, 1 % WK, 1 // WK)),
            (keep, (thresholds, kept, counts, failed, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s,
                    q_full, q_empty, full, empty, HEADS, QB, QB, QW, STAGES, WK, 2 % WK, 2 // WK)),
            (keep, (thresholds, kept, counts, failed, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s,
                    q_full, q_empty, full, empty, HEADS, QB, QB, QW, STAGES, WK, 3 % WK, 3 // WK)),
            (produce, (q_desc, w_desc, k_desc, s_desc, starts, ends, starts, 0, queries, block, skip, todo,
                       q_s, w_s, k_s, s_s, q_full, q_empty, full, empty, HEADS, QB, QB, False, STAGES)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 32],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["k"])
def choose_kernel(kept, counts, failed, starts, ends, out, failures, failing, k, WIDE: gl.constexpr):
    """The k best of a row's lists; a warp reads one list. Lists the row as failing if they are not the row's k best."""
    EACH: gl.constexpr = ROOM // 32
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [LISTS], [0])
    row = gl.program_id(0)
    tid = gl.arange(0, 32 * LISTS, layout=flat)
    mine = tid.to(gl.uint32)
    base = topk.memory((row * 0).to(gl.uint32))
    for at in gl.static_range(0, 3 * TABLE, 32 * LISTS * 16):
        topk.clear(base + at + mine * 16)
    gl.thread_barrier()
    warp = tid >> 5
    upward = gl.load(counts + row * 2 * LISTS + warp)
    downward = gl.load(counts + row * 2 * LISTS + LISTS + warp)
    over = gl.max((upward + downward > ROOM).to(gl.int32), 0)
    upward = gl.minimum(upward, ROOM)
    source = kept + (row.to(gl.int64) * LISTS + warp) * ROOM
    scores = ()
    keys = ()
    for j in gl.static_range(EACH):
        at = 32 * j + (tid & 31)
        entry = gl.load(source + at, mask=(at < upward) | (at >= ROOM - downward), other=0xFF800000)
        scores = scores + (entry.to(gl.int32).to(gl.float32, bitcast=True),)  # type: ignore[assignment]  # noqa: RUF005
        keys = keys + ((entry >> 32).to(gl.int32),)  # type: ignore[assignment]  # noqa: RUF005
    bits, least, wanted, there = topk.threshold(scores, base, k.to(gl.uint32), EACH)
    win = mine * 0
    if wanted == there:
        for j in gl.static_range(EACH):
            win = topk.bit_if(win, bits[j], least, j, 0)
    else:
        # of the equal ones, those below the highest position that `wanted` of them are below
        low = 0
        high = 0x7FFFFFFF
        for _ in range(31):
            middle = low + (high - low) // 2
            below = tid * 0
            for j in gl.static_range(EACH):
                below += ((bits[j] == least) & (keys[j] < middle)).to(gl.int32)
            few = gl.sum(below, 0) <= wanted.to(gl.int32)
            low = gl.where(few, middle, low)
            high = gl.where(few, high, middle)
        for j in gl.static_range(EACH):
            win = topk.bit_if(win, bits[j], least, j, 1)
            win |= ((bits[j] == least) & (keys[j] < low)).to(gl.uint32) << j
    before, total = topk.sums(base + SCRATCH + 768, topk.population(win, mine * 0))
    found = gl.max(total.to(gl.int32), 0)
    sought = gl.minimum(gl.load(ends + row) - gl.load(starts + row), k)
    if (over > 0) | (found < sought) | (gl.load(failed + row) > 0):
        gl.store(failing + gl.atomic_add(failures, 1), row)
    else:
        target = out + row.to(gl.int64) * k
        slot = before.to(gl.int32)
        for j in gl.static_range(EACH):
            winner = ((win >> j) & 1) > 0
            gl.store(target + slot, keys[j], mask=winner)
            slot += winner.to(gl.int32)
        for begin in gl.static_range(0, WIDE, 32 * LISTS):
            gl.store(target + begin + tid, -1, mask=(begin + tid >= found) & (begin + tid < k))


@gluon.jit(do_not_specialize=["width", "k"])
def rescue_kernel(
    q_desc, w_desc, k_desc, s_desc, space, width, starts, ends, out, failures, failing, k,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Selects for failing rows, whatever their scores: each program scores one at a time into its row of `space`."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    by_key: gl.constexpr = gl.SliceLayout(1, mma)
    STRIDE: gl.constexpr = 4096
    line: gl.constexpr = gl.BlockedLayout([STRIDE // 128], [32], [4], [0])
    lane = gl.arange(0, STRIDE, line)
    q_s = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_shape, q_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, w_desc.block_shape, w_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)  # noqa: RUF005
    s_s = gl.allocate_shared_memory(s_desc.dtype, [STAGES] + s_desc.block_shape, s_desc.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    own = space + gl.program_id(0).to(gl.int64) * width
    phase = 0
    for number in range(gl.program_id(0), gl.load(failures), gl.num_programs(0)):
        row = gl.load(failing + number)
        start = gl.load(starts + row)
        end = gl.load(ends + row)
        mbarrier.expect(ready, q_desc.block_type.nbytes + w_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [row * HEADS, 0], ready, q_s)
        tma.async_copy_global_to_shared(w_desc, [0, row * HEADS], ready, w_s)
        mbarrier.wait(ready, phase)
        phase ^= 1
        weight = w_s._reinterpret(gl.float32, [HEADS], flat).load(gl.SliceLayout(0, mma)) * 0.5
        for base in range(start // TILE, (end + TILE - 1) // TILE, STAGES):
            gl.thread_barrier()
            mbarrier.expect(ready, STAGES * (k_desc.block_type.nbytes + s_desc.block_type.nbytes))
            for u in gl.static_range(STAGES):
                tma.async_copy_global_to_shared(k_desc, [(base + u) * TILE, 0], ready, k_s.index(u))
                tma.async_copy_global_to_shared(s_desc, [0, (base + u) * TILE], ready, s_s.index(u))
            mbarrier.wait(ready, phase)
            phase ^= 1
            for u in gl.static_range(STAGES):
                zero = gl.zeros([TILE, HEADS], gl.float32, mma)
                x = warpgroup_mma(k_s.index(u), q_s.permute((1, 0)), zero, use_acc=False)
                score = gl.sum((x + gl.abs(x)) * weight[None, :], 1)
                score *= s_s.index(u)._reinterpret(gl.float32, [TILE], flat).load(by_key)
                key = (base + u) * TILE + gl.arange(0, TILE, by_key)
                gl.store(own + key, score, mask=(key >= start) & (key < end))
        gl.thread_barrier()
        # the largest number that k of the range's scores reach
        low = NEVER
        high = 0x7FFFFFFF
        for _ in range(32):
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            reach = gl.zeros([STRIDE], gl.int32, line)
            for at in range(start, end, STRIDE):
                inside = at + lane < end
                x = ordered(gl.load(own + at + lane, mask=inside, other=float("-inf"), cache_modifier=".cg"))
                reach += (inside & (x >= middle)).to(gl.int32)
            enough = gl.sum(reach, 0) >= k
            low = gl.where(enough, middle, low)
            high = gl.where(enough, high, middle)
        above = gl.zeros([STRIDE], gl.int32, line)
        for at in range(start, end, STRIDE):
            inside = at + lane < end
            x = ordered(gl.load(own + at + lane, mask=inside, other=float("-inf"), cache_modifier=".cg"))
            above += (inside & (x > low)).to(gl.int32)
        ties = k - gl.sum(above, 0)
        target = out + row.to(gl.int64) * k
        found = 0
        for at in range(start, end, STRIDE):
            inside = at + lane < end
            x = ordered(gl.load(own + at + lane, mask=inside, other=float("-inf"), cache_modifier=".cg"))
            tie = inside & (x == low) & (x > NEVER)
            tie = tie & (gl.associative_scan(tie.to(gl.int32), 0, add) <= ties)
            winner = tie | (inside & (x > low))
            upto = gl.associative_scan(winner.to(gl.int32), 0, add)
            gl.store(target + found + upto - 1, at + lane, mask=winner)
            found += gl.sum(winner.to(gl.int32), 0)
            ties -= gl.sum(tie.to(gl.int32), 0)
        for at in range(found, k, STRIDE):
            gl.store(target + at + lane, -1, mask=at + lane < k)


# ---- the host's side -------------------------------------------------------------------------------------------------

SLICE = 4096
"""Queries of a launch: their lists take 64 KiB each."""
FEW = 1024
"""Below so many queries a block of them may be shared by more than two programs, and the lists do not pay."""
SCORES = 1 << 30
"""Bytes of scores at a time, where scores are written."""
RESCUE_STAGES = 4


def _result(out: Tensor | None, tokens: int, k: int, device: torch.device) -> Tensor:
    if not 1 <= k <= 2048:
        raise ValueError(f"k must be 1 to 2048, got {k}")
    if out is None:
        return torch.empty(tokens, k, dtype=torch.int32, device=device)
    if out.dtype != torch.int32 or out.shape != (tokens, k) or not out.is_contiguous() or out.device != device:
        raise ValueError(f"out must be contiguous i32 [{tokens}, {k}] on {device}")
    return out


@on_its_device
def index_select(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Positions [S, k] i32 of the k keys in starts[s] <= l < ends[s] that score highest, -1 where there are fewer.

    Arguments as `index_logits`; of equal scores the lowest position wins; a row's order is not specified. k: 1 to 2048.
    Raises `ValueError`.
    """
    tokens, length = q.shape[0], keys.shape[0]
    out = _result(out, tokens, k, q.device)
    if not tokens or not length:
        return out.fill_(-1)
    if length > LONG and tokens >= FEW:
        step, way = SLICE, _select_lists
    else:
        step, way = max(SCORES // (4 * length), 1), _select_scores
    for at in range(0, tokens, step):
        rows = slice(at, at + step)
        way(q[rows], weights[rows], keys, key_scales, starts[rows], ends[rows], out[rows])
    return out


@on_its_device
def index_select_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Positions [B * n, k] i32 within its request of the k keys that score highest, -1 where there are fewer.

    Arguments as `index_logits_paged`, k and ties as `index_select`. Raises `ValueError`.
    """
    out = _result(out, q.shape[0], k, q.device)
    if not q.shape[0] or not block_table.shape[1]:
        return out.fill_(-1)
    if q.shape[0] == block_table.shape[0]:
        scores = index_logits_paged(q, weights, cache, block_table, lengths, fill=0)
        return _top_k(scores, lengths, out, True)
    limits = torch.empty(q.shape[0], dtype=torch.int32, device=q.device)
    scores = index_logits_paged(q, weights, cache, block_table, lengths, fill=0, limits=limits)
    return _top_k(scores, limits, out, False)


def _top_k(scores: Tensor, lens: Tensor, out: Tensor, early: bool) -> Tensor:
    """`topk.top_k` into `out`; `early`: gets ready while the scorer, which then must not write `lens`, still runs."""
    rows, k = out.shape
    launches = topk.plan(rows, scores.shape[1], k)
    names, ends = None, lens
    for number, launch in enumerate(launches):
        found, values = out, None
        if number + 1 < len(launches):
            found = torch.empty(rows, launch.pieces * k, dtype=torch.int32, device=out.device)
            values = torch.empty_like(found, dtype=torch.float32)
        topk._run(launch, scores, None if number else ends, names, found, values, k, early or number > 0)
        names, scores = found, scores if values is None else values
    return out


def _select_scores(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, out: Tensor
) -> None:
    _top_k(index_logits(q, weights, keys, key_scales, starts, ends, fill=1), ends, out, True)


def _sample(length: int) -> int:
    """Keys to sample: 1,024, and from 65,537 on so many that 32 of them are likely to be among the best 2,048."""
    return max(1024, 1 << (length - 1).bit_length() >> 6)


@functools.cache
def _spread(length: int, sample: int, device: torch.device) -> Tensor:
    return torch.arange(sample, device=device) * length // sample


@functools.cache
def _everything(tokens: int, sample: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranges of all samples."""
    starts = torch.zeros(tokens, dtype=torch.int32, device=device)
    return starts, torch.full_like(starts, sample)


def _select_lists(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, out: Tensor
) -> None:
    tokens, heads, _ = q.shape
    length, k = keys.shape[0], out.shape[1]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    # what is made during a capture holds nothing before the replay
    capturing = torch.cuda.is_current_stream_capturing()
    sample = _sample(length)
    spread = (_spread.__wrapped__ if capturing else _spread)(length, sample, q.device)
    everything = (_everything.__wrapped__ if capturing else _everything)(tokens, sample, q.device)
    sample_keys = keys.view(torch.uint8).index_select(0, spread).view(torch.float8_e4m3fn)
    sample_scales = key_scales.index_select(0, spread)
    samples = index_logits(q, weights, sample_keys, sample_scales, *everything, fill=0)
    thresholds, failing = empty(torch.float32, tokens), empty(torch.int32, tokens)
    counts, failed = empty(torch.int32, tokens, 2 * LISTS.value), empty(torch.int32, tokens)
    failures = empty(torch.int32, 1)
    kept = empty(torch.int64, tokens, LISTS.value * ROOM.value)
    guess_kernel[(tokens,)](
        samples, starts, ends, thresholds, counts, failed, failures, length, k, SAMPLE=sample, num_warps=4
    )
    c = prefill_config()
    grid = (programs(q.device),)
    keep_kernel[grid](
        *descriptors(q, weights, keys, key_scales, c.block), thresholds, kept, counts, failed, starts, ends, tokens,
        HEADS=heads, QW=c.queries, WK=c.along_keys, WQ=c.along_queries, STAGES=c.stages, BLOCKS=PREFILL_BLOCKS,
        num_warps=4,
    )  # fmt: skip
    choose_kernel[(tokens,)](
        kept, counts, failed, starts, ends, out, failures, failing, k, WIDE=-(-k // 256) * 256, num_warps=8
    )
    rescue_kernel[grid](
        *descriptors(q, weights, keys, key_scales, 1), empty(torch.float32, grid[0], length), length, starts, ends, out,
        failures, failing, k, HEADS=heads, STAGES=RESCUE_STAGES, num_warps=4,
    )  # fmt: skip


def variants() -> list[Variant]:
    """The four kernels of long ranges, for 64 heads."""

    def described(block: list[int], dtype: gl.dtype, spelled: str) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return f"tensordesc<{spelled}[{','.join(map(str, block))}],{layout!r}>"

    def inputs(block: int) -> dict[str, str]:
        return {
            "q_desc": described([block * 64, 128], gl.float8e4nv, "fp8e4nv"),
            "w_desc": described([1, block * 64], gl.float32, "fp32"),
            "k_desc": described([64, 128], gl.float8e4nv, "fp8e4nv"),
            "s_desc": described([1, 64], gl.float32, "fp32"),
        }

    c = prefill_config()
    ranges = {"starts": "*i32", "ends": "*i32"}
    lists = {"counts": "*i32", "failed": "*i32"}
    result = {"out": "*i32", "failures": "*i32", "failing": "*i32", "k": "i32"}
    return [
        Variant(
            "index_select_guess", guess_kernel,
            {"samples": "*fp32", **ranges, "thresholds": "*fp32", **lists, "failures": "*i32", "length": "i32",
             "k": "i32"}, {"SAMPLE": 1024}, 4,
        ),
        Variant(
            "index_select_keep", keep_kernel,
            {**inputs(c.block), "thresholds": "*fp32", "kept": "*i64", **lists, **ranges, "queries": "i32"},
            {"HEADS": 64, "QW": c.queries, "WK": c.along_keys, "WQ": c.along_queries, "STAGES": c.stages,
             "BLOCKS": PREFILL_BLOCKS}, 4,
        ),
        Variant(
            "index_select_choose", choose_kernel, {"kept": "*i64", **lists, **ranges, **result}, {"WIDE": 2048}, 8
        ),
        Variant(
            "index_select_rescue", rescue_kernel,
            {**inputs(1), "space": "*fp32", "width": "i32", **ranges, **result},
            {"HEADS": 64, "STAGES": RESCUE_STAGES}, 4,
        ),
    ]  # fmt: skip
