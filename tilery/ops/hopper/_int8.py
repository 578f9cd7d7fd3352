"""The INT8 matrix products: wgmma s8 x s8 -> s32 (IGMMA), scaled in the epilogue; persistent and warp-specialised.

`wide`: many rows. A tile is BM rows by BN outputs; one warp brings blocks of 128 inputs with TMA, the other warps
multiply, scale and store through shared memory.

`swapped`: few rows, or groups of unknown length. Outputs are the rows of the instruction, 64 or 128 at a time, and the
8 to 128 tokens its columns, so that the weights stream through the tensor cores once. Dense: the units (a tile's block
of 128 inputs) are dealt evenly to the programs, so a tile may be shared; parts go to a workspace and whoever comes last
adds them. Integer sums are exact, so the result does not depend on the order. Groups: whole tiles of every group.

A program lets the next kernel start once the kernel before has ended, so at most two are on the device at a time.

Legend: M rows (tokens), N outputs, K inputs, E groups, S stages of the ring, P programs, U units.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = gl.constexpr(128)


@gluon.jit
def _raster(t, num_m, num_n, RASTER: gl.constexpr):
    """Tile t -> (row tile, column tile), RASTER row tiles at a time, so that neighbours share operands in L2."""
    first = t // (RASTER * num_n) * RASTER
    height = gl.minimum(num_m - first, RASTER)
    inner = t % (RASTER * num_n)
    return first + inner % height, inner // height


@gluon.jit
def _wide_bring(
    a_desc, b_desc, a_s, b_s, full, empty, groups, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, S: gl.constexpr, RASTER: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, BN)
    it = 0
    gdc_wait()
    gdc_launch_dependents()
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pm, pn = _raster(t, num_m, num_n, RASTER)
        row = pn * BN
        inputs = K
        if GROUPED:
            group = gl.load(groups + pm)
            row += gl.maximum(group, 0) * N
            inputs = gl.where(group < 0, 0, K)
        for k in range(0, inputs, BLOCK):
            s = it % S
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ((it // S) & 1) ^ 1)
            mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [pm * BM, k], bar, a_s.index(s))
            tma.async_copy_global_to_shared(b_desc, [row, k], bar, b_s.index(s))
            it += 1


@gluon.jit
def _wide_multiply(
    out_desc, a_s, b_s, full, empty, groups, a_scale, b_scale, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, S: gl.constexpr, RASTER: gl.constexpr, GROUPED: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    # The compiler refuses 256 columns of integers, so 256 are two instructions of 128.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])
    out_s = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, BN)
    it = 0
    gdc_wait()
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pm, pn = _raster(t, num_m, num_n, RASTER)
        group = 0
        if GROUPED:
            group = gl.load(groups + pm)
        if group >= 0:
            acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.int32, layout))
            for k in range(0, K, BLOCK):
                s = it % S
                mbarrier.wait(full.index(s), (it // S) & 1)
                acc = warpgroup_mma(a_s.index(s), b_s.index(s).permute((1, 0)), acc, is_async=True, use_acc=(k > 0))
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((it + S - 1) % S), count=1, pred=k > 0)
                acc = warpgroup_mma_init(acc)
                it += 1
            total = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((it + S - 1) % S), count=1)
            rows = pm * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
            columns = pn * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
            row_scale = gl.load(a_scale + rows, mask=rows < M, other=0.0)
            column_scale = gl.load(b_scale + group * N + columns, mask=columns < N, other=0.0)
            scaled = total.to(gl.float32) * gl.expand_dims(row_scale, 1) * gl.expand_dims(column_scale, 0)
            tma.store_wait(0)
            out_s.store(scaled.to(out_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [pm * BM, pn * BN], out_s)
    tma.store_wait(0)


@gluon.jit
def wide(
    a_desc, b_desc, out_desc, groups, a_scale, b_scale, M, N, K,
    S: gl.constexpr, RASTER: gl.constexpr, GROUPED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out = (a @ b^T) * a_scale * b_scale; a int8 [M, K], b int8 [N, K], scales fp32 [M] and [N], out [M, N].

    GROUPED: b int8 [E * N, K], b_scale [E * N]; row tile i of BM rows belongs to group groups[i], -1: left alone.
    """
    BM: gl.constexpr = a_desc.block_shape[0]
    BN: gl.constexpr = b_desc.block_shape[0]
    a_s = gl.allocate_shared_memory(a_desc.dtype, [S] + a_desc.block_shape, a_desc.layout)
    b_s = gl.allocate_shared_memory(b_desc.dtype, [S] + b_desc.block_shape, b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_wide_multiply, (
                out_desc, a_s, b_s, full, empty, groups, a_scale, b_scale, M, N, K, BM, BN, S, RASTER, GROUPED,
                num_warps,
            )),
            (_wide_bring, (a_desc, b_desc, a_s, b_s, full, empty, groups, M, N, K, BM, BN, S, RASTER, GROUPED)),
        ],
        [1], [24],
    )  # fmt: skip


