"""The INT4-weight matrix products: nibbles are widened in registers, outputs are the rows of wgmma, tokens its columns.

A unit is 64 rows (outputs) by 128 inputs, one quantisation group: 4 KiB of packed nibbles in the order in which the
threads of a warpgroup want them as the register operand of wgmma, so a thread reads 16 bytes at a time and nothing
moves between threads. With bf16 activations a nibble n becomes 0x4300 | n = 128 + n, minus 128 + zero: exact. With e4m3
activations a nibble is sign and magnitude and becomes a subnormal, m * 2^-9: exact too; 2^9 comes back at the end.
The products of a group are summed by the tensor cores in a scratch accumulator; an FFMA adds them, times the scales of
the row and (e4m3) of the token, to the fp32 sum.

`dense`: a tile is 64 or 128 rows; two warpgroups take its units in turn and their sums meet in shared memory. The units
are dealt evenly to the programs, so a tile may be shared; parts go to a workspace, and whoever comes last adds them in
the order of the programs: the result does not depend on timing. `masked`: whole tiles of rows of every group of tokens,
each of two warpgroups has its half of the rows.

A program lets the next kernel start once the kernel before has ended, so at most two are on the device at a time.

Legend: N outputs, KB groups of 128 inputs, R rows of a warpgroup, T tokens of a tile, S stages of the ring.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tilery.ops.hopper._int8 import owner

TO_BF16 = gl.constexpr("""{
.reg .b32 a, b, c, d;
shr.u32 b, $4, 4;
shr.u32 c, $4, 8;
shr.u32 d, $4, 12;
lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
sub.rn.bf16x2 $0, a, $5;
sub.rn.bf16x2 $1, b, $6;
sub.rn.bf16x2 $2, c, $5;
sub.rn.bf16x2 $3, d, $6;
}""")
"""A word of 8 nibbles, and 128 + zero of its two rows in pairs -> 4 pairs of bf16."""

TO_E4M3 = gl.constexpr("""{
.reg .b32 a, b, c, d;
shr.u32 b, $2, 3;
shr.u32 c, $2, 4;
shr.u32 d, $2, 7;
and.b32 a, $2, 0x07070707;
and.b32 b, b, 0x01010101;
and.b32 c, c, 0x07070707;
and.b32 d, d, 0x01010101;
mad.lo.u32 $0, b, 0x81, a;
mad.lo.u32 $1, d, 0x81, c;
}""")
"""A word of 8 nibbles (bit 3: negative; the others: magnitude, less one if negative) -> 8 e4m3 of value * 2^-9."""


@gluon.constexpr_function
def order(fp8: bool) -> list[list[int]]:
    """What each bit of a byte's address in a unit adds to its (row, input); the low nibble of byte (r, k) is weight
    (r, k), its high nibble (r, k + 64), up to `pack`'s shuffling within a word."""
    word = [[0, 1], [0, 2], [8, 0], [0, 16]] if fp8 else [[0, 1], [8, 0], [0, 8], [0, 16]]
    lanes = [[0, 4], [0, 8]] if fp8 else [[0, 2], [0, 4]]
    return [*word, *lanes, [1, 0], [2, 0], [4, 0], [0, 32], [16, 0], [32, 0]]


@gluon.constexpr_function
def _pieces(rows):
    return [[r, 0] for r in (64, 128, 256) if r < rows]


@gluon.constexpr_function
def _in_registers(fp8, rows):
    bits = order(fp8)
    return gl.DistributedLinearLayout(bits[:4] + bits[9:10] + _pieces(rows), bits[4:9], bits[10:], [], [rows, 64])


@gluon.constexpr_function
def _in_memory(fp8, rows):
    return gl.SharedLinearLayout(order(fp8) + _pieces(rows))


@gluon.constexpr_function
def accumulator(fp8, tokens):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 32 if fp8 else 16])


