"""The kernels of `dense_mla`: MLA decode over a paged latent cache, and the combine of split requests.

A program holds 64 query rows (tokens x heads of one request) and walks over its cache blocks of 64 rows. The output,
64 x 512 f32, fills half the register file, so two consumer warpgroups share it by columns. Blocks go to them in turn:
a warpgroup multiplies Q by its block, takes the softmax, hands the weights to the other one through shared memory, and
both multiply them by their half of the values. While one is at its softmax, the other keeps the tensor cores busy
(DeepSeek's FlashMLA, 2025). The running maximum passes from block to block, so every rescale is one factor a row. The
weights of a block are stored where its rope keys were, which nobody needs any more.

Work is divided by cost (blocks + a fixed charge a request) into as many equal parts as fit the machine; every program
finds its own part from the lengths, and the combine finds the same division again.

Legend: B requests, S query tokens of a request, H heads, D = 576 (latent 512 + rope 64), V = 512, M = S * H rows.
"""

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


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _division(lengths, B, parts, BP: gl.constexpr, charge, least, L: gl.constexpr):
    """(running sum of the requests' costs [BP], request indices [BP], cost of a part)."""
    i = gl.arange(0, BP, L)
    length = gl.load(lengths + i, mask=i < B, other=0)
    ends = gl.associative_scan(gl.where(i < B, (length + 63) // 64 + charge, 0), 0, _add)
    return ends, i, gl.maximum(gl.cdiv(gl.max(ends, 0), parts), least)


@gluon.jit
def _piece(length, begin, low, high, charge):
    """(b0, b1, n): of a request's n blocks those in the part [low, high); its cost starts at `begin`."""
    n = (length + 63) // 64
    b0 = gl.minimum(gl.maximum(low - begin - charge, 0), n)
    b1 = gl.minimum(gl.maximum(high - begin - charge, 0), n)
    return b0, b1, n


@gluon.jit
def _post(queue, queue_full, queue_empty, piece, r, b0, b1, length):
    """Tells the consumers what to do next: blocks [b0, b1) of request r; r < 0: nothing more."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = (piece & 1) * 4
    mbarrier.wait(queue_empty.index(piece & 1), ((piece >> 1) & 1) ^ 1)
    queue.index(slot).store(gl.full([1], r, gl.int32, L))
    queue.index(slot + 1).store(gl.full([1], b0, gl.int32, L))
    queue.index(slot + 2).store(gl.full([1], b1, gl.int32, L))
    queue.index(slot + 3).store(gl.full([1], length, gl.int32, L))
    mbarrier.arrive(queue_full.index(piece & 1), count=1)


@gluon.jit
def _read(queue, at):
    return gl.max(queue.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _queries(q_desc, qr_desc, q_s, qr_s, q_full, row):
    mbarrier.expect(q_full, 64 * 576 * 2)
    for c in gl.static_range(4):
        tma.async_copy_global_to_shared(q_desc, [row, c * 128], q_full, q_s.index(c))
    tma.async_copy_global_to_shared(qr_desc, [row, 512], q_full, qr_s.index(0))


@gluon.jit
def _producer(
    q_desc, qr_desc, kv_desc, kr_desc, table, lengths, q_s, qr_s, k_s, kr_s, q_full, q_empty, full, own_empty,
    oth_empty, queue, queue_full, queue_empty, B, M, width, tile, first, begin, low, high, charge,
):  # fmt: skip
    """Loads blocks in turn into buffers 0 and 1: the columns that the buffer's warpgroup multiplies by its own weights,
    then the other ones with the rope keys, 128 columns a barrier."""
    r = first
    piece = 0
    even = 0
    odd = 0
    while (r < B) & (begin < high):
        length = gl.load(lengths + r)
        b0, b1, n = _piece(length, begin, low, high, charge)
        if b1 > b0:
            _post(queue, queue_full, queue_empty, piece, r, b0, b1, length)
            pages = table + r.to(gl.int64) * width
            page = gl.load(pages + b0)
            mbarrier.wait(q_empty, (piece & 1) ^ 1)
            _queries(q_desc, qr_desc, q_s, qr_s, q_full, r * M + tile * 64)
            for j in range(b1 - b0):
                following = gl.load(pages + gl.minimum(b0 + j + 1, b1 - 1))
                w = j & 1
                phase = ((gl.where(w == 0, even, odd) + (j >> 1)) & 1) ^ 1
                at = page * 64
                mbarrier.wait(own_empty.index(w), phase)
                for u in gl.static_range(2):
                    bar = full.index(w * 4 + u)
                    mbarrier.expect(bar, 64 * 128 * 2)
                    tma.async_copy_global_to_shared(kv_desc, [at, w * 256 + u * 128], bar, k_s.index(w * 6 + u))
                mbarrier.wait(oth_empty.index(w), phase)
                for u in gl.static_range(2):
                    bar = full.index(w * 4 + 2 + u)
                    keys = k_s.index(w * 2 + 2 + u)
                    mbarrier.expect(bar, 64 * (128 + 64 * u) * 2)
                    tma.async_copy_global_to_shared(kv_desc, [at, 256 - w * 256 + u * 128], bar, keys)
                    if u == 1:
                        tma.async_copy_global_to_shared(kr_desc, [at, 512], bar, kr_s.index(w))
                page = following
            even += (b1 - b0 + 1) // 2
            odd += (b1 - b0) // 2
            piece += 1
        begin += n + charge
        r += 1
    _post(queue, queue_full, queue_empty, piece, -1, 0, 0, 0)


@gluon.jit
def _widen(word, factor):
    """4 e4m3 values (i32) times a factor (f16 twice in an i32) -> two i32 of 2 f16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        .reg .b32 x, y;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 x, a;
        cvt.rn.f16x2.e4m3x2 y, b;
        mul.rn.f16x2 $0, x, $3;
        mul.rn.f16x2 $1, y, $3;
        }""",
        "=r,=r,r,r", [word, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _fetch(packed, page, group, valid, LW: gl.constexpr):
    """Columns [128 group, 128 group + 128) of a page of 656-byte rows: words [64, 8, 4] i32 and scales [64] f32.

    Zeros for the rows from `valid` on: what lies there has no influence, be it NaN.
    """
    LR: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LW))
    LC: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LW))
    L4: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LW))
    base = packed + page.to(gl.int64) * (64 * 164)
    row = gl.arange(0, 64, LR)
    there = row < valid
    row = row * 164
    column = gl.arange(0, 8, LC) * 4
    at = gl.expand_dims(gl.expand_dims(row, 1), 2) + gl.expand_dims(gl.expand_dims(column, 0), 2)
    at = at + gl.expand_dims(gl.expand_dims(gl.arange(0, 4, L4), 0), 1)
    mask = gl.expand_dims(gl.expand_dims(there, 1), 2)
    words = gl.load(base + (at + group * 32), mask=mask, other=0)
    return words, gl.load(base + (row + 128 + group), mask=there, other=0)


@gluon.jit
def _put(tile, words, scales):
    """Widens a group of columns into a tile [64, 128]."""
    factor = gl.inline_asm_elementwise(
        "{ .reg .b16 a; cvt.rn.f16.f32 a, $1; mov.b32 $0, {a, a}; }", "=r,r", [scales], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip
    low, high = _widen(words, gl.expand_dims(gl.expand_dims(factor, 1), 2).broadcast_to([64, 8, 4]))
    view = tile._reinterpret(gl.int32, [64, 64], gl.NVMMASharedLayout(128, 32, 2))
    view.store(gl.reshape(gl.join(low, high), [64, 64]))


@gluon.jit
def _halve(q_s):
    """The latent part of the queries from bf16 to f16, in place."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    halves = q_s._reinterpret(gl.float16, [4, 64, 128], q_s.layout)
    for c in gl.static_range(4):
        for u in gl.static_range(8):
            x = q_s.index(c).slice(u * 8, 8, dim=0).load(L).to(gl.float32)
            x = gl.minimum(gl.maximum(x, -65504.0), 65504.0)
            halves.index(c).slice(u * 8, 8, dim=0).store(x.to(gl.float16))
    fence_async_shared()


@gluon.jit
def _producer_packed(
    q_desc, qr_desc, kr_desc, packed, table, lengths, q_s, qr_s, k_s, kr_s, q_loaded, q_full, q_empty, full, own_empty,
    oth_empty, queue, queue_full, queue_empty, B, M, width, tile, first, begin, low, high, charge,
):  # fmt: skip
    """Like `_producer`, of 656-byte rows: four warps widen e4m3 to f16; the next block is on its way to registers.

    f16 takes e4m3 times a power of two from 2^-15 to 2^7 exactly, and with one conversion for two values.
    """
    LW: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [4, 1, 1], [2, 0, 1])
    r = first
    piece = 0
    even = 0
    odd = 0
    while (r < B) & (begin < high):
        length = gl.load(lengths + r)
        b0, b1, n = _piece(length, begin, low, high, charge)
        if b1 > b0:
            _post(queue, queue_full, queue_empty, piece, r, b0, b1, length)
            pages = table + r.to(gl.int64) * width
            page = gl.load(pages + b0)
            x0, f0 = _fetch(packed, page, 0, length - b0 * 64, LW)
            x1, f1 = _fetch(packed, page, 1, length - b0 * 64, LW)
            x2, f2 = _fetch(packed, page, 2, length - b0 * 64, LW)
            x3, f3 = _fetch(packed, page, 3, length - b0 * 64, LW)
            mbarrier.wait(q_empty, (piece & 1) ^ 1)
            _queries(q_desc, qr_desc, q_s, qr_s, q_loaded, r * M + tile * 64)
            mbarrier.wait(q_loaded, piece & 1)
            _halve(q_s)
            mbarrier.arrive(q_full, count=1)
            following = gl.load(pages + gl.minimum(b0 + 1, b1 - 1))
            for j in range(b1 - b0):
                w = j & 1
                own = 2 - 2 * w
                phase = ((gl.where(w == 0, even, odd) + (j >> 1)) & 1) ^ 1
                mbarrier.wait(own_empty.index(w), phase)
                _put(k_s.index(w * 6), x0, f0)
                _put(k_s.index(w * 6 + 1), x1, f1)
                fence_async_shared()
                mbarrier.arrive(full.index(w * 4), count=1)
                mbarrier.arrive(full.index(w * 4 + 1), count=1)
                mbarrier.wait(oth_empty.index(w), phase)
                mbarrier.expect(full.index(w * 4 + 3), 64 * 64 * 2)
                tma.async_copy_global_to_shared(kr_desc, [page * 64, 0], full.index(w * 4 + 3), kr_s.index(w))
                _put(k_s.index(w * 2 + 2), x2, f2)
                _put(k_s.index(w * 2 + 3), x3, f3)
                fence_async_shared()
                mbarrier.arrive(full.index(w * 4 + 2), count=1)
                mbarrier.arrive(full.index(w * 4 + 3), count=1)
                # Loads begin behind the fences, which wait for loads under way.
                valid = length - (b0 + j + 1) * 64
                x0, f0 = _fetch(packed, following, own, valid, LW)
                x1, f1 = _fetch(packed, following, own + 1, valid, LW)
                x2, f2 = _fetch(packed, following, 2 - own, valid, LW)
                x3, f3 = _fetch(packed, following, 3 - own, valid, LW)
                page = following
                following = gl.load(pages + gl.minimum(b0 + j + 2, b1 - 1))
            even += (b1 - b0 + 1) // 2
            odd += (b1 - b0) // 2
            piece += 1
        begin += n + charge
        r += 1
    _post(queue, queue_full, queue_empty, piece, -1, 0, 0, 0)


