"""Scores of the lightning indexer on Hopper, FP8 in, f32 out: prefill over plain keys, decode over packed pages.

    out[s, l] = key_scale[l] * sum_h weight[s, h] * relu(q[s, h] . key[l])      16, 32 or 64 heads of 128

A program is persistent: one warp copies tiles of 64 keys and blocks of queries into shared memory, four warpgroups
multiply and reduce, one warp writes -inf where nothing is scored. Keys are the rows of the tensor-core product and the
heads of one or two queries its columns, so that a thread holds whole groups of heads of two keys. Per product there are
two instructions: x + |x| = 2 relu(x), an addition with a free modifier where a maximum runs at half rate, and a
multiply-add with half the weight, which stays in registers. A thread then has partial sums of four scores; three
shuffles leave it with one whole score, and a store writes 32 of them.

Programs share the tiles evenly: each adds up the tiles of all blocks of queries and finds its own stretch, so nothing
is planned on the host, and a captured graph may be replayed with other ranges and lengths.

Errors, against float64 of the same FP8 inputs: 1.3e-4 relative L2, from the tensor core's reduced-precision sums.

Legend: S query tokens, H heads, L keys, B requests, P pages of a request, C cache pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilery.ops.cache import PAGE
from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper.variant import Variant

DIM = gl.constexpr(128)
TILE = gl.constexpr(64)
"""Keys of a tile, and of a page."""
PAGE_ROWS = gl.constexpr(66)
"""A page's 64 * 132 bytes, in rows of 128: 64 rows of keys, then two of scales."""
PAGE_WORDS = gl.constexpr(2112)
EXTRA = gl.constexpr(2)
"""What changing over to another block of queries costs, in tiles."""
NONE = gl.constexpr(1 << 30)

REGISTERS = gl.constexpr(112)
"""What a thread of the four warpgroups has; with 32 for the two single warps this is all there is."""
QUERY_STAGES = gl.constexpr(2)


@dataclass(frozen=True)
class Config:
    """queries: of a warpgroup, 1 or 2; along_keys * along_queries: 4 warpgroups; stages: tiles of keys in flight.

    A stage always has the same readers: a warpgroup that waits for a barrier's second round while the first is not yet
    over would take the round before for it.
    """

    queries: int
    along_keys: int
    along_queries: int
    stages: int

    def __post_init__(self) -> None:
        if self.along_keys * self.along_queries != 4 or self.stages % self.along_keys or self.queries not in (1, 2):
            raise ValueError(f"not a configuration: {self}")

    @property
    def block(self) -> int:
        """Queries of a program's block."""
        return self.queries * self.along_queries