@gluon.jit
def owner(u, U, P):
    """The program that unit u of U belongs to: program p has [p * U // P, (p + 1) * U // P)."""
    return ((u + 1) * P - 1) // U


@gluon.jit
def _load_unit(b_desc, a_desc, b_s, a_s, full, s, row, token, k, B: gl.constexpr, A: gl.constexpr):
    bar = full.index(s)
    if B:
        mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(b_desc, [row, k], bar, b_s.index(s))
    if A:
        tma.async_copy_global_to_shared(a_desc, [token, k], bar, a_s.index(s))


@gluon.jit
def _swapped_bring(b_desc, a_desc, b_s, a_s, full, empty, N, KB, R: gl.constexpr, S: gl.constexpr):
    U = gl.cdiv(N, R) * KB
    start = gl.program_id(0) * U // gl.num_programs(0)
    count = (gl.program_id(0) + 1) * U // gl.num_programs(0) - start
    ahead = gl.minimum(count, S)
    # weights never depend on the kernel before: the ring fills while that one ends
    for i in range(ahead):
        n = (start + i) // KB
        _load_unit(b_desc, a_desc, b_s, a_s, full, i, n * R, 0, (start + i - n * KB) * BLOCK, True, False)
    gdc_wait()
    gdc_launch_dependents()
    for i in range(ahead):
        n = (start + i) // KB
        _load_unit(b_desc, a_desc, b_s, a_s, full, i, n * R, 0, (start + i - n * KB) * BLOCK, False, True)
    for i in range(ahead, count):
        mbarrier.wait(empty.index(i % S), ((i // S) & 1) ^ 1)
        n = (start + i) // KB
        _load_unit(b_desc, a_desc, b_s, a_s, full, i % S, n * R, 0, (start + i - n * KB) * BLOCK, True, True)


@gluon.jit
def _multiply_units(b_s, a_s, full, empty, it, blocks, R: gl.constexpr, T: gl.constexpr, S: gl.constexpr):
    """The sum over the next `blocks` units of the ring, s32 [R, T], and the ring's position after them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [R // 16, 1], [16, T, 32])
    acc = warpgroup_mma_init(gl.zeros((R, T), gl.int32, layout))
    for g in range(blocks):
        s = it % S
        mbarrier.wait(full.index(s), (it // S) & 1)
        acc = warpgroup_mma(b_s.index(s), a_s.index(s).permute((1, 0)), acc, is_async=True, use_acc=(g > 0))
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((it + S - 1) % S), count=1, pred=g > 0)
        acc = warpgroup_mma_init(acc)
        it += 1
    total = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((it + S - 1) % S), count=1)
    return total, it


@gluon.jit
def _swapped_store(out, acc, a_scale, b_scale, n0, m0, m_end, N, R: gl.constexpr, T: gl.constexpr):
    """Rows m0 to m_end, outputs n0 to N of the s32 tile [R, T], with their scales. b_scale: at output 0."""
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 32 // (R // 8)], [1, R // 16], [0, 1])
    total = gl.convert_layout(acc, stored)
    n = n0 + gl.arange(0, R, gl.SliceLayout(1, stored))
    m = m0 + gl.arange(0, T, gl.SliceLayout(0, stored))
    column_scale = gl.load(b_scale + n, mask=n < N, other=0.0)
    row_scale = gl.load(a_scale + m, mask=m < m_end, other=0.0)
    scaled = total.to(gl.float32) * row_scale[None, :] * column_scale[:, None]
    mask = (n < N)[:, None] & (m < m_end)[None, :]
    gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], scaled.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _swapped_multiply(
    b_s, a_s, full, empty, a_scale, b_scale, out, parts, tickets, M, N, KB,
    R: gl.constexpr, T: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [R // 16, 1], [16, T, 32])
    U = gl.cdiv(N, R) * KB
    P = gl.num_programs(0)
    p = gl.program_id(0)
    end = (p + 1) * U // P
    cell = gl.arange(0, R, gl.SliceLayout(1, layout))[:, None] * T + gl.arange(0, T, gl.SliceLayout(0, layout))[None, :]
    it = 0
    u = p * U // P
    gdc_wait()
    while u < end:
        n = u // KB
        begin = u - n * KB
        blocks = gl.minimum(KB - begin, end - u)
        acc, it = _multiply_units(b_s, a_s, full, empty, it, blocks, R, T, S)
        if blocks == KB:
            _swapped_store(out, acc, a_scale, b_scale, n * R, 0, M, N, R, T)
        else:
            # a program leaves at most two parts: of the tile it starts in (slot 0) and of the one it ends in (slot 1)
            gl.store(parts + (2 * p + gl.where(begin == 0, 1, 0)) * (R * T) + cell, acc)
            first = owner(n * KB, U, P)
            last = owner(n * KB + KB - 1, U, P)
            gl.thread_barrier()
            if gl.atomic_add(tickets + n, 1, sem="acq_rel") == last - first:
                gl.store(tickets + n, 0)
                total = gl.load(parts + (2 * first + 1) * (R * T) + cell, cache_modifier=".cg")
                for q in range(first + 1, last + 1, 4):
                    for i in gl.static_range(4):
                        there = (cell >= 0) & (q + i <= last)
                        total += gl.load(parts + 2 * (q + i) * (R * T) + cell, there, 0, cache_modifier=".cg")
                _swapped_store(out, total, a_scale, b_scale, n * R, 0, M, N, R, T)
        u += blocks


@gluon.jit
def swapped(b_desc, a_desc, a_scale, b_scale, out, parts, tickets, M, N, KB, S: gl.constexpr, num_warps: gl.constexpr):
    """out = (a @ b^T) * a_scale * b_scale for M <= T rows, see the module. KB: K / 128. tickets: zeros, left so."""
    R: gl.constexpr = b_desc.block_shape[0]
    T: gl.constexpr = a_desc.block_shape[0]
    b_s = gl.allocate_shared_memory(b_desc.dtype, [S] + b_desc.block_shape, b_desc.layout)
    a_s = gl.allocate_shared_memory(a_desc.dtype, [S] + a_desc.block_shape, a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_swapped_multiply, (
                b_s, a_s, full, empty, a_scale, b_scale, out, parts, tickets, M, N, KB, R, T, S,
            )),
            (_swapped_bring, (b_desc, a_desc, b_s, a_s, full, empty, N, KB, R, S)),
        ],
        [1], [24],
    )  # fmt: skip


@gluon.jit
def _masked_bring(
    b_desc, a_desc, b_s, a_s, full, empty, counts, E, room, N, KB, R: gl.constexpr, T: gl.constexpr, S: gl.constexpr
):
    tiles = gl.cdiv(N, R)
    it = 0
    gdc_wait()
    gdc_launch_dependents()
    for t in range(gl.program_id(0), E * tiles, gl.num_programs(0)):
        group = t // tiles
        n = t % tiles
        for m in range(0, gl.load(counts + group), T):
            for k in range(KB):
                s = it % S
                mbarrier.wait(empty.index(s), ((it // S) & 1) ^ 1)
                _load_unit(
                    b_desc, a_desc, b_s, a_s, full, s, group * N + n * R, group * room + m, k * BLOCK, True, True
                )
                it += 1


@gluon.jit
def _masked_multiply(
    b_s, a_s, full, empty, a_scale, b_scale, out, counts, E, room, N, KB,
    R: gl.constexpr, T: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    tiles = gl.cdiv(N, R)
    it = 0
    gdc_wait()
    for t in range(gl.program_id(0), E * tiles, gl.num_programs(0)):
        group = t // tiles
        n = t % tiles
        count = gl.load(counts + group)
        first = group * room
        for m in range(0, count, T):
            acc, it = _multiply_units(b_s, a_s, full, empty, it, KB, R, T, S)
            _swapped_store(out, acc, a_scale, b_scale + group * N, n * R, first + m, first + count, N, R, T)


@gluon.jit
def masked(b_desc, a_desc, a_scale, b_scale, out, counts, E, room, N, KB, S: gl.constexpr, num_warps: gl.constexpr):
    """out[e, m] = (a[e, m] @ b[e]^T) * scales for m < counts[e]; a int8 [E * room, K], b int8 [E * N, K], scales fp32
    [E * room] and [E * N], out [E * room, N], whose other rows are left alone."""
    R: gl.constexpr = b_desc.block_shape[0]
    T: gl.constexpr = a_desc.block_shape[0]
    b_s = gl.allocate_shared_memory(b_desc.dtype, [S] + b_desc.block_shape, b_desc.layout)
    a_s = gl.allocate_shared_memory(a_desc.dtype, [S] + a_desc.block_shape, a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_masked_multiply, (b_s, a_s, full, empty, a_scale, b_scale, out, counts, E, room, N, KB, R, T, S)),
            (_masked_bring, (b_desc, a_desc, b_s, a_s, full, empty, counts, E, room, N, KB, R, T, S)),
        ],
        [1], [24],
    )  # fmt: skip
