"""Causal multi-head attention of prefill on Hopper: keys of 192, values of 128, bf16, one warp-specialised kernel.

A block of 128 queries of one head belongs to two consumer warpgroups (64 rows each), which share the keys and values
that a producer warp brings in by TMA. A consumer issues S' = Q K' of the next key block, then O += P V of the
current one, and computes the next softmax while the tensor cores still work on O (Shah et al. 2024, FlashAttention-3).
Blocks of queries are taken from a device-side queue, longest first within a section of heads whose keys and values
fit the L2 cache.

Legend: T query tokens, C keys, H heads, R requests, D = 192 (q and k), V = 128.
"""

from __future__ import annotations

import functools
import math
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

from tilery.ops.hopper._host import kept_for_ever, on_its_device
from tilery.ops.hopper.variant import Variant

QK, VD, WIDE, NARROW = 192, 128, 128, 64
"""Head dimensions, and the two column blocks that q and k are loaded in (extents are powers of two)."""

ROWS = 128
"""Queries of a tile: two warpgroups of 64."""

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """block: keys of a step. turns: the consumers take turns at the tensor cores. l2_bytes: of the keys and values that
    are worked on at a time."""

    block: int = 128
    turns: bool = False
    l2_bytes: int = 24 << 20


@gluon.jit
def _tile(t, lens, blocks, R, T, C, section, VARLEN: gl.constexpr, CAUSAL: gl.constexpr, N: gl.constexpr):
    """Of tile t: its head, first query row, first key row, queries and keys of the request, row in the request, and
    number of key blocks."""
    per = section * blocks * R
    rank = (t % per) // section
    head = (t // per) * section + t % section
    request = rank % R
    row = (blocks - 1 - rank // R) * 128
    q_start = 0
    k_start = 0
    tokens = T
    keys = C
    if VARLEN:
        q_start = gl.load(lens + request)
        tokens = gl.load(lens + request + 1) - q_start
        k_start = gl.load(lens + R + 1 + request)
        keys = gl.load(lens + R + 2 + request) - k_start
    seen = keys
    if CAUSAL:
        seen = gl.minimum(keys, keys - tokens + row + 128)
    steps = gl.where(row < tokens, gl.cdiv(gl.maximum(seen, 0), N), 0)
    return head, q_start, k_start, tokens, keys, row, steps


@gluon.jit
def _post(queue, at, value, L: gl.constexpr):
    queue.index(at).store(gl.full([1], value, gl.int32, L))


@gluon.jit
def _read(queue, at, L: gl.constexpr):
    return gl.max(queue.index(at).load(L), 0)


@gluon.jit
def _producer(
    qw_desc, qn_desc, kw_desc, kn_desc, v_desc, qw_s, qn_s, kw_s, kn_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, queue, queue_full, queue_empty, counter, lens, blocks, R, T, C, section, tiles,
    N: gl.constexpr, VARLEN: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    turn = 0
    t = gl.program_id(0)
    while t < tiles:
        head, q_start, k_start, tokens, keys, row, steps = _tile(t, lens, blocks, R, T, C, section, VARLEN, CAUSAL, N)
        mbarrier.wait(queue_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        slot = (turn & 1) * 6
        _post(queue, slot, head, one)
        _post(queue, slot + 1, q_start, one)
        _post(queue, slot + 2, tokens, one)
        _post(queue, slot + 3, keys, one)
        _post(queue, slot + 4, row, one)
        _post(queue, slot + 5, steps, one)
        mbarrier.arrive(queue_full.index(turn & 1), count=1)
        if steps > 0:
            for j in range(steps):
                s = it & 1
                phase = ((it >> 1) & 1) ^ 1
                at = k_start + j * N
                mbarrier.wait(k_empty.index(s), phase)
                mbarrier.expect(k_full.index(s), N * 192 * 2)
                tma.async_copy_global_to_shared(kw_desc, [at, head * 192], k_full.index(s), kw_s.index(s))
                tma.async_copy_global_to_shared(kn_desc, [at, head * 192 + 128], k_full.index(s), kn_s.index(s))
                if j == 0:
                    for w in gl.static_range(2):
                        mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                        mbarrier.expect(q_full.index(w), 64 * 192 * 2)
                        first = q_start + row + w * 64
                        tma.async_copy_global_to_shared(qw_desc, [first, head * 192], q_full.index(w), qw_s.index(w))
                        tma.async_copy_global_to_shared(
                            qn_desc, [first, head * 192 + 128], q_full.index(w), qn_s.index(w)
                        )
                mbarrier.wait(v_empty.index(s), phase)
                mbarrier.expect(v_full.index(s), N * 128 * 2)
                tma.async_copy_global_to_shared(v_desc, [at, head * 128], v_full.index(s), v_s.index(s))
                it += 1
        else:
            # Nothing to load; the phases of the query buffers go on, as every tile has its turn.
            for w in gl.static_range(2):
                mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                mbarrier.arrive(q_full.index(w), count=1)
        turn += 1
        t = gl.num_programs(0) + gl.atomic_add(counter, 1)
    mbarrier.wait(queue_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    _post(queue, (turn & 1) * 6, -1, one)
    mbarrier.arrive(queue_full.index(turn & 1), count=1)
    # The last program to come here leaves the queue as it found it.
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _softmax(s, m, total, scale, shift, last, at, masked, LS: gl.constexpr, N: gl.constexpr):
    """One block of the online softmax in powers of two: (weights, m', total', factor for what was summed so far)."""
    if masked:
        position = gl.minimum(gl.arange(0, 64, gl.SliceLayout(1, LS)) + shift, last)
        s = gl.where((at + gl.arange(0, N, gl.SliceLayout(0, LS)))[None, :] <= position[:, None], s, float("-inf"))
    top = gl.maximum(m, gl.max(s, 1) * scale)
    base = gl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing yet
    shrink = gl.exp2(m - base)
    p = gl.exp2(s * scale - base[:, None])
    return p, top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _hold(total):
    """`total`, computed here: the assembler would else sink the softmax below the wait that it is to overlap with.

    A store that depends on it, but never happens (no sum of weights is negative), is an instruction it cannot move.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000; @p st.shared.f32 [a], $1;
        mov.b32 $0, $1; }""",
        "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _scores(qw, qn, kw, kn, zero):
    s = warpgroup_mma(qw, kw.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(qn, kn.permute((1, 0)), s, is_async=True)


@gluon.jit
def _steps(
    whole, stop, base, s0, p, m, total, acc, scale, shift, last, qw, qn, kw_s, kn_s, v_s, k_full, k_empty, v_full,
    v_empty, turns, W: gl.constexpr, TURNS: gl.constexpr, N: gl.constexpr,
    LS: gl.constexpr, LO: gl.constexpr,
):  # fmt: skip
    """Key blocks from 1 on: scores of each, then the sum of the block before it. Those from `whole` on are masked."""
    for j in range(1, stop):
        it = base + j
        k = it & 1
        v = (it - 1) & 1
        mbarrier.wait(k_full.index(k), (it >> 1) & 1)
        if TURNS:
            mbarrier.wait(turns.index(W), it & 1)
        s = _scores(qw, qn, kw_s.index(k), kn_s.index(k), s0)
        mbarrier.wait(v_full.index(v), ((it - 1) >> 1) & 1)
        acc = warpgroup_mma(p, v_s.index(v), acc, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index(1 - W), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(k), count=1)
        weights, m, total, shrink = _softmax(s, m, total, scale, shift, last, j * N, j >= whole, LS, N)
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, LO))
        total = _hold(total)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_empty.index(v), count=1)
        p = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, LO, 2))
        acc = acc * shrink[:, None]
    return p, m, total, acc


@gluon.jit
def _consumer(
    out, lse, qw_s, qn_s, kw_s, kn_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, queue, queue_full,
    queue_empty, turns, H, scale, W: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows: gl.constexpr = gl.SliceLayout(1, LS)
    qw = qw_s.index(W)
    qn = qn_s.index(W)
    base = 0
    turn = 0
    s0 = gl.zeros([64, N], gl.float32, LS)
    mbarrier.wait(queue_full.index(0), 0)
    head = _read(queue, 0, one)
    while head >= 0:
        slot = (turn & 1) * 6
        q_start = _read(queue, slot + 1, one)
        tokens = _read(queue, slot + 2, one)
        keys = _read(queue, slot + 3, one)
        row = _read(queue, slot + 4, one) + W * 64
        steps = _read(queue, slot + 5, one)
        mbarrier.arrive(queue_empty.index(turn & 1), count=1)
        m = gl.full([64], float("-inf"), gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        acc = gl.zeros([64, 128], gl.float32, LO)
        mbarrier.wait(q_full.index(W), turn & 1)
        if steps > 0:
            shift = keys
            if CAUSAL:
                shift = keys - tokens + row
            whole = gl.minimum(shift + 1, keys) // N

            mbarrier.wait(k_full.index(base & 1), (base >> 1) & 1)
            if TURNS:
                mbarrier.wait(turns.index(W), base & 1)
            s = _scores(qw, qn, kw_s.index(base & 1), kn_s.index(base & 1), s0)
            if TURNS:
                mbarrier.arrive(turns.index(1 - W), count=1)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(base & 1), count=1)
            weights, m, total, _ = _softmax(s, m, total, scale, shift, keys - 1, 0, whole < 1, LS, N)
            p = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, LO, 2))
            p, m, total, acc = _steps(
                whole, steps, base, s0, p, m, total, acc, scale, shift, keys - 1, qw, qn, kw_s, kn_s, v_s, k_full,
                k_empty, v_full, v_empty, turns, W, TURNS, N, LS, LO,
            )  # fmt: skip
            mbarrier.arrive(q_empty.index(W), count=1)
            base += steps
            v = (base - 1) & 1
            mbarrier.wait(v_full.index(v), ((base - 1) >> 1) & 1)
            acc = warpgroup_mma(p, v_s.index(v), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(v), count=1)
        else:
            mbarrier.arrive(q_empty.index(W), count=1)

        empty = total == 0.0
        norm = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), gl.SliceLayout(1, LO))
        i = gl.arange(0, 64, gl.SliceLayout(1, LO)) + row
        d = gl.arange(0, 128, gl.SliceLayout(0, LO))
        at = ((q_start + i).to(gl.int64) * H + head) * 128
        gl.store(out + at[:, None] + d[None, :], (acc * norm[:, None]).to(gl.bfloat16), mask=(i < tokens)[:, None])
        i = gl.arange(0, 64, rows) + row
        value = gl.where(empty, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse + (q_start + i) * H + head, value, mask=i < tokens)

        turn += 1
        mbarrier.wait(queue_full.index(turn & 1), (turn >> 1) & 1)
        head = _read(queue, (turn & 1) * 6, one)


