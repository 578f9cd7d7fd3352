"""Device functions shared by the sparse MLA kernels for Hopper (decode over FP8 rows, prefill over bf16 rows).

A program holds 64 heads of one token and walks over blocks of 64 rows; four warps each do

* `attend_left`: scores (64 x 64), softmax, and the left 256 columns of the output;
* `attend_right`: the queries, and the right 256 columns, from the probabilities that the first group leaves in shared
  memory;
* gathering, in the modules that use this one.

The right half of block j is held back until the scores of block j + 1 are there: it keeps the tensor cores busy during
that block's softmax, and its rows are needed again later than those of the left half. Two blocks of rows are in shared
memory, in chunks of 128 columns that are filled one by one: `full` has five barriers for each block, of four chunks and
of the 64 rope columns; `empty` two, of the left half with the rope columns and of the right half. Whoever fills a chunk
with ordinary stores only arrives; the fence towards the tensor cores is the reader's, as the writer's would wait for
its loads in flight.

Source: Milakov and Gimelshein 2018 for the online softmax; DeepSeek-V2 report, section 2.1.2, for the absorbed form.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NEG_INF = gl.constexpr(float("-inf"))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""[rows, columns] of 16-bit values, swizzled by 128 bytes."""
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LANES = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
)
"""One value a row and lane of `SCORES`: sums over a row that are not yet added up across its four lanes."""
COALESCED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def load_queries(q_ptr, q_lat, q_rope, ready, token, head0, heads, shrink):
    """64 heads of q [T, heads, 576] bf16 times `shrink` (a power of two) into shared memory; missing heads are 0."""
    rows = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, COALESCED))
    there = (rows < heads)[:, None]
    base = q_ptr + ((token.to(gl.int64) * heads + rows) * 576)[:, None]
    cols = gl.arange(0, 128, layout=gl.SliceLayout(0, COALESCED))
    for c in gl.static_range(4):
        x = gl.load(base + (c * 128 + cols)[None, :], mask=there, other=0.0)
        q_lat.index(c).store((x.to(gl.float32) * shrink).to(q_lat.dtype))
        if c == 1:
            gl.thread_barrier()  # no more than two loads' registers at a time
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, narrow))
    cols = 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, narrow))
    base = q_ptr + ((token.to(gl.int64) * heads + rows) * 576)[:, None]
    x = gl.load(base + cols[None, :], mask=(rows < heads)[:, None], other=0.0)
    q_rope.store((x.to(gl.float32) * shrink).to(q_rope.dtype))
    fence_async_shared()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def issue_scores(q_lat, q_rope, k_lat, k_rope, bias_s, full, stage, phase):
    """Starts q k^T [64 heads, 64 rows] of the block in `stage`, chunk by chunk as they arrive, on top of its bias (0,
    or -inf for what is no row), which arrives with chunk 0."""
    mbarrier.wait(full.index(stage * 5), phase)
    fence_async_shared()
    bias = bias_s.index(stage).load(gl.SliceLayout(0, SCORES))
    s = gl.expand_dims(bias, 0).broadcast_to([64, 64])
    s = warpgroup_mma(q_lat.index(0), k_lat.index(stage * 4).permute((1, 0)), s, is_async=True)
    for c in gl.static_range(1, 4):
        mbarrier.wait(full.index(stage * 5 + c), phase)
        fence_async_shared()
        s = warpgroup_mma(q_lat.index(c), k_lat.index(stage * 4 + c).permute((1, 0)), s, is_async=True)
    mbarrier.wait(full.index(stage * 5 + 4), phase)
    fence_async_shared()
    return warpgroup_mma(q_rope, k_rope.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def softmax_step(s, top, total, scale, P: gl.constexpr):
    """One block of the online softmax in powers of two. Scores s in units of 1 / scale.

    Returns (top, total, shrink, p): the maximum so far, partial sums [64, 4], 2^(old top - top), 2^(s scale - top).
    """
    new = gl.maximum(top, gl.max(s, 1) * scale)
    base = gl.where(new == NEG_INF, 0.0, new)
    shrink = gl.exp2(top - base)
    p = gl.exp2(s * scale - base[:, None])
    part = gl.convert_layout(gl.sum(gl.sum(p.reshape([64, 8, 4, 2]), 3), 1), LANES, assert_trivial=True)
    wide = gl.convert_layout(shrink, gl.SliceLayout(1, LANES), assert_trivial=True)[:, None]
    return new, total * wide + part, shrink, p.to(P)


@gluon.jit
def write(out_ptr, staging, acc, inverse, row0, head0, heads, COLUMN: gl.constexpr):
    """acc [64, 128] * inverse [64] to columns COLUMN.. of rows row0 + head of out [., 512]: bf16 by way of shared
    memory, in 16-byte pieces; f32 straight from the registers."""
    val = acc * inverse[:, None]
    if out_ptr.dtype.element_ty == gl.float32:
        head = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
        col = COLUMN + gl.arange(0, 128, layout=gl.SliceLayout(0, OUTPUT))
        gl.store(out_ptr + ((row0 + head) * 512)[:, None] + col[None, :], val, mask=(head < heads)[:, None])
    else:
        tile = staging._reinterpret(gl.bfloat16, [64, 128], TILE)
        tile.store(val.to(gl.bfloat16))
        head = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, COALESCED))
        col = COLUMN + gl.arange(0, 128, layout=gl.SliceLayout(0, COALESCED))
        out = tile.load(COALESCED)
        gl.store(out_ptr + ((row0 + head) * 512)[:, None] + col[None, :], out, mask=(head < heads)[:, None])