# ---- who does what ---------------------------------------------------------------------------------------------------


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def bounds(
    starts, ends, block, queries, STEP: gl.constexpr, QB: gl.constexpr, PAGED: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """(starts, ends) [N, QB] of the queries of each `block` [N]; paged, `ends` [N, 1] are the requests' lengths."""
    if PAGED:
        row = block[:, None]
        end = gl.load(ends + row, mask=row * STEP < queries, other=0)
        return end * 0, end
    else:
        row = block[:, None] * STEP + gl.arange(0, QB, gl.SliceLayout(0, layout))[None, :]
        start = gl.load(starts + row, mask=row < queries, other=0)
        return start, gl.load(ends + row, mask=row < queries, other=0)


@gluon.jit
def extent(start, end):
    """(first tile, tiles) [N] that cover the ranges [N, QB] of each block; (0, 0) where they are empty."""
    low = gl.min(gl.where(start < end, start, NONE), 1)
    high = gl.max(gl.where(start < end, end, 0), 1)
    first = gl.where(high > 0, low // TILE, 0)
    return first, (high + TILE - 1) // TILE - first


@gluon.jit
def cost(
    starts, ends, block, queries, STEP: gl.constexpr, QB: gl.constexpr, PAGED: gl.constexpr, layout: gl.constexpr,
    line: gl.constexpr,
):  # fmt: skip
    """The time of each `block` [N] in tiles."""
    start, end = bounds(starts, ends, block, queries, STEP, QB, PAGED, layout)
    _, count = extent(start, end)
    return gl.convert_layout(gl.where(count > 0, count + EXTRA, 0), line)


@gluon.jit
def plan(starts, ends, queries, STEP: gl.constexpr, QB: gl.constexpr, PAGED: gl.constexpr, N: gl.constexpr):
    """This program's stretch: (first block, how much of that block's cost to skip, its cost). N blocks at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1 if PAGED else QB], [32, 1], [gl.num_warps(), 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([N // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    place = gl.arange(0, N, gl.SliceLayout(1, layout))
    blocks = (queries + STEP - 1) // STEP
    units = cost(starts, ends, place, queries, STEP, QB, PAGED, layout, line)
    total = gl.sum(units, 0)
    for base in range(N, blocks, N):
        total += gl.sum(cost(starts, ends, place + base, queries, STEP, QB, PAGED, layout, line), 0)
    begin = (total.to(gl.int64) * gl.program_id(0) // gl.num_programs(0)).to(gl.int32)
    end = (total.to(gl.int64) * (gl.program_id(0) + 1) // gl.num_programs(0)).to(gl.int32)
    upto = gl.associative_scan(units, 0, add)
    block = gl.sum((upto <= begin).to(gl.int32), 0)
    passed = gl.max(gl.where(upto <= begin, upto, 0), 0)
    seen = gl.max(upto, 0)
    for base in range(N, blocks, N):
        units = cost(starts, ends, place + base, queries, STEP, QB, PAGED, layout, line)
        upto = gl.associative_scan(units, 0, add) + seen
        block += gl.sum((upto <= begin).to(gl.int32), 0)
        passed = gl.maximum(passed, gl.max(gl.where(upto <= begin, upto, 0), 0))
        seen = gl.max(upto, 0)
    return block, begin - passed, end - begin


# ---- the warps -------------------------------------------------------------------------------------------------------


@gluon.jit
def produce(
    q_desc, w_desc, k_desc, s_desc, starts, ends, table, table_stride, queries, block, skip, todo,
    q_s, w_s, k_s, s_s, q_full, q_empty, full, empty,
    HEADS: gl.constexpr, STEP: gl.constexpr, QB: gl.constexpr, PAGED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies each block's queries and weights, then its tiles of keys and scales."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1 if PAGED else QB], [32, 1], [gl.num_warps(), 1], [1, 0])
    one = gl.arange(0, 1, gl.SliceLayout(1, layout))
    start, end = bounds(starts, ends, one + block, queries, STEP, QB, PAGED, layout)
    it = 0
    qi = 0
    while todo > 0:
        first, count = extent(start, end)
        count = gl.max(count, 0)
        tile = gl.max(first, 0) + skip
        start, end = bounds(starts, ends, one + block + 1, queries, STEP, QB, PAGED, layout)
        tiles = gl.minimum(count - skip, todo)
        if tiles > 0:
            pages = table + block.to(gl.int64) * table_stride
            stop = tile + tiles
            page = tile
            if PAGED:
                page = gl.load(pages + tile)
            sq = qi % QUERY_STAGES
            mbarrier.wait(q_empty.index(sq), ((qi // QUERY_STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(sq), q_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [block * STEP * HEADS, 0], q_full.index(sq), q_s.index(sq))
            tma.async_copy_global_to_shared(w_desc, [0, block * STEP * HEADS], q_full.index(sq), w_s.index(sq))
            for _ in range(tiles):
                s = it % STAGES
                if PAGED:
                    row = page * PAGE_ROWS
                    word = page * PAGE_WORDS + TILE * DIM // 4
                    tile += 1
                    page = gl.load(pages + tile, mask=tile < stop, other=0)
                else:
                    row = page * TILE
                    word = row
                    page += 1
                mbarrier.wait(empty.index(s), ((it // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), k_desc.block_type.nbytes + s_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(k_desc, [row, 0], full.index(s), k_s.index(s))
                tma.async_copy_global_to_shared(s_desc, [0, word], full.index(s), s_s.index(s))
                it += 1
            qi += 1
        if count > 0:
            todo -= count + EXTRA - skip
        block += 1
        skip = 0


@gluon.jit
def exchange(a, b, bit, distance: gl.constexpr):
    """Sums over pairs of lanes: lanes whose `bit` is 0 end with the pair's sum of `a`, the others with that of `b`."""
    layout: gl.constexpr = bit.type.layout
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .f32 keep, give; setp.ne.s32 p, $3, 0; selp.f32 keep, $2, $1, p; "
        "selp.f32 give, $1, $2, p; shfl.sync.bfly.b32 give, give, " + distance + ", 0x1f, 0xffffffff; "
        "add.f32 $0, keep, give; }",
        "=f,f,f,r",
        [gl.convert_layout(a, layout, True), gl.convert_layout(b, layout, True), bit],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def weigh(products, weight, odd, upper, HEADS: gl.constexpr, QW: gl.constexpr, layout: gl.constexpr):
    """f32 [64 keys, QW * H] -> sum_h 2 weight * relu(product), [64, 2], one to a thread; QW 1: both columns alike.

    Rows of the product are 16 warp + 8 half + lane / 4, columns H query + 8 i + 2 (lane % 4) + j; half, i and j are
    registers of a thread.
    """
    parts = gl.reshape((products + gl.abs(products)) * weight[None, :], [4, 2, 8, QW, HEADS // 8, 4, 2])
    parts = gl.reshape(gl.permute(parts, (0, 2, 5, 3, 1, 4, 6)), [128, QW, 2, HEADS // 4])
    low, high = gl.split(gl.sum(parts, 3))
    if QW == 1:
        one = exchange(gl.reshape(low, [128]), gl.reshape(high, [128]), odd, "1")
        two = one
    else:
        low0, low1 = gl.split(low)
        high0, high1 = gl.split(high)
        one = exchange(low0, high0, odd, "1")
        two = exchange(low1, high1, odd, "1")
    score = gl.permute(gl.reshape(exchange(one, two, upper, "2"), [4, 8, 2, 2]), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(score, [TILE, 2]), layout, assert_trivial=True)


@gluon.jit
def consume(
    out, out_stride, width, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s, q_full, q_empty, full, empty,
    HEADS: gl.constexpr, STEP: gl.constexpr, QB: gl.constexpr, QW: gl.constexpr, PAGED: gl.constexpr,
    STAGES: gl.constexpr, WK: gl.constexpr, wk: gl.constexpr, wq: gl.constexpr,
):  # fmt: skip
    """Scores every WK-th tile, starting with the wk-th, for the wq-th QW queries of each block."""
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
    which = wq * QW + gl.arange(0, 2, gl.SliceLayout(0, result))
    zero = gl.zeros([TILE, N], gl.float32, mma)
    layout: gl.constexpr = gl.BlockedLayout([1, 1 if PAGED else QB], [32, 1], [gl.num_warps(), 1], [1, 0])
    one = gl.arange(0, 1, gl.SliceLayout(1, layout))
    block_start, block_end = bounds(starts, ends, one + block, queries, STEP, QB, PAGED, layout)
    it = 0
    qi = 0
    while todo > 0:
        first, count = extent(block_start, block_end)
        count = gl.max(count, 0)
        key0 = (gl.max(first, 0) + skip) * TILE
        block_start, block_end = bounds(starts, ends, one + block + 1, queries, STEP, QB, PAGED, layout)
        tiles = gl.minimum(count - skip, todo)
        if tiles > 0:
            sq = qi % QUERY_STAGES
            mbarrier.wait(q_full.index(sq), (qi // QUERY_STAGES) & 1)
            weight = w_s.index(sq)._reinterpret(gl.float32, [QB * HEADS], flat).slice(wq * N, N)
            weight = weight.load(gl.SliceLayout(0, mma)) * 0.5
            heads = q_s.index(sq).slice(wq * N, N).permute((1, 0))
            query = block * STEP + which
            there = (query < queries) & (which < STEP) & (which < wq * QW + QW)
            if PAGED:
                start = which * 0
                end = gl.load(ends + block) - STEP + 1 + which
            else:
                start = gl.load(starts + query, mask=there, other=0)
                end = gl.load(ends + query, mask=there, other=0)
            row = out + query.to(gl.int64) * out_stride
            for j in range((wk + WK - it % WK) % WK, tiles, WK):
                s = (it + j) % STAGES
                mbarrier.wait(full.index(s), ((it + j) // STAGES) & 1)
                products = warpgroup_mma(k_s.index(s), heads, zero, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, deps=(products,))
                score = weigh(products, weight, odd, upper, HEADS, QW, result)
                scale = s_s.index(s)._reinterpret(gl.float32, [TILE], flat).load(gl.SliceLayout(1, result))
                mbarrier.arrive(empty.index(s), count=1)
                key = key0 + j * TILE + within[:, None]
                inside = (key >= start[None, :]) & (key < end[None, :])
                score = gl.where(inside, score * scale[:, None], float("-inf"))
                gl.store(row[None, :] + key, score, mask=there[None, :] & (key < width))
            mbarrier.arrive(q_empty.index(sq), count=1)
            it += tiles
            qi += 1
        if count > 0:
            todo -= count + EXTRA - skip
        block += 1
        skip = 0


@gluon.jit
def fill(
    out, out_stride, width, starts, ends, limits, queries, STEP: gl.constexpr, QB: gl.constexpr, PAGED: gl.constexpr,
    FILL: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """-inf for what `consume` does not write of a row up to its end (FILL 1) or of all of it (2); rows go round.

    Writes every paged row's end to `limits`, with LIMITS, and lets the kernel that waits for this one get ready.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r,r", [queries], dtype=gl.int32, is_pure=False, pack=1
    )
    layout: gl.constexpr = gl.BlockedLayout([1, 1 if PAGED else QB], [32, 1], [gl.num_warps(), 1], [1, 0])
    one = gl.arange(0, 1, gl.SliceLayout(1, layout))
    N: gl.constexpr = 128 * gl.num_warps()
    line: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, N, line)
    nothing = gl.full([N], float("-inf"), gl.float32, line)
    if (FILL > 0) | LIMITS:
        for query in range(gl.program_id(0), queries, gl.num_programs(0)):
            block = query // STEP
            start, end = bounds(starts, ends, one + block, queries, STEP, QB, PAGED, layout)
            first, count = extent(start, end)
            low = gl.max(first, 0) * TILE
            row = out + gl.cast(query, gl.int64) * out_stride
            if LIMITS:
                gl.store(limits + query, gl.max(gl.max(end, 1), 0) - STEP + 1 + query % STEP)
            if FILL > 0:
                limit = width
                if FILL == 1:
                    limit = gl.load(ends + (block if PAGED else query))
                for at in range(0, low, N):
                    gl.store(row + at + lane, nothing, mask=at + lane < low)
                for at in range(low + gl.max(count, 0) * TILE, limit, N):
                    gl.store(row + at + lane, nothing, mask=at + lane < limit)


@gluon.jit(do_not_specialize=["queries", "width", "table_stride"])
def logits_kernel(
    q_desc, w_desc, k_desc, s_desc, out, out_stride, width, starts, ends, table, table_stride, limits, queries,
    HEADS: gl.constexpr, STEP: gl.constexpr, QW: gl.constexpr, WK: gl.constexpr, WQ: gl.constexpr,
    PAGED: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, FILL: gl.constexpr,
    LIMITS: gl.constexpr,
):  # fmt: skip
    QB: gl.constexpr = QW * WQ
    block, skip, todo = plan(starts, ends, queries, STEP, QB, PAGED, BLOCKS)
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
            (consume, (out, out_stride, width, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s, q_full,
                       q_empty, full, empty, HEADS, STEP, QB, QW, PAGED, STAGES, WK, 0, 0)),
            (consume, (out, out_stride, width, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s, q_full,
                       q_empty, full, empty, HEADS, STEP, QB, QW, PAGED, STAGES, WK, 1 % WK, 1 // WK)),
            (consume, (out, out_stride, width, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s, q_full,
                       q_empty, full, empty, HEADS, STEP, QB, QW, PAGED, STAGES, WK, 2 % WK, 2 // WK)),
            (consume, (out, out_stride, width, starts, ends, queries, block, skip, todo, q_s, w_s, k_s, s_s, q_full,
                       q_empty, full, empty, HEADS, STEP, QB, QW, PAGED, STAGES, WK, 3 % WK, 3 // WK)),
            (produce, (q_desc, w_desc, k_desc, s_desc, starts, ends, table, table_stride, queries, block, skip, todo,
                       q_s, w_s, k_s, s_s, q_full, q_empty, full, empty, HEADS, STEP, QB, PAGED, STAGES)),
            (fill, (out, out_stride, width, starts, ends, limits, queries, STEP, QB, PAGED, FILL, LIMITS)),
        ],
        [4, 4, 4, 1, 1],
        [REGISTERS, REGISTERS, REGISTERS, 32, 32],
    )  # fmt: skip


# ---- the host's side -------------------------------------------------------------------------------------------------


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype != dtype or tuple(x.shape) != shape or x.device != device:
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, got {found}")
    if not x.is_contiguous() or (dtype != torch.int32 and x.data_ptr() % 16):
        raise ValueError(f"{name} must be contiguous and, if it is copied in blocks, start at a multiple of 16 bytes")


def _check_queries(q: Tensor, weights: Tensor) -> tuple[int, int]:
    tokens, heads, _ = q.shape
    if heads not in (16, 32, 64):
        raise ValueError(f"q must have 16, 32 or 64 heads, got {heads}")
    _check("q", q, torch.float8_e4m3fn, (tokens, heads, 128), q.device)
    _check("weights", weights, torch.float32, (tokens, heads), q.device)
    return tokens, heads


def _result(out: Tensor | None, tokens: int, width: int, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(tokens, width, dtype=torch.float32, device=device)
    if out.dtype != torch.float32 or out.shape != (tokens, width) or out.stride(1) != 1 or out.device != device:
        raise ValueError(f"out must be f32 [{tokens}, {width}] with dense rows on {device}")
    return out


def descriptor(x: Tensor, shape: list[int], block: list[int], dtype: gl.dtype) -> TensorDescriptor:
    """For copies of `block` out of contiguous memory taken as the matrix `shape`.

    A single row's stride is never used, but must be a multiple of 16 bytes, as the address must.
    """
    if x.data_ptr() % 16:
        x = x.clone()
    row = shape[1] if shape[0] > 1 else -(-shape[1] // 16) * 16
    return TensorDescriptor(x, shape, [row, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def descriptors(
    q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor, block: int
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """keys e4m3 [rows, 128], scales f32 [words], however they are interleaved."""
    rows = block * q.shape[1]
    return (
        descriptor(q, [q.shape[0] * q.shape[1], 128], [rows, 128], gl.float8e4nv),
        descriptor(weights, [1, weights.numel()], [1, rows], gl.float32),
        descriptor(keys, [keys.shape[0], 128], [64, 128], gl.float8e4nv),
        descriptor(scales, [1, scales.numel()], [1, 64], gl.float32),
    )


def programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def prefill_config() -> Config:
    """Two queries a warpgroup and two pairs of warpgroups: four queries share a tile of keys on its way from L2.

    On an H100, 2,048 queries of 65,536 keys took 1,874 us so, 1,945 with one block of two queries for all four
    warpgroups, and 1,999 with four queries for each of two warpgroups (all three before the sum over lanes was cut to
    three shuffles, which made it 1,700).
    """
    return Config(2, 2, 2, 8)


def paged_config(step: int) -> Config:
    """For `step` queries a request. With eight pages of a program in flight all programs get the same bandwidth; more
    are no faster on the whole, but unevenly so, and the last one counts: 64 requests of 32,768 take 109.7 us with 8,
    111.3 with 12 (whose programs end between 92 and 112), 113.8 with 16 and 121.1 with 4."""
    return Config(step, 4, 1, 8) if step <= 2 else Config(2, 2, 2, 8)


PREFILL_BLOCKS, PAGED_BLOCKS = 512, 128
"""How many blocks of queries the plan looks at at a time."""


@on_its_device
def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor,
    out: Tensor | None = None, *, fill: int = 2, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Scores [S, L] f32 of each query against the keys starts[s] <= l < ends[s].

    q [S, H, 128] e4m3, weights [S, H] f32 (the query's scale and all constants folded in), keys [L, 128] e4m3,
    key_scales [L] f32, starts and ends [S] i32, 0 <= start, end <= L; out [S, L] f32 with dense rows. Everything
    outside a row's range is -inf (all of it where the range is empty). `fill` 1 leaves what lies after the range as it
    was, `fill` 0 also what lies before it, but for tiles of 64 keys that ranges of neighbouring rows meet.
    Raises `ValueError`.
    """
    tokens, heads = _check_queries(q, weights)
    length = keys.shape[0]
    _check("keys", keys, torch.float8_e4m3fn, (length, 128), q.device)
    _check("key_scales", key_scales, torch.float32, (length,), q.device)
    _check("starts", starts, torch.int32, (tokens,), q.device)
    _check("ends", ends, torch.int32, (tokens,), q.device)
    out = _result(out, tokens, length, q.device)
    if not tokens or not length:
        return out
    c = config or prefill_config()
    logits_kernel[(programs(q.device),)](
        *descriptors(q, weights, keys, key_scales, c.block), out, out.stride(0), length,
        starts, ends, starts, 0, starts, tokens,
        HEADS=heads, STEP=c.block, QW=c.queries, WK=c.along_keys, WQ=c.along_queries, PAGED=False, STAGES=c.stages,
        BLOCKS=PREFILL_BLOCKS, FILL=int(fill), LIMITS=False, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def index_logits_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    fill: int = 2, limits: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Scores [B * n, P * 64] f32 of each request's n newest tokens (1 to 4) against its own cached keys.

    q [B * n, H, 128] e4m3, weights [B * n, H] f32, cache [C, 64 * 132] uint8 (a page: 64 keys of 128 e4m3, then 64 f32
    scales), block_table [B, P] i32 (entries past a request's length are not read), lengths [B] i32 up to 64 P, counting
    the newest token: row b * n + j sees positions below lengths[b] - n + 1 + j. Everything else is -inf; with
    `fill` 0 what lies behind a request's last page keeps what it held. `limits` [B * n] i32, if given, is filled with
    the rows' ends. Raises `ValueError`.
    """
    tokens, heads = _check_queries(q, weights)
    requests, pages = block_table.shape
    step = tokens // max(requests, 1)
    if step * requests != tokens or not 1 <= step <= 4:
        raise ValueError(f"q must have 1 to 4 rows for each of {requests} requests, got {tokens}")
    _check("cache", cache, torch.uint8, (cache.shape[0], PAGE * 132), q.device)
    if cache.numel() >= 1 << 33:
        raise ValueError(f"a cache of {cache.shape[0]} pages has more words than 32 bits count")
    _check("lengths", lengths, torch.int32, (requests,), q.device)
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(f"block_table must be int32 with dense rows, got {block_table.dtype}")
    out = _result(out, tokens, pages * PAGE, q.device)
    if not tokens or not pages or not cache.shape[0]:
        return out.fill_(float("-inf"))
    c = config or paged_config(step)
    keys = cache.view(-1, 128).view(torch.float8_e4m3fn)
    logits_kernel[(programs(q.device),)](
        *descriptors(q, weights, keys, cache.view(torch.float32).view(-1), c.block), out, out.stride(0), out.shape[1],
        lengths, lengths, block_table, block_table.stride(0), lengths if limits is None else limits, tokens,
        HEADS=heads, STEP=step, QW=c.queries, WK=c.along_keys, WQ=c.along_queries, PAGED=True, STAGES=c.stages,
        BLOCKS=PAGED_BLOCKS, FILL=int(fill), LIMITS=limits is not None, num_warps=4,
    )  # fmt: skip
    return out


def _variant(name: str, heads: int, c: Config, step: int, paged: bool, blocks: int) -> Variant:
    def described(block: list[int], dtype: gl.dtype, spelled: str) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return f"tensordesc<{spelled}[{','.join(map(str, block))}],{layout!r}>"

    rows = c.block * heads
    signature = {
        "q_desc": described([rows, 128], gl.float8e4nv, "fp8e4nv"), "w_desc": described([1, rows], gl.float32, "fp32"),
        "k_desc": described([64, 128], gl.float8e4nv, "fp8e4nv"), "s_desc": described([1, 64], gl.float32, "fp32"),
        "out": "*fp32", "out_stride": "i32:16", "width": "i32", "starts": "*i32", "ends": "*i32", "table": "*i32",
        "table_stride": "i32", "limits": "*i32", "queries": "i32",
    }  # fmt: skip
    constexprs = {
        "HEADS": heads, "STEP": step, "QW": c.queries, "WK": c.along_keys, "WQ": c.along_queries, "PAGED": paged,
        "STAGES": c.stages, "BLOCKS": blocks, "FILL": 2, "LIMITS": paged,
    }  # fmt: skip
    return Variant(name, logits_kernel, signature, constexprs, 4)


def variants() -> list[Variant]:
    """Prefill for 64 and 16 heads; decode for 1, 2 and 3 queries a request."""
    found = []
    for heads in (64, 16):
        c = prefill_config()
        found.append(_variant(f"index_logits_{heads}", heads, c, c.block, False, PREFILL_BLOCKS))
    for step in (1, 2, 3):
        found.append(_variant(f"index_logits_paged_{step}", 64, paged_config(step), step, True, PAGED_BLOCKS))
    return found