@gluon.jit(do_not_specialize=["T", "C", "R", "blocks", "section", "tiles"])
def mha_prefill_kernel(
    qw_desc, qn_desc, kw_desc, kn_desc, v_desc, out, lse, lens, counter, T, C, H, R, blocks, section, tiles, scale,
    N: gl.constexpr, VARLEN: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """q, k [tokens, H * 192], v [tokens, H * 128] as descriptors -> out [T, H, 128] bf16, lse [T, H] f32 (natural).

    lens i32 [2, R + 1]: first query and first key of each request, read if VARLEN. counter i32 [2]: zeros, left as
    zeros. scale: softmax scale times log2 e.
    """
    bf16: gl.constexpr = gl.bfloat16
    qw_s = gl.allocate_shared_memory(bf16, [2, 64, 128], qw_desc.layout)
    qn_s = gl.allocate_shared_memory(bf16, [2, 64, 64], qn_desc.layout)
    kw_s = gl.allocate_shared_memory(bf16, [2, N, 128], kw_desc.layout)
    kn_s = gl.allocate_shared_memory(bf16, [2, N, 64], kn_desc.layout)
    v_s = gl.allocate_shared_memory(bf16, [2, N, 128], v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    queue_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    queue_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    queue = gl.allocate_shared_memory(gl.int32, [12, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(queue_full.index(i), count=1)
        mbarrier.init(queue_empty.index(i), count=2)
        mbarrier.init(turns.index(i), count=1)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    if TURNS:
        mbarrier.arrive(turns.index(0), count=1)
    gl.warp_specialize([
        (_consumer, (
            out, lse, qw_s, qn_s, kw_s, kn_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, queue, queue_full,
            queue_empty, turns, H, scale, 0, N, CAUSAL, TURNS)),
        (_consumer, (
            out, lse, qw_s, qn_s, kw_s, kn_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, queue, queue_full,
            queue_empty, turns, H, scale, 1, N, CAUSAL, TURNS)),
        (_producer, (
            qw_desc, qn_desc, kw_desc, kn_desc, v_desc, qw_s, qn_s, kw_s, kn_s, v_s, q_full, q_empty, k_full, k_empty,
            v_full, v_empty, queue, queue_full, queue_empty, counter, lens, blocks, R, T, C, section, tiles, N,
            VARLEN, CAUSAL)),
    ], [4, 1], [240, 24])  # fmt: skip


def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


def _columns(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [tokens, heads, dim] seen as [tokens, heads * dim], in boxes of rows x columns."""
    flat = x.view(x.shape[0], -1)
    return TensorDescriptor.from_tensor(flat, [rows, columns], _layout(rows, columns))


@kept_for_ever
def _counter(device: torch.device) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(tokens: int, keys: int) -> Config:
    """The configuration for requests of up to `tokens` queries over up to `keys` keys."""
    return Config()


@on_its_device
def mha_prefill(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, out: Tensor | None = None,
    starts: Tensor | None = None, longest: int | None = None, longest_keys: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries over keys and values of their own heads: (out [T, H, 128] bf16, lse [T, H] f32, natural).

    q [T, H, 192], k [C, H, 192], v [C, H, 128], bf16, contiguous, on one Hopper GPU. With `causal`, query t of T sits
    at position C - T + t and sees positions up to its own: C > T is a chunk behind a cached prefix, T <= C. A row
    that sees nothing gets zeros and -inf.

    Several requests in one call: `starts` i32 [2, R + 1] holds the running sums of their queries (first row) and keys
    (second row), on the GPU; `longest` and `longest_keys` bound one request's queries and keys. They are laid end to
    end in q, k and v, and each is causal within itself.

    No synchronisation with the host; calls on different streams must not overlap (they share a queue). Raises
    `ValueError` for anything else.
    """
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError("q, k and v must be [tokens, heads, dim]")
    tokens, heads, _ = q.shape
    keys = k.shape[0]
    if q.shape[2] != QK or k.shape != (keys, heads, QK) or v.shape != (keys, heads, VD):
        raise ValueError(f"q and k must have head dimension {QK}, v {VD}, all {heads} heads; got "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16 or not x.is_cuda or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous bf16 on a GPU, got {x.dtype} on {x.device}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    requests = 1
    if starts is None:
        if causal and tokens > keys:
            raise ValueError(f"{tokens} queries cannot be the newest of {keys} keys")
        longest, longest_keys = tokens, keys
    else:
        if starts.ndim != 2 or starts.shape[0] != 2 or starts.dtype != torch.int32 or not starts.is_contiguous():
            raise ValueError("starts must be contiguous int32 [2, requests + 1]")
        if longest is None or longest_keys is None:
            raise ValueError("starts needs longest and longest_keys")
        requests = starts.shape[1] - 1
    if out is None:
        out = torch.empty(tokens, heads, VD, dtype=torch.bfloat16, device=q.device)
    elif out.shape != (tokens, heads, VD) or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bf16 [{tokens}, {heads}, {VD}]")
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if tokens == 0 or requests == 0:
        return out, lse
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    config = config or choose(longest, longest_keys)
    section = heads
    while section % 2 == 0 and section * longest_keys * requests * (QK + VD) * 2 > config.l2_bytes:
        section //= 2
    blocks = -(-longest // ROWS)
    tiles = heads * blocks * requests
    counter = _counter(q.device)
    mha_prefill_kernel[(min(tiles, _processors(q.device)),)](
        _columns(q, 64, WIDE), _columns(q, 64, NARROW), _columns(k, config.block, WIDE),
        _columns(k, config.block, NARROW), _columns(v, config.block, WIDE), out, lse,
        counter if starts is None else starts, counter, tokens, keys, heads, requests, blocks, section, tiles,
        scale * LOG2E, N=config.block, VARLEN=starts is not None, CAUSAL=causal, TURNS=config.turns,
        num_warps=4,
    )  # fmt: skip
    return out, lse


def variants() -> list[Variant]:
    """The kernel as the host function launches it."""
    found = []
    for name, config, varlen, causal in (
        ("prefill", Config(), False, True),
        ("prefill-turns", Config(turns=True), False, True),
        ("prefill-varlen", Config(), True, True),
        ("prefill-full", Config(), False, False),
    ):
        box = {rows: (f"tensordesc<bf16[{rows},128],{_layout(rows, 128)!r}>",
                      f"tensordesc<bf16[{rows},64],{_layout(rows, 64)!r}>") for rows in (64, config.block)}  # fmt: skip
        signature = {
            "qw_desc": box[64][0], "qn_desc": box[64][1], "kw_desc": box[config.block][0],
            "kn_desc": box[config.block][1], "v_desc": box[config.block][0], "out": "*bf16", "lse": "*fp32",
            "lens": "*i32", "counter": "*i32", "T": "i32", "C": "i32", "H": "i32:16", "R": "i32", "blocks": "i32",
            "section": "i32", "tiles": "i32", "scale": "fp32",
        }  # fmt: skip
        constants = {"N": config.block, "VARLEN": varlen, "CAUSAL": causal, "TURNS": config.turns}
        found.append(Variant(name, mha_prefill_kernel, signature, constants, 4))
    return found
