"""The FP8 block matrix product of `gemm` and `grouped_gemm`: one warp-specialised persistent kernel.

One warp moves blocks of 128 inputs with TMA into a ring of shared memory; warpgroups of four warps multiply one or two
pieces of 64 rows each by the whole other operand. Accumulation has two levels: wgmma sums 128 products in a scratch
accumulator (Hopper's tensor cores keep only about 14 bits of an FP8 sum), then FFMAs add it, times both scales, to the
fp32 sum.

Plain: the pieces of 64 rows are tokens, the other operand is 128 outputs. Swapped (few tokens): the pieces are outputs,
the other operand is 8 to 64 tokens, so that no tensor-core row is wasted.

Tiles are dealt in waves. With SPLIT some are cut along the inputs into equal parts, so that every processor has as much
to do: all tiles into `ways` parts, or (ways 0) those left over from full waves into as many as there are programs for.
Parts go to a workspace, and whoever comes last adds them up in the order of the parts, so the result does not depend
on timing, and nobody waits.

Legend: P the operand in pieces of 64 rows, Q the other one; PIECES of P in a tile, HEIGHT of them a warpgroup's; KB
blocks of 128 inputs; GP groups, padded to a power of two, 0 for a plain product; S stages of the ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def promote(acc, scratch, scale, AXIS: gl.constexpr):
    """acc + scratch * scale along the other axis, as an instruction that the compiler leaves where it stands.

    Free to move, it sinks below the next wgmma, whose result then needs registers of its own.
    """
    scratch, scale = gl.broadcast(scratch, gl.expand_dims(scale, AXIS))
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [scratch, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def group_tiles(starts, stops, spacing, groups, TOKENS: gl.constexpr, GP: gl.constexpr):
    """Tiles of TOKENS rows up to and including each group, int32 [GP]; every warp holds them all."""
    layout: gl.constexpr = gl.BlockedLayout([GP // 32], [32], [gl.num_warps()], [0])
    group = gl.arange(0, GP, layout)
    count = gl.load(stops + group, mask=group < groups, other=0)
    if spacing == 0:
        count -= gl.load(starts + group, mask=group < groups, other=0)
    return gl.associative_scan((count + TOKENS - 1) // TOKENS, 0, _plus)


@gluon.jit
def raster(t, num_m, num_n, RASTER: gl.constexpr):
    """Tile t -> (row tile, column tile): RASTER row tiles at a time, so that neighbours share operands in L2."""
    if RASTER < 0:
        pn, pm = raster(t, num_n, num_m, -RASTER)
        return pm, pn
    first = t // (RASTER * num_n) * RASTER
    height = gl.minimum(num_m - first, RASTER)
    inner = t % (RASTER * num_n)
    return first + inner % height, inner // height


@gluon.jit
def locate(
    t, ends, starts, stops, spacing, groups, M, num_n, TOKENS: gl.constexpr, GP: gl.constexpr, RASTER: gl.constexpr
):
    """Tile t -> (group, its first token row, the row after the group's last, column tile)."""
    if GP > 256:
        # Too many to hold in registers all the time.
        ends = group_tiles(starts, stops, spacing, groups, TOKENS, GP)
    if GP == 0:
        pm, pn = raster(t, gl.cdiv(M, TOKENS), num_n, RASTER)
        return 0, pm * TOKENS, M, pn
    else:
        group = gl.sum((ends * num_n <= t).to(gl.int32), 0)
        before = gl.max(gl.where(ends * num_n <= t, ends, 0), 0)
        start = gl.where(spacing > 0, group * spacing, gl.load(starts + group))
        stop = gl.where(spacing > 0, start, 0) + gl.load(stops + group)
        pm, pn = raster(t - before * num_n, gl.cdiv(stop - start, TOKENS), num_n, RASTER)
        return group, start + pm * TOKENS, stop, pn


@gluon.jit
def deal(tiles, ways, KB, SPLIT: gl.constexpr):
    """(tiles that stay whole, parts of every other tile, items: these tiles and parts, one after another)."""
    if SPLIT:
        programs = gl.num_programs(0)
        whole = gl.where(ways > 0, 0, tiles // programs * programs)
        left = tiles - whole
        cut = gl.where(ways > 0, ways, gl.minimum(programs // gl.maximum(left, 1), KB))
        return whole, cut, whole + left * cut
    else:
        return tiles, 1, tiles


@gluon.jit
def segment(item, whole, cut, KB, SPLIT: gl.constexpr):
    """Item -> (tile, first block, block after the last, number of the part)."""
    if SPLIT:
        part = gl.maximum(item - whole, 0)
        t = gl.where(item < whole, item, whole + part // cut)
        k0 = gl.where(item < whole, 0, part % cut * KB // cut)
        k1 = gl.where(item < whole, KB, (part % cut + 1) * KB // cut)
        return t, k0, k1, part
    else:
        return item, 0, KB, 0


@gluon.jit
def produce(
    source, ring, barriers, rows, N, num_n, KB,
    PIECES: gl.constexpr, BURST: gl.constexpr, TOKENS: gl.constexpr, OUTPUTS: gl.constexpr, S: gl.constexpr,
    SWAP: gl.constexpr, GP: gl.constexpr, RASTER: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    token_desc, token_scale_desc, weight_desc, weight_scale = source
    p_s, q_s, scale_s, weight_scale_s = ring
    full, empty, _turns = barriers
    starts, stops, spacing, groups, M, ways = rows
    BOX: gl.constexpr = weight_desc.block_shape[0] if SWAP else token_desc.block_shape[0]
    BOXES: gl.constexpr = 64 * PIECES // BOX
    SCALES: gl.constexpr = token_scale_desc.block_shape[1]
    boxes = p_s._reinterpret(gl.float8e4nv, [S * BOXES, BOX, 128], p_s.layout)
    scales = scale_s._reinterpret(gl.float32, [S * (TOKENS // SCALES), 1, SCALES], scale_s.layout)
    ends = group_tiles(starts, stops, spacing, groups, TOKENS, GP) if GP else 0
    tiles = (gl.max(ends, 0) if GP else gl.cdiv(M, TOKENS)) * num_n
    whole, cut, items = deal(tiles, ways, KB, SPLIT)
    size: gl.constexpr = (TOKENS + OUTPUTS) * 128 + TOKENS * 4
    weight_scale_rows = gl.cdiv(N, 128)
    one = gl.arange(0, 1, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    it = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, k0, k1, _part = segment(item, whole, cut, KB, SPLIT)
        group, row, _, pn = locate(t, ends, starts, stops, spacing, groups, M, num_n, TOKENS, GP, RASTER)
        column = group * N + pn * OUTPUTS
        scale_row = weight_scale + (group * weight_scale_rows + pn * OUTPUTS // 128) * KB + one
        if not SWAP:
            following = gl.load(scale_row + k0)
        for kb in range(k0, k1):
            s = it % S
            if BURST == 1:
                mbarrier.wait(empty.index(s), ((it // S) & 1) ^ 1)
            elif it % BURST == 0:
                mbarrier.wait(empty.index(s + BURST - 1), ((it // S) & 1) ^ 1)
            if not SWAP:
                weight_scale_s.index(s).store(following)
                following = gl.load(scale_row + kb + 1, mask=one + (kb + 1) < k1, other=0.0)
            mbarrier.expect(full.index(s), size)
            if SWAP:
                for j in gl.static_range(BOXES):
                    tma.async_copy_global_to_shared(
                        weight_desc, [column + j * BOX, kb * 128], full.index(s), boxes.index(s * BOXES + j)
                    )
                tma.async_copy_global_to_shared(token_desc, [row, kb * 128], full.index(s), q_s.index(s))
            else:
                tma.async_copy_global_to_shared(weight_desc, [column, kb * 128], full.index(s), q_s.index(s))
                for j in gl.static_range(BOXES):
                    tma.async_copy_global_to_shared(
                        token_desc, [row + j * BOX, kb * 128], full.index(s), boxes.index(s * BOXES + j)
                    )
            for j in gl.static_range(TOKENS // SCALES):
                tma.async_copy_global_to_shared(
                    token_scale_desc, [kb, row + j * SCALES], full.index(s), scales.index(s * (TOKENS // SCALES) + j)
                )
            it += 1


@gluon.jit
def multiply(p, q, scratch, turns, turn, GROUP: gl.constexpr, TURNS: gl.constexpr):
    """p @ q^T [64, WIDTH] over 128 inputs, as scratch."""
    if TURNS:
        # One of the two warpgroups at a time: in step they would leave the tensor cores idle together while they
        # promote. The other's turn comes when half of this product is done, which hides the way of the signal.
        mbarrier.wait(turns.index(GROUP), (turn + GROUP + 1) & 1)
        if TURNS == 2:
            token = warpgroup_mma(p, q.permute((1, 0)), scratch, is_async=True, use_acc=False)
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
            return warpgroup_mma_wait(0, deps=(token,))
        q0 = q.slice(0, 64, 1).permute((1, 0))
        q1 = q.slice(64, 64, 1).permute((1, 0))
        token = warpgroup_mma(p.slice(0, 64, 1), q0, scratch, is_async=True, use_acc=False)
        token = warpgroup_mma(p.slice(64, 64, 1), q1, token, is_async=True)
        half = warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        return warpgroup_mma_wait(0, deps=(half,))
    else:
        token = warpgroup_mma(p, q.permute((1, 0)), scratch, is_async=True, use_acc=False)
        return warpgroup_mma_wait(0, deps=(token,))


@gluon.jit
def swapped(acc, scale_row, k0, k1, it, ring, barriers, GROUP: gl.constexpr, PIECES: gl.constexpr, S: gl.constexpr):
    """acc [64, WIDTH] plus blocks k0 to k1 of outputs times tokens; two products in flight."""
    p_s, q_s, scale_s, _weight_scale_s = ring
    full, empty, _turns = barriers
    WIDTH: gl.constexpr = acc.shape[1]
    along: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    token_scales = scale_s._reinterpret(gl.float32, [S, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    scratch0 = gl.zeros_like(acc)
    scratch1 = gl.zeros_like(acc)
    next0 = gl.load(scale_row + k0)
    next1 = gl.load(scale_row + k0 + 1, mask=k0 + 1 < k1, other=0.0)
    for kb in range(k0, k1, 2):
        weight0 = next0
        weight1 = next1
        next0 = gl.load(scale_row + kb + 2, mask=kb + 2 < k1, other=0.0)
        next1 = gl.load(scale_row + kb + 3, mask=kb + 3 < k1, other=0.0)
        s = it % S
        mbarrier.wait(full.index(s), (it // S) & 1)
        scale0 = token_scales.index(s).load(along) * weight0
        if kb + 1 < k1:
            s1 = (it + 1) % S
            token0 = warpgroup_mma(
                p_s.index(s * PIECES + GROUP), q_s.index(s).permute((1, 0)), scratch0, is_async=True, use_acc=False
            )
            mbarrier.wait(full.index(s1), ((it + 1) // S) & 1)
            token1 = warpgroup_mma(
                p_s.index(s1 * PIECES + GROUP), q_s.index(s1).permute((1, 0)), scratch1, is_async=True, use_acc=False
            )
            scale1 = token_scales.index(s1).load(along) * weight1
            scratch0 = warpgroup_mma_wait(1, deps=(token0,))
            mbarrier.arrive(empty.index(s), count=1)
            acc = promote(acc, scratch0, scale0, 0)
            scratch1 = warpgroup_mma_wait(0, deps=(token1,))
            mbarrier.arrive(empty.index(s1), count=1)
            acc = promote(acc, scratch1, scale1, 0)
        else:
            token0 = warpgroup_mma(
                p_s.index(s * PIECES + GROUP), q_s.index(s).permute((1, 0)), scratch0, is_async=True, use_acc=False
            )
            scratch0 = warpgroup_mma_wait(0, deps=(token0,))
            mbarrier.arrive(empty.index(s), count=1)
            acc = promote(acc, scratch0, scale0, 0)
        it += 2
    return acc


@gluon.jit
def consume(
    target, ring, barriers, rows, num_n, KB,
    GROUP: gl.constexpr, PIECES: gl.constexpr, HEIGHT: gl.constexpr, TURNS: gl.constexpr, TOKENS: gl.constexpr,
    OUTPUTS: gl.constexpr, S: gl.constexpr, SWAP: gl.constexpr, GP: gl.constexpr, RASTER: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    _out_desc, weight_scale, weight_scale_rows, _out_s, _parts, _arrivals = target
    p_s, q_s, scale_s, weight_scale_s = ring
    full, empty, turns = barriers
    starts, stops, spacing, groups, M, ways = rows
    WIDTH: gl.constexpr = TOKENS if SWAP else OUTPUTS
    AXIS: gl.constexpr = 0 if SWAP else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    along: gl.constexpr = gl.SliceLayout(AXIS, layout)
    PARTS: gl.constexpr = 1 if SWAP else PIECES
    SCALES: gl.constexpr = TOKENS if SWAP else 64
    WARPGROUPS: gl.constexpr = PIECES // HEIGHT
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    token_scales = scale_s._reinterpret(gl.float32, [S * PARTS, SCALES], linear)
    ends = group_tiles(starts, stops, spacing, groups, TOKENS, GP) if GP else 0
    tiles = (gl.max(ends, 0) if GP else gl.cdiv(M, TOKENS)) * num_n
    whole, cut, items = deal(tiles, ways, KB, SPLIT)
    scratch = gl.zeros((64, WIDTH), gl.float32, layout)
    it = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, k0, k1, part = segment(item, whole, cut, KB, SPLIT)
        group, row, last_row, pn = locate(t, ends, starts, stops, spacing, groups, M, num_n, TOKENS, GP, RASTER)
        column = pn * OUTPUTS
        acc = gl.zeros((64, WIDTH), gl.float32, layout)
        if HEIGHT == 2:
            acc1 = gl.zeros((64, WIDTH), gl.float32, layout)
            second = row + (GROUP + WARPGROUPS) * 64 < last_row
        k2 = k1
        if SWAP:
            k2 = k0
            scale_row = weight_scale + (group * weight_scale_rows + (column + GROUP * 64) // 128) * KB
            acc = swapped(acc, scale_row, k0, k1, it, ring, barriers, GROUP, PIECES, S)
            it += k1 - k0
        for _kb in range(k0, k2):
            s = it % S
            mbarrier.wait(full.index(s), (it // S) & 1)
            block_scale = weight_scale_s.index(s).load(along)
            q = q_s.index(s)
            scale = token_scales.index(s * PIECES + GROUP).load(along) * block_scale
            if HEIGHT == 2:
                scale1 = token_scales.index(s * PIECES + GROUP + WARPGROUPS).load(along) * block_scale
            scratch = multiply(p_s.index(s * PIECES + GROUP), q, scratch, turns, turn, GROUP, TURNS)
            turn += 1
            if HEIGHT == 2:
                acc = promote(acc, scratch, scale, AXIS)
                if second:
                    p = p_s.index(s * PIECES + GROUP + WARPGROUPS)
                    scratch = multiply(p, q, scratch, turns, turn, GROUP, TURNS)
                    mbarrier.arrive(empty.index(s), count=1)
                    acc1 = promote(acc1, scratch, scale1, AXIS)
                else:
                    if TURNS:
                        mbarrier.wait(turns.index(GROUP), (turn + GROUP + 1) & 1)
                        mbarrier.arrive(turns.index(1 - GROUP), count=1)
                    mbarrier.arrive(empty.index(s), count=1)
                turn += 1
            else:
                mbarrier.arrive(empty.index(s), count=1)
                acc = promote(acc, scratch, scale, AXIS)
            it += 1
        place = (row, last_row, column)
        share = (part, cut, k1 - k0, KB)
        finish(acc, target, place, share, GROUP, GROUP, PIECES, WIDTH, SWAP, SPLIT)
        if HEIGHT == 2:
            finish(acc1, target, place, share, GROUP, GROUP + WARPGROUPS, PIECES, WIDTH, SWAP, SPLIT)
    tma.store_wait(0)


@gluon.jit
def finish(
    acc, target, place, share, GROUP: gl.constexpr, PIECE: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr,
    SWAP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Writes a piece of the output; of a split tile only with all parts there."""
    out_desc, _scale, _scale_rows, out_s, parts, arrivals = target
    row, last_row, column = place
    done = True
    if SPLIT:
        done, acc = gather_parts(acc, share, parts, arrivals, PIECE, PIECES, WIDTH)
    if SWAP:
        column += PIECE * 64
    else:
        row += PIECE * 64
    if done & (row < last_row):
        staged = out_s.index(GROUP)
        value = acc.to(out_desc.dtype)
        tma.store_wait(0)
        if SWAP:
            staged.permute((1, 0)).store(value)
        elif out_desc.block_shape[1] == WIDTH:
            staged.store(value)
        else:
            value, right = value.reshape([64, 2, WIDTH // 2]).permute([0, 2, 1]).split()
            staged.store(value)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, column], staged)
            column += WIDTH // 2
            tma.store_wait(0)
            staged.store(right)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, column], staged)


@gluon.jit
def gather_parts(acc, share, parts, arrivals, PIECE: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr):
    """(True, acc) for a whole tile. Else puts the part into the workspace; (True, the sum) for who comes last.

    share: (number of the part, parts of a tile, blocks of this part, blocks of a tile).
    """
    part, cut, blocks, KB = share
    done = blocks == KB
    if not done:
        done, acc = add_parts(acc, part, cut, parts, arrivals, PIECE, PIECES, WIDTH)
    return done, acc


@gluon.jit
def add_parts(
    acc, part, cut, parts, arrivals, PIECE: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    SIZE: gl.constexpr = 64 * WIDTH
    # (warp, half, lane / 4) x (column / 8, lane % 4, pair) -> 16 bytes a thread, neighbours side by side
    line = acc.reshape([4, 2, 8, WIDTH // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([SIZE])
    cell = gl.arange(0, SIZE, line.type.layout)
    here = parts + PIECE * SIZE
    gl.store(here + part * (PIECES * SIZE) + cell, line)
    gl.thread_barrier()
    arrival = arrivals + part // cut * PIECES + PIECE
    done = gl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == cut - 1
    if done:
        gl.store(arrival, 0)
        first = part // cut * cut
        end = first + cut
        line = gl.load(here + first * (PIECES * SIZE) + cell, cache_modifier=".cg")
        if WIDTH > 64:
            for i in range(first + 1, end):
                line += gl.load(here + i * (PIECES * SIZE) + cell, cache_modifier=".cg")
        else:
            for i in range(first + 1, end, 3):
                one = here + i * (PIECES * SIZE)
                two = cell < (end - 1 - i) * SIZE
                three = cell < (end - 2 - i) * SIZE
                x = gl.load(one + cell, cache_modifier=".cg")
                y = gl.load(one + PIECES * SIZE + cell, mask=two, other=0.0, cache_modifier=".cg")
                z = gl.load(one + 2 * PIECES * SIZE + cell, mask=three, other=0.0, cache_modifier=".cg")
                line = ((line + x) + y) + z
        total = line.reshape([WIDTH // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([64, WIDTH])
        acc = gl.convert_layout(total, acc.type.layout, assert_trivial=True)
    return done, acc


@gluon.jit(
    do_not_specialize=["spacing", "groups", "M", "N", "KB", "ways"], do_not_specialize_on_alignment=["starts", "stops"]
)
def fp8_block_gemm(
    token_desc, token_scale_desc, weight_desc, weight_scale, out_desc, parts, arrivals,
    starts, stops, spacing, groups, M, N, KB, ways,
    PIECES: gl.constexpr, HEIGHT: gl.constexpr, S: gl.constexpr, SWAP: gl.constexpr, GP: gl.constexpr,
    RASTER: gl.constexpr, SPLIT: gl.constexpr, BURST: gl.constexpr, TURNS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out[rows of group g] = tokens[rows of group g] @ weight[g]^T, see the module.

    token e4m3 [rows, K], its scales fp32 [KB, rows] (that is [rows, KB] with the rows contiguous), weight e4m3
    [groups * N, K], its scales fp32 [groups * ceil(N / 128), KB], out bf16 [rows, N]. With GP = 0 there is one group of
    M rows; else groups <= GP, and group g has the rows starts[g] to stops[g], or with a spacing the stops[g] rows from
    g * spacing on.

    BURST: stages that the producer fills at once, of S. TURNS: two warpgroups multiply in turn. Boxes of the
    descriptors: one or more pieces of P, all of Q, scales of as many tokens, the output of a piece or (plain only) its
    half.
    """
    TOKENS: gl.constexpr = token_desc.block_shape[0] if SWAP else 64 * PIECES
    OUTPUTS: gl.constexpr = 64 * PIECES if SWAP else weight_desc.block_shape[0]
    PARTS: gl.constexpr = 1 if SWAP else PIECES
    WIDTH: gl.constexpr = TOKENS if SWAP else OUTPUTS
    layout: gl.constexpr = token_desc.layout
    p_s = gl.allocate_shared_memory(gl.float8e4nv, [S * PIECES, 64, 128], layout)
    q_s = gl.allocate_shared_memory(gl.float8e4nv, [S, WIDTH, 128], layout)
    scale_s = gl.allocate_shared_memory(gl.float32, [S * PARTS, 1, TOKENS // PARTS], token_scale_desc.layout)
    weight_scale_s = gl.allocate_shared_memory(gl.float32, [S, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BOX: gl.constexpr = out_desc.block_shape[0]
    COLUMNS: gl.constexpr = out_desc.block_shape[1]
    out_s = gl.allocate_shared_memory(out_desc.dtype, [PIECES // HEIGHT, BOX, COLUMNS], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PIECES // HEIGHT)
    num_n = gl.cdiv(N, OUTPUTS)
    WARPGROUPS: gl.constexpr = PIECES // HEIGHT
    barriers = (full, empty, turns)
    source = (token_desc, token_scale_desc, weight_desc, weight_scale)
    target = (out_desc, weight_scale, gl.cdiv(N, 128), out_s, parts, arrivals)
    ring = (p_s, q_s, scale_s, weight_scale_s)
    rows = (starts, stops, spacing, groups, M, ways)
    if WARPGROUPS == 1:
        gl.warp_specialize([
            (consume, (target, ring, barriers, rows, num_n, KB,
                0, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (produce, (source, ring, barriers, rows, N, num_n, KB,
                PIECES, BURST, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
        ], [1], [40])  # fmt: skip
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (target, ring, barriers, rows, num_n, KB,
                0, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (consume, (target, ring, barriers, rows, num_n, KB,
                1, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (produce, (source, ring, barriers, rows, N, num_n, KB,
                PIECES, BURST, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
        ], [4, 1], [240, 24] if GP <= 32 else [232, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (target, ring, barriers, rows, num_n, KB,
                0, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (consume, (target, ring, barriers, rows, num_n, KB,
                1, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (consume, (target, ring, barriers, rows, num_n, KB,
                2, PIECES, HEIGHT, TURNS, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
            (produce, (source, ring, barriers, rows, N, num_n, KB,
                PIECES, BURST, TOKENS, OUTPUTS, S, SWAP, GP, RASTER, SPLIT)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