@gluon.jit
def _multiply(packed, zeros, a, FP8: gl.constexpr, ASYMMETRIC: gl.constexpr, R: gl.constexpr, T: gl.constexpr):
    """Issues weights [R, 128] (packed, in shared memory) times activations [T, 128] -> fp32 [R, T], without scales."""
    layout: gl.constexpr = accumulator(FP8, T)
    registers: gl.constexpr = _in_registers(FP8, R)
    words = packed._reinterpret(gl.int8, [R, 64], _in_memory(FP8, R)).load(registers)
    if FP8:
        low, high = gl.inline_asm_elementwise(
            TO_E4M3, "=r,=r,r", [words], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
        )
    else:
        rows: gl.constexpr = gl.SliceLayout(1, registers)
        if ASYMMETRIC:
            zero = zeros.load(rows)
        else:
            zero = gl.full([R], 136.0, gl.bfloat16, rows)
        low, high = gl.inline_asm_elementwise(
            TO_BF16, "=r,=r,=r,=r,r,r,r", [words, gl.expand_dims(zero, 1)], dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=True, pack=4,
        )  # fmt: skip
    weights = gl.join(low, high).permute((0, 2, 1)).reshape((R, 128))
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, layout, 4 if FP8 else 2), assert_trivial=True)
    nothing = gl.zeros((R, T), gl.float32, layout)
    return warpgroup_mma(weights, a.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _store(out, acc, n0, m0, m_end, N, R: gl.constexpr, T: gl.constexpr, FP8: gl.constexpr):
    """Rows m0 to m_end, outputs n0 to N of the tile [R, T]."""
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 32 // (R // 8)], [1, 4], [0, 1])
    if FP8:
        acc = acc * 512.0
    tile = gl.convert_layout(acc.to(out.dtype.element_ty), stored)
    n = n0 + gl.arange(0, R, gl.SliceLayout(1, stored))
    m = m0 + gl.arange(0, T, gl.SliceLayout(0, stored))
    mask = (n < N)[:, None] & (m < m_end)[None, :]
    gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], tile, mask=mask)


@gluon.jit
def _bring(
    w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, s, place, row, kb, token,
    W: gl.constexpr, A: gl.constexpr, ASYMMETRIC: gl.constexpr,
):  # fmt: skip
    """Asks for a stage: the weights at `place` with their scales from number `row` on (W), the activations (A)."""
    bytes: gl.constexpr = (
        w_desc.block_type.nbytes + a_desc.block_type.nbytes + scale_desc.block_type.nbytes * (2 if ASYMMETRIC else 1)
    )
    bar = full.index(s)
    if W:
        mbarrier.expect(bar, bytes)
        tma.async_copy_global_to_shared(w_desc, place, bar, w_s.index(s))
        tma.async_copy_global_to_shared(scale_desc, [row], bar, scale_s.index(s))
        if ASYMMETRIC:
            tma.async_copy_global_to_shared(zero_desc, [row], bar, zero_s.index(s))
    if A:
        tma.async_copy_global_to_shared(a_desc, [token, kb * 128], bar, a_s.index(s))