@gluon.jit
def attend_left(
    sink_ptr, out_ptr, lse_ptr, q_lat, q_rope, k_lat, k_rope, bias_s, p_s, shrink_s, full, empty, p_full, p_empty,
    ready, part, head0, heads, blocks, scale, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and output columns 0..255 of `blocks` >= 1 blocks.

    `part` = the row of out and lse ([., heads]); f32 `out` is one of several parts, whose lse is in units of log 2 and
    has no sink; bf16 `out` is final, its lse natural and without the sink. No row at all: zeros, lse -inf.
    """
    top = gl.full([64], NEG_INF, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64, 4], gl.float32, LANES)
    acc0 = gl.zeros([64, 128], gl.float32, OUTPUT)
    acc1 = gl.zeros([64, 128], gl.float32, OUTPUT)
    mbarrier.wait(ready, 0)
    for j in range(blocks):
        stage = j % 2
        s = issue_scores(q_lat, q_rope, k_lat, k_rope, bias_s, full, stage, (j // 2) & 1)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(p_full, count=1, pred=j > 0)  # the right half of block j - 1 may go
        top, total, shrink, p = softmax_step(s, top, total, scale, p_s.dtype)
        mbarrier.wait(p_empty, (j & 1) ^ 1)
        p_s.store(p)
        shrink_s.store(shrink)
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
        acc0, acc1 = acc0 * shrink, acc1 * shrink
        p = gl.convert_layout(p, gl.DotOperandLayout(0, OUTPUT, 2))
        acc0 = warpgroup_mma(p, k_lat.index(stage * 4), acc0, is_async=True)
        acc1 = warpgroup_mma(p, k_lat.index(stage * 4 + 1), acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        mbarrier.arrive(empty.index(stage * 2), count=1)
    mbarrier.arrive(p_full, count=1)

    head = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    below = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES))
    lse = top + gl.log2(below)
    if out_ptr.dtype.element_ty != gl.float32:
        lse = lse * 0.6931471805599453
    gl.store(lse_ptr + part * heads + head, gl.where(below == 0.0, NEG_INF, lse), mask=head < heads)
    if HAS_SINK and out_ptr.dtype.element_ty != gl.float32:
        sink = gl.load(sink_ptr + head, mask=head < heads, other=0.0)
        below += gl.where(below == 0.0, 0.0, gl.exp2(sink * 1.4426950408889634 - top))
    inverse = gl.where(below == 0.0, 0.0, 1.0 / below)
    mbarrier.wait(p_empty, (blocks & 1) ^ 1)
    shrink_s.store(inverse)
    mbarrier.arrive(p_full, count=1)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, OUTPUT))
    row0 = part.to(gl.int64) * heads
    staging = ((blocks - 1) % 2) * 4
    write(out_ptr, k_lat.index(staging), acc0, inverse, row0, head0, heads, 0)
    write(out_ptr, k_lat.index(staging + 1), acc1, inverse, row0, head0, heads, 128)


@gluon.jit
def attend_right(
    q_ptr, out_ptr, q_lat, q_rope, k_lat, p_s, shrink_s, empty, p_full, p_empty, ready, token, part, head0, heads,
    blocks, shrink_q,
):  # fmt: skip
    """Loads the queries, then computes output columns 256..511."""
    load_queries(q_ptr, q_lat, q_rope, ready, token, head0, heads, shrink_q)
    acc0 = gl.zeros([64, 128], gl.float32, OUTPUT)
    acc1 = gl.zeros([64, 128], gl.float32, OUTPUT)
    for j in range(blocks):
        stage = j % 2
        mbarrier.wait(p_full, j & 1)
        fence_async_shared()
        shrink = shrink_s.load(gl.SliceLayout(1, OUTPUT))[:, None]
        acc0, acc1 = acc0 * shrink, acc1 * shrink
        acc0 = warpgroup_mma(p_s, k_lat.index(stage * 4 + 2), acc0, is_async=True)
        acc1 = warpgroup_mma(p_s, k_lat.index(stage * 4 + 3), acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        mbarrier.arrive(p_empty, count=1)
        mbarrier.arrive(empty.index(stage * 2 + 1), count=1)
    mbarrier.wait(p_full, blocks & 1)
    inverse = shrink_s.load(gl.SliceLayout(1, OUTPUT))
    row0 = part.to(gl.int64) * heads
    staging = ((blocks - 1) % 2) * 4 + 2
    write(out_ptr, k_lat.index(staging), acc0, inverse, row0, head0, heads, 256)
    write(out_ptr, k_lat.index(staging + 1), acc1, inverse, row0, head0, heads, 384)


@gluon.jit
def shared_tiles(K: gl.constexpr):
    """Shared memory of a program: queries, two blocks of rows, probabilities, small vectors (K: the latent's dtype)."""
    q_lat = gl.allocate_shared_memory(K, [4, 64, 128], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE)
    k_lat = gl.allocate_shared_memory(K, [8, 64, 128], TILE)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], TILE)
    p_s = gl.allocate_shared_memory(K, [64, 64], TILE)
    bias_s = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    shrink_s = gl.allocate_shared_memory(gl.float32, [64], VECTOR)
    return q_lat, q_rope, k_lat, k_rope, p_s, bias_s, shrink_s


@gluon.jit
def barriers(FIRST: gl.constexpr, CHUNK: gl.constexpr, ROPE: gl.constexpr):
    """full [10], empty [4], p_full, p_empty, ready. FIRST, CHUNK, ROPE: arrivals that fill chunk 0 (with the bias),
    another chunk, the rope columns."""
    full = gl.allocate_shared_memory(gl.int64, [10, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(10):
        mbarrier.init(full.index(i), count=ROPE if i % 5 == 4 else FIRST if i % 5 == 0 else CHUNK)
    for i in gl.static_range(4):
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    return full, empty, p_full, p_empty, ready