@gluon.jit
def _any(flags):
    """Whether any of a warpgroup's four warps has set its flag, as a scalar without crossing warps."""
    return gl.max(flags.load(gl.BlockedLayout([4], [32], [4], [0])), 0) > 0


@gluon.jit
def _take(acc, m, total, m_s, f_s, p_ready, count, W: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr):
    """Waits for the other warpgroup's weights and goes over to their reference."""
    mbarrier.wait(p_ready.index(1 - W), count & 1)
    if _any(f_s.index(1 - W)):
        top = m_s.index(1 - W).load(gl.SliceLayout(1, LS))
        shrink = gl.exp2(m - top)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
        total = total * shrink
        m = top
    return acc, m, total


@gluon.jit
def _clear(tile, valid):
    """Zeroes the rows of a tile [64, 256] from `valid` on: what lies there has no influence, be it NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [0, 1])
    words = tile._reinterpret(gl.int32, [64, 128], gl.NVMMASharedLayout(128, 32, 2))
    row = gl.arange(0, 64, gl.SliceLayout(1, L))
    for c in gl.static_range(4):
        part = words.slice(c * 32, 32, dim=1)
        part.store(gl.where((row < valid)[:, None], part.load(L), 0))


@gluon.jit
def _scores(s, q_s, k_s, full, mine, zero, Q: gl.constexpr, K: gl.constexpr, BAR: gl.constexpr, FIRST: gl.constexpr):
    """s + Q K of 256 columns as they arrive."""
    for u in gl.static_range(2):
        mbarrier.wait(full.index(BAR + u), mine & 1)
        keys = k_s.index(K + u + zero).permute((1, 0))
        s = warpgroup_mma(q_s.index(Q + u + zero), keys, s, use_acc=not FIRST or u > 0, is_async=True)
    return s


@gluon.jit
def _block(
    acc, m, total, s0, q_s, qr_s, k_s, v_s, kr_s, p_s, m_s, f_s, full, own_empty, oth_empty, p_ready, mine, taken,
    scale, shift, seen, S, at, zero, take, W: gl.constexpr, AHEAD: gl.constexpr, H: gl.constexpr, LS: gl.constexpr,
    LO: gl.constexpr,
):  # fmt: skip
    """One block of this warpgroup. mine, taken: how many blocks of its own, and of the other, came before.

    zero: 0, but not to the compiler, which else keeps every descriptor in registers throughout.
    """
    CLEAR: gl.constexpr = v_s.dtype == gl.bfloat16  # the packed producer leaves zeros
    if AHEAD:
        s = _scores(s0, q_s, k_s, full, mine, zero, 2 * W, 6 * W, 4 * W, True)
        if take:
            acc, m, total = _take(acc, m, total, m_s, f_s, p_ready, taken, W, LS, LO)
            pending = warpgroup_mma(p_s.index(1 - W + zero), v_s.index(2 - W + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(pending,))
            mbarrier.arrive(oth_empty.index(1 - W), count=1)
        s = _scores(s, q_s, k_s, full, mine, zero, 2 - 2 * W, 2 + 2 * W, 4 * W + 2, False)
        s = warpgroup_mma(qr_s.index(zero), kr_s.index(W + zero).permute((1, 0)), s, is_async=True)
    else:
        pending = warpgroup_mma_init(acc)
        if take:
            acc, m, total = _take(acc, m, total, m_s, f_s, p_ready, taken, W, LS, LO)
            pending = warpgroup_mma(p_s.index(1 - W + zero), v_s.index(2 - W + zero), acc, is_async=True)
        s = _scores(s0, q_s, k_s, full, mine, zero, 2 * W, 6 * W, 4 * W, True)
        s = _scores(s, q_s, k_s, full, mine, zero, 2 - 2 * W, 2 + 2 * W, 4 * W + 2, False)
        s = warpgroup_mma(qr_s.index(zero), kr_s.index(W + zero).permute((1, 0)), s, is_async=True)
        acc = warpgroup_mma_wait(5, deps=(pending,))
        mbarrier.arrive(oth_empty.index(1 - W), count=1, pred=take)
    x = warpgroup_mma_wait(0, deps=(s,))
    if at + 63 > seen:
        column = at + gl.arange(0, 64, gl.SliceLayout(0, LS))
        row = (gl.arange(0, 64, gl.SliceLayout(1, LS)) + shift) // H
        x = gl.where(column[None, :] <= (seen + row)[:, None], x, float("-inf"))
        if CLEAR:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if at + 64 > seen + S:
                _clear(v_s.index(3 * W + zero), seen + S - at)
                _clear(v_s.index(1 + W + zero), seen + S - at)
                fence_async_shared()
    high = gl.max(x, 1) * scale
    top = gl.where(high > m + 8.0, high, m)
    f_s.index(W).store(gl.max(gl.reshape((high > m + 8.0).to(gl.int32), [4, 16]), 1))
    m_s.index(W).store(top)
    p = gl.exp2(x * scale - top[:, None])
    weights = p.to(v_s.dtype)
    if _any(f_s.index(W)):
        shrink = gl.exp2(m - top)
        total = total * shrink
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
    own = gl.convert_layout(weights, gl.DotOperandLayout(0, LO, 2))
    pending = warpgroup_mma(own, v_s.index(3 * W + zero), acc, is_async=True)
    p_s.index(W + zero).store(weights)
    fence_async_shared()
    mbarrier.arrive(p_ready.index(W), count=1)
    total += gl.sum(p, 1)
    acc = warpgroup_mma_wait(0, deps=(pending,))
    mbarrier.arrive(own_empty.index(W), count=1)
    return acc, top, total


@gluon.jit
def _consumer(
    out, lse, part_out, part_lse, split, q_s, qr_s, k_s, v_s, kr_s, p_s, m_s, f_s, q_full, q_empty, full,
    own_empty, oth_empty, p_ready, l_ready, queue, queue_full, queue_empty, S, scale, zero,
    W: gl.constexpr, H: gl.constexpr, TILES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    rows: gl.constexpr = gl.SliceLayout(1, LS)
    s0 = gl.zeros([64, 64], gl.float32, LS)
    tile = gl.program_id(0) % TILES
    piece = 0
    mine = 0
    theirs = 0
    mbarrier.wait(queue_full.index(0), 0)
    r = _read(queue, 0)
    while r >= 0:
        slot = (piece & 1) * 4
        b0 = _read(queue, slot + 1)
        b1 = _read(queue, slot + 2)
        length = _read(queue, slot + 3)
        count = (b1 - b0 + 1 - W) // 2
        seen = length - S
        m = gl.full([64], -1.0e30, gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        acc = gl.zeros([64, 256], gl.float32, LO)
        mbarrier.wait(q_full, piece & 1)
        for i in range(count):
            b = b0 + 2 * i + W
            acc, m, total = _block(
                acc, m, total, s0, q_s, qr_s, k_s, v_s, kr_s, p_s, m_s, f_s, full, own_empty, oth_empty, p_ready,
                mine + i, theirs + i - 1 + W, scale, tile * 64, seen, S, b * 64, i & zero, i + W > 0, W,
                AHEAD, H, LS, LO,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        mine += count
        theirs += b1 - b0 - count
        if ((b1 - b0 + W) & 1) == 0:
            acc, m, total = _take(acc, m, total, m_s, f_s, p_ready, theirs - 1, W, LS, LO)
            acc = warpgroup_mma(p_s.index(1 - W), v_s.index(2 - W), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(oth_empty.index(1 - W), count=1)

        # Read again rather than kept: registers are short above.
        r = _read(queue, slot)
        b0 = _read(queue, slot + 1)
        b1 = _read(queue, slot + 2)
        n = (_read(queue, slot + 3) + 63) // 64
        mbarrier.arrive(queue_empty.index(piece & 1), count=1)
        M = S * H
        part = gl.program_id(0) // TILES
        row = tile * 64 + (r & zero)
        slot = (piece & 1) * 2
        m_s.index(2 + slot + W).store(total)
        mbarrier.arrive(l_ready.index(slot + W), count=1)
        mbarrier.wait(l_ready.index(slot + 1 - W), (piece >> 1) & 1)
        total += m_s.index(2 + slot + 1 - W).load(rows)
        weight = gl.where(total == 0.0, float("-inf"), m + gl.log2(total))
        norm = gl.convert_layout(gl.where(total == 0.0, 0.0, 1.0 / total), gl.SliceLayout(1, LO))
        acc = acc * norm[:, None]
        i = gl.arange(0, 64, gl.SliceLayout(1, LO)) + row
        d = gl.arange(0, 256, gl.SliceLayout(0, LO)) + W * 256
        lane = gl.arange(0, 64, rows) + row
        if b1 - b0 == n:
            at = (r * M + i).to(gl.int64) * 512
            gl.store(out + at[:, None] + d[None, :], acc.to(gl.bfloat16), mask=(i < M)[:, None])
            if W == 0:
                gl.store(lse + r * M + lane, weight * 0.6931471805599453, mask=lane < M)
        else:
            base = (2 * part + (b0 == 0).to(gl.int32)) * M
            at = (base + i).to(gl.int64) * 512
            gl.store(part_out + at[:, None] + d[None, :], acc, mask=(i < M)[:, None])
            if W == 0:
                gl.store(part_lse + base + lane, weight, mask=lane < M)
        if (W == 0) & (tile == 0):
            if b0 == 0:
                gl.store(split + 2 * r, part)
            if b1 == n:
                gl.store(split + 2 * r + 1, part)
        piece += 1
        mbarrier.wait(queue_full.index(piece & 1), (piece >> 1) & 1)
        r = _read(queue, (piece & 1) * 4)


@gluon.jit(do_not_specialize=["B", "width", "parts", "charge", "least", "zero"])
def mla_decode_kernel(
    q_desc, qr_desc, kv_desc, kr_desc, packed, table, lengths, out, lse, part_out, part_lse, split, B, width, S,
    parts, scale, charge, least, zero,
    H: gl.constexpr, TILES: gl.constexpr, BP: gl.constexpr,
    AHEAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """q [B * M, 576], cache [pages * 64, 576] as descriptors -> out [B, M, 512] bf16, lse [B, M] f32 (natural).

    Of a request cut into pieces: part_out [2 * parts, M, 512] f32, part_lse [2 * parts, M] f32 (log 2), and split
    [B, 2] i32 (see `mla_combine_kernel`). PACKED: `packed` points to the 656-byte rows, kr_desc to their rope part, and
    kv_desc is not read. scale: softmax scale times log2 e. zero: 0.
    """
    bf16: gl.constexpr = gl.bfloat16
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(bf16, [4, 64, 128], q_desc.layout)
    qr_s = gl.allocate_shared_memory(bf16, [1, 64, 64], qr_desc.layout)
    k_s = gl.allocate_shared_memory(bf16, [8, 64, 128], q_desc.layout)
    v_s = k_s._reinterpret(bf16, [4, 64, 256], q_desc.layout)
    kr_s = gl.allocate_shared_memory(bf16, [2, 64, 64], kr_desc.layout)
    qx_s = q_s
    kx_s = k_s
    p_s = kr_s
    if PACKED:
        f16: gl.constexpr = gl.float16
        qx_s = q_s._reinterpret(f16, [4, 64, 128], q_desc.layout)
        kx_s = k_s._reinterpret(f16, [8, 64, 128], q_desc.layout)
        v_s = k_s._reinterpret(f16, [4, 64, 256], q_desc.layout)
        p_s = kr_s._reinterpret(f16, [2, 64, 64], kr_desc.layout)
    m_s = gl.allocate_shared_memory(gl.float32, [6, 64], vector)
    f_s = gl.allocate_shared_memory(gl.int32, [2, 4], vector)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_loaded = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [8, 1], bar)
    own_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    oth_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    l_ready = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    queue_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    queue_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    queue = gl.allocate_shared_memory(gl.int32, [8, 1], vector)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_loaded, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(2):
        for u in gl.static_range(4):
            mbarrier.init(full.index(4 * i + u), count=2 if PACKED and u == 3 else 1)
        mbarrier.init(own_empty.index(i), count=1)
        mbarrier.init(oth_empty.index(i), count=1)
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(queue_full.index(i), count=1)
        mbarrier.init(queue_empty.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(l_ready.index(i), count=1)

    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    part = gl.program_id(0) // TILES
    tile = gl.program_id(0) % TILES
    M = S * H
    ends, _, per = _division(lengths, B, parts, BP, charge, least, L)
    low = part * per
    high = low + per
    first = gl.sum((ends <= low).to(gl.int32), 0)
    begin = gl.max(gl.where(ends <= low, ends, 0), 0)
    if PACKED:
        gl.warp_specialize([
            (_producer_packed, (
                q_desc, qr_desc, kr_desc, packed, table, lengths, q_s, qr_s, k_s, kr_s, q_loaded, q_full, q_empty, full,
                own_empty, oth_empty, queue, queue_full, queue_empty, B, M, width, tile, first, begin, low, high,
                charge)),
            (_consumer, (
                out, lse, part_out, part_lse, split, qx_s, qr_s, kx_s, v_s, kr_s, p_s, m_s, f_s, q_full, q_empty, full,
                own_empty, oth_empty, p_ready, l_ready, queue, queue_full, queue_empty, S, scale, zero, 0, H, TILES,
                AHEAD)),
            (_consumer, (
                out, lse, part_out, part_lse, split, qx_s, qr_s, kx_s, v_s, kr_s, p_s, m_s, f_s, q_full, q_empty, full,
                own_empty, oth_empty, p_ready, l_ready, queue, queue_full, queue_empty, S, scale, zero, 1, H, TILES,
                AHEAD)),
        ], [4, 4], [200, 200])  # fmt: skip
    else:
        gl.warp_specialize([
            (_producer, (
                q_desc, qr_desc, kv_desc, kr_desc, table, lengths, q_s, qr_s, k_s, kr_s, q_full, q_empty, full,
                own_empty, oth_empty, queue, queue_full, queue_empty, B, M, width, tile, first, begin, low, high,
                charge)),
            (_consumer, (
                out, lse, part_out, part_lse, split, qx_s, qr_s, kx_s, v_s, kr_s, p_s, m_s, f_s, q_full, q_empty, full,
                own_empty, oth_empty, p_ready, l_ready, queue, queue_full, queue_empty, S, scale, zero, 0, H, TILES,
                AHEAD)),
            (_consumer, (
                out, lse, part_out, part_lse, split, qx_s, qr_s, kx_s, v_s, kr_s, p_s, m_s, f_s, q_full, q_empty, full,
                own_empty, oth_empty, p_ready, l_ready, queue, queue_full, queue_empty, S, scale, zero, 1, H, TILES,
                AHEAD)),
        ], [4, 4], [240, 240])  # fmt: skip


@gluon.jit
def mla_combine_kernel(part_out, part_lse, split, lengths, out, lse, S, H: gl.constexpr, RC: gl.constexpr):
    """Joins the pieces of requests that `mla_decode_kernel` cut; zeros and -inf for requests without cache rows.

    part_out [2 * parts, M, 512] f32, part_lse [2 * parts, M] f32 (log 2): of part p, 2 p + 1 is a request's first piece
    and 2 p a later one. split [B, 2] i32: the parts of a request's first and last piece. A program does RC rows of a
    request.
    """
    LC: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, LC)
    r = gl.program_id(0)
    M = S * H
    some = gl.load(lengths + r) > 0
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    p0 = gl.load(split + 2 * r)
    p1 = gl.load(split + 2 * r + 1)
    if (some & (p1 > p0)) | (some == 0):
        row = gl.program_id(1) * RC + gl.arange(0, RC, rows)
        d = gl.arange(0, 512, gl.SliceLayout(0, LC))
        there = row < M
        top = gl.full([RC], -1.0e30, gl.float32, rows)
        total = gl.zeros([RC], gl.float32, rows)
        acc = gl.zeros([RC, 512], gl.float32, LC)
        if some:
            for p in range(p0, p1 + 1):
                base = (2 * p + (p == p0).to(gl.int32)) * M + row
                weight = gl.load(part_lse + base, mask=there, other=float("-inf"))
                x = gl.load(part_out + base.to(gl.int64)[:, None] * 512 + d[None, :], mask=there[:, None], other=0.0)
                high = gl.maximum(top, weight)
                keep = gl.exp2(top - high)
                share = gl.exp2(weight - high)
                acc = acc * keep[:, None] + x * share[:, None]
                total = total * keep + share
                top = high
        at = r * M + row
        norm = gl.where(total == 0.0, 0.0, 1.0 / total)
        value = gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
        to = out + at.to(gl.int64)[:, None] * 512 + d[None, :]
        gl.store(to, (acc * norm[:, None]).to(gl.bfloat16), mask=there[:, None])
        gl.store(lse + at, value, mask=there)