# ---- dense ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _dense_bring(
    w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, empty, N, NP, KB,
    ASYMMETRIC: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    U = gl.cdiv(N, R) * KB
    start = gl.program_id(0) * U // gl.num_programs(0)
    count = (gl.program_id(0) + 1) * U // gl.num_programs(0) - start
    ahead = gl.minimum(count, S)
    # weights never depend on the kernel before: the ring fills while that one ends
    for i in range(ahead):
        n = (start + i) // KB
        kb = start + i - n * KB
        _bring(
            w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, i, [n * (R // 64), kb * 4, 0],
            kb * NP + n * R, kb, 0, True, False, ASYMMETRIC,
        )  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    for i in range(ahead):
        kb = (start + i) % KB
        _bring(
            w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, i, [0, 0, 0], 0, kb, 0,
            False, True, ASYMMETRIC,
        )  # fmt: skip
    for i in range(ahead, count):
        mbarrier.wait(empty.index(i % S), ((i // S) & 1) ^ 1)
        n = (start + i) // KB
        kb = start + i - n * KB
        _bring(
            w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, i % S,
            [n * (R // 64), kb * 4, 0], kb * NP + n * R, kb, 0, True, True, ASYMMETRIC,
        )  # fmt: skip


@gluon.jit
def _dense_multiply(
    w_s, a_s, scale_s, zero_s, full, empty, sums, met, drained, a_scale, a_scale_m, a_scale_k, out, parts, tickets,
    M, N, KB,
    WAY: gl.constexpr, WAYS: gl.constexpr, FP8: gl.constexpr, ASYMMETRIC: gl.constexpr, R: gl.constexpr,
    T: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = accumulator(FP8, T)
    along_rows: gl.constexpr = gl.SliceLayout(1, layout)
    U = gl.cdiv(N, R) * KB
    P = gl.num_programs(0)
    p = gl.program_id(0)
    start = p * U // P
    end = (p + 1) * U // P
    tokens = gl.arange(0, T, gl.SliceLayout(0, layout))
    cell = gl.arange(0, R, along_rows)[:, None] * T + tokens[None, :]
    a_scale += gl.minimum(tokens, M - 1) * a_scale_m
    tile = 0
    u = start
    gdc_wait()
    while u < end:
        n = u // KB
        begin = u - n * KB
        stop = gl.minimum(KB, begin + end - u)
        acc = gl.zeros((R, T), gl.float32, layout)
        # Units go round by their number in the program, not in the tile, so that a stage has one reader for good: a
        # reader of its next unit would take the barrier's phase before the last for the one it waits for.
        mine = begin + (WAY + WAYS - (u - start) % WAYS) % WAYS
        if FP8:
            following = gl.load(a_scale + gl.minimum(mine, stop - 1) * a_scale_k)
        for kb in range(mine, stop, WAYS):
            i = u - start + kb - begin
            s = i % S
            if FP8:
                token_scale = following
                following = gl.load(a_scale + gl.minimum(kb + WAYS, stop - 1) * a_scale_k)
            mbarrier.wait(full.index(s), (i // S) & 1)
            part = _multiply(w_s.index(s), zero_s.index(s if ASYMMETRIC else 0), a_s.index(s), FP8, ASYMMETRIC, R, T)
            scale = gl.expand_dims(scale_s.index(s).load(along_rows).to(gl.float32), 1)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(s), count=1)
            if FP8:
                acc += part * (scale * gl.expand_dims(token_scale, 0))
            else:
                acc += part * scale
        if WAY > 0:
            mbarrier.wait(drained, (tile & 1) ^ 1)
            sums.index(WAY - 1).store(acc)
            mbarrier.arrive(met, count=1)
        else:
            if WAYS > 1:
                mbarrier.wait(met, tile & 1)
                for w in gl.static_range(WAYS - 1):
                    acc += sums.index(w).load(layout)
                mbarrier.arrive(drained, count=1)
            if stop - begin == KB:
                _store(out, acc, n * R, 0, M, N, R, T, FP8)
            else:
                # a program leaves at most two parts: of the tile it starts in (slot 0) and the one it ends in (slot 1)
                gl.store(parts + (2 * p + gl.where(begin == 0, 1, 0)) * (R * T) + cell, acc)
                first = owner(n * KB, U, P)
                last = owner(n * KB + KB - 1, U, P)
                gl.thread_barrier()
                if gl.atomic_add(tickets + n, 1, sem="acq_rel") == last - first:
                    gl.store(tickets + n, 0)
                    total = gl.load(parts + (2 * first + 1) * (R * T) + cell, cache_modifier=".cg")
                    for q in range(first + 1, last + 1, 4):
                        for j in gl.static_range(4):
                            there = (cell >= 0) & (q + j <= last)
                            total += gl.load(parts + 2 * (q + j) * (R * T) + cell, there, 0.0, cache_modifier=".cg")
                    _store(out, total, n * R, 0, M, N, R, T, FP8)
        tile += 1
        u += stop - begin


@gluon.jit
def dense(
    w_desc, a_desc, scale_desc, zero_desc, a_scale, a_scale_m, a_scale_k, out, parts, tickets, M, N, NP, KB,
    ASYMMETRIC: gl.constexpr, WAYS: gl.constexpr, S: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] @ w^T for M <= T, see the module.

    w int32 [NP / 64, 4 KB, 256], scale and zero (128 + zero, bf16) [KB * NP]. a_scale and
    its strides: of e4m3 activations only. parts: two tiles per program. tickets: a zero per tile, left so.
    """
    FP8: gl.constexpr = a_desc.dtype == gl.float8e4nv
    R: gl.constexpr = w_desc.block_shape[0] * 64
    T: gl.constexpr = a_desc.block_shape[0]
    w_s = gl.allocate_shared_memory(w_desc.dtype, [S] + w_desc.block_shape, w_desc.layout)
    a_s = gl.allocate_shared_memory(a_desc.dtype, [S] + a_desc.block_shape, a_desc.layout)
    scale_s = gl.allocate_shared_memory(scale_desc.dtype, [S] + scale_desc.block_shape, scale_desc.layout)
    zero_s = gl.allocate_shared_memory(
        zero_desc.dtype, [S if ASYMMETRIC else 1] + zero_desc.block_shape, zero_desc.layout
    )
    sums = gl.allocate_shared_memory(gl.float32, [WAYS - 1, R, T], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    meet = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(meet.index(0), count=WAYS - 1)
    mbarrier.init(meet.index(1), count=1)
    gl.static_assert(WAYS == 2 and S % WAYS == 0)
    gl.warp_specialize(
        [
            (_dense_multiply, (
                w_s, a_s, scale_s, zero_s, full, empty, sums, meet.index(0), meet.index(1), a_scale, a_scale_m,
                a_scale_k, out, parts, tickets, M, N, KB, 0, WAYS, FP8, ASYMMETRIC, R, T, S,
            )),
            (_dense_multiply, (
                w_s, a_s, scale_s, zero_s, full, empty, sums, meet.index(0), meet.index(1), a_scale, a_scale_m,
                a_scale_k, out, parts, tickets, M, N, KB, 1, WAYS, FP8, ASYMMETRIC, R, T, S,
            )),
            (_dense_bring, (
                w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, empty, N, NP, KB,
                ASYMMETRIC, R, S,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


# ---- masked groups -------------------------------------------------------------------------------------------------


@gluon.jit
def _masked_bring(
    w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, empty, counts, E, room, N, NP, KB,
    ASYMMETRIC: gl.constexpr, R: gl.constexpr, T: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    tiles = gl.cdiv(N, R)
    it = 0
    gdc_wait()
    gdc_launch_dependents()
    for t in range(gl.program_id(0), E * tiles, gl.num_programs(0)):
        group = t // tiles
        n = t % tiles
        panel = group * (NP // 256) + n * R // 256
        piece = n * R % 256 // 64
        for m in range(0, gl.load(counts + group), T):
            for kb in range(KB):
                s = it % S
                mbarrier.wait(empty.index(s), ((it // S) & 1) ^ 1)
                _bring(
                    w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, s,
                    [((panel * KB + kb) * 4 + piece) * 4, 0], (group * KB + kb) * NP + n * R, kb, group * room + m,
                    True, True, ASYMMETRIC,
                )  # fmt: skip
                it += 1


@gluon.jit
def _masked_multiply(
    w_s, a_s, scale_s, zero_s, full, empty, a_scale, a_scale_m, a_scale_k, out, counts, E, room, N, KB,
    HALF: gl.constexpr, FP8: gl.constexpr, ASYMMETRIC: gl.constexpr, R: gl.constexpr, T: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = accumulator(FP8, T)
    along_rows: gl.constexpr = gl.SliceLayout(1, layout)
    tiles = gl.cdiv(N, 2 * R)
    tokens = gl.arange(0, T, gl.SliceLayout(0, layout))
    it = 0
    gdc_wait()
    for t in range(gl.program_id(0), E * tiles, gl.num_programs(0)):
        group = t // tiles
        n = t % tiles
        count = gl.load(counts + group)
        for m in range(0, count, T):
            acc = gl.zeros((R, T), gl.float32, layout)
            if FP8:
                scales = a_scale + (group * room + gl.minimum(m + tokens, room - 1)).to(gl.int64) * a_scale_m
                following = gl.load(scales)
            for kb in range(KB):
                s = it % S
                if FP8:
                    token_scale = following
                    following = gl.load(scales + gl.minimum(kb + 1, KB - 1) * a_scale_k)
                mbarrier.wait(full.index(s), (it // S) & 1)
                packed = w_s.index(s).slice(HALF * (R // 16), R // 16, 0)
                zeros = zero_s.index(s if ASYMMETRIC else 0).slice(HALF * R, R)
                part = _multiply(packed, zeros, a_s.index(s), FP8, ASYMMETRIC, R, T)
                scale = gl.expand_dims(scale_s.index(s).slice(HALF * R, R).load(along_rows).to(gl.float32), 1)
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(empty.index(s), count=1)
                if FP8:
                    acc += part * (scale * gl.expand_dims(token_scale, 0))
                else:
                    acc += part * scale
                it += 1
            _store(out, acc, n * 2 * R + HALF * R, group * room + m, group * room + count, N, R, T, FP8)


@gluon.jit
def masked(
    w_desc, a_desc, scale_desc, zero_desc, a_scale, a_scale_m, a_scale_k, out, counts, E, room, N, NP, KB,
    ASYMMETRIC: gl.constexpr, S: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out[e, m] = a[e, m] @ w[e]^T for m < counts[e], see the module; the other rows of out are left alone.

    a [E * room, K], w int32 [E * NP / 256 * KB * 16, 256]: 256 rows of a group after another, scale and zero
    [E * KB * NP], NP = N rounded up to 256, out [E * room, N].
    """
    FP8: gl.constexpr = a_desc.dtype == gl.float8e4nv
    R: gl.constexpr = w_desc.block_shape[0] * 8
    T: gl.constexpr = a_desc.block_shape[0]
    w_s = gl.allocate_shared_memory(w_desc.dtype, [S] + w_desc.block_shape, w_desc.layout)
    a_s = gl.allocate_shared_memory(a_desc.dtype, [S] + a_desc.block_shape, a_desc.layout)
    scale_s = gl.allocate_shared_memory(scale_desc.dtype, [S] + scale_desc.block_shape, scale_desc.layout)
    zero_s = gl.allocate_shared_memory(
        zero_desc.dtype, [S if ASYMMETRIC else 1] + zero_desc.block_shape, zero_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_masked_multiply, (
                w_s, a_s, scale_s, zero_s, full, empty, a_scale, a_scale_m, a_scale_k, out, counts, E, room, N, KB,
                0, FP8, ASYMMETRIC, R, T, S,
            )),
            (_masked_multiply, (
                w_s, a_s, scale_s, zero_s, full, empty, a_scale, a_scale_m, a_scale_k, out, counts, E, room, N, KB,
                1, FP8, ASYMMETRIC, R, T, S,
            )),
            (_masked_bring, (
                w_desc, a_desc, scale_desc, zero_desc, w_s, a_s, scale_s, zero_s, full, empty, counts, E, room, N, NP,
                KB, ASYMMETRIC, 2 * R, T, S,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip
