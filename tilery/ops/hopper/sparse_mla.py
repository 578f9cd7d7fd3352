"""Sparse MLA decode on Hopper over the packed FP8 cache.

    out[t, h] = sum_k p_k latent(row_k),   p = softmax_k(q[t, h] . row_k * scale),   row_k = cache[indices[t, k]]

An attention sink adds e^sink[h] to the softmax's denominator. Source: DeepSeek-V2 report, section 2.1.2, for the
absorbed form; DeepSeek-V3.2-Exp for the chosen rows and the 656-byte row.

A program holds 64 heads of one token. Eight of its warps compute (`_mla.py`); the other eight, here, gather rows:
16-byte loads into registers one block of 64 rows ahead, e4m3 -> f16 (exact), times the row's scale, into swizzled
shared memory. Products are f16 x f16 with f32 sums, so latents up to 65504 fit, and scales of at least 2^-15 are exact.
With few tokens the rows are split among programs, whose parts `combine` joins.

Legend: T query tokens (all leading dimensions together), H heads, K indices of a token, S cache rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper._mla import attend_left, attend_right, barriers, shared_tiles
from tilery.ops.hopper.variant import Variant

LOG2E = math.log2(math.e)
LATENT, ROPE, ROW_BYTES = 512, 64, 656
BLOCK, HEADS = 64, 64
Q_SHRINK = 1 / 16
"""Queries are kept in f16 times this, so that values up to 2^20 fit; the scale makes up for it."""

_E4M3_TO_F16 = gl.constexpr("""
{
  .reg .b16 low, high;
  .reg .b32 a, b;
  mov.b32 {low, high}, $2;
  cvt.rn.f16x2.e4m3x2 a, low;
  cvt.rn.f16x2.e4m3x2 b, high;
  mul.rn.f16x2 $0, a, $3;
  mul.rn.f16x2 $1, b, $3;
}
""")


@gluon.jit
def dequantize(codes, scale):
    """i32 [R, N] of four e4m3 each, times f32 [R] -> i32 [R, 2 N] of two f16 each."""
    twice = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1
    )
    twice = gl.expand_dims(twice, 1).broadcast_to(codes.shape)
    low, high = gl.inline_asm_elementwise(
        _E4M3_TO_F16, "=r,=r,r,r", [codes, twice], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.join(low, high).reshape([codes.shape[0], codes.shape[1] * 2])


@gluon.jit
def load_scales(scale_ptr, row, RIGHT: gl.constexpr, L: gl.constexpr):
    """f32 scales of the half's two chunks of the rows [64]; 0 where there is no row."""
    pairs: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [32, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [64, 2]
    )
    r = gl.convert_layout(row, gl.SliceLayout(1, pairs), assert_trivial=True)
    at = (gl.maximum(r, 0).to(gl.int64) * 164)[:, None]
    col = 128 + 2 * RIGHT + gl.arange(0, 2, layout=gl.SliceLayout(0, pairs))[None, :]
    first, second = gl.split(gl.load(scale_ptr + at + col, mask=(r >= 0)[:, None], other=0.0))
    return (
        gl.convert_layout(first, gl.SliceLayout(1, L), assert_trivial=True),
        gl.convert_layout(second, gl.SliceLayout(1, L), assert_trivial=True),
    )


@gluon.jit
def gather(
    cache_ptr, idx_ptr, k_lat, k_rope, bias_s, full, empty, end, first, blocks, RIGHT: gl.constexpr,
):  # fmt: skip
    """One half (0: left, 1: right) of `blocks` blocks of the rows idx[first * 64 : end]; the left one with bias and
    rope. Codes and scales are loaded a block ahead, indices two."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    R: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    words = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    floats = cache_ptr.to(gl.pointer_type(gl.float32), bitcast=True)
    halves = cache_ptr.to(gl.pointer_type(gl.bfloat16), bitcast=True)
    k_words = k_lat._reinterpret(gl.int32, [8, 64, 64], gl.NVMMASharedLayout(128, 32, 2))
    at = first * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    col = RIGHT * 64 + gl.arange(0, 32, layout=gl.SliceLayout(0, L))[None, :]
    row = gl.load(idx_ptr + at, mask=at < end, other=-1)
    base = words + (gl.maximum(row, 0).to(gl.int64) * 164)[:, None] + col
    x = gl.load(base, mask=(row >= 0)[:, None], other=0)
    y = gl.load(base + 32, mask=(row >= 0)[:, None], other=0)
    x_scale, y_scale = load_scales(floats, row, RIGHT, L)
    at += 64
    next_row = gl.load(idx_ptr + at, mask=at < end, other=-1)
    for j in range(blocks):
        stage = j % 2
        base = words + (gl.maximum(next_row, 0).to(gl.int64) * 164)[:, None] + col
        slot = stage * 4 + RIGHT * 2
        bar = stage * 5 + RIGHT * 2
        mbarrier.wait(empty.index(stage * 2 + RIGHT), ((j // 2) & 1) ^ 1)
        if not RIGHT:
            r = gl.convert_layout(row, gl.SliceLayout(1, R), assert_trivial=True)
            rope = halves + (gl.maximum(r, 0).to(gl.int64) * 328 + 264)[:, None]
            rope += gl.arange(0, 64, layout=gl.SliceLayout(0, R))[None, :]
            async_copy.async_copy_global_to_shared(k_rope.index(stage), rope, mask=(r >= 0)[:, None])
            async_copy.mbarrier_arrive(full.index(stage * 5 + 4), increment_count=False)
            bias_s.index(stage).store(gl.where(row >= 0, 0.0, float("-inf")))
        k_words.index(slot).store(dequantize(x, x_scale))
        mbarrier.arrive(full.index(bar), count=1)
        x = gl.load(base, mask=(next_row >= 0)[:, None], other=0)
        k_words.index(slot + 1).store(dequantize(y, y_scale))
        mbarrier.arrive(full.index(bar + 1), count=1)
        y = gl.load(base + 32, mask=(next_row >= 0)[:, None], other=0)
        x_scale, y_scale = load_scales(floats, next_row, RIGHT, L)
        row = next_row
        at += 64
        next_row = gl.load(idx_ptr + at, mask=at < end, other=-1)


@gluon.jit
def decode(
    q_ptr, cache_ptr, idx_ptr, len_ptr, sink_ptr, out_ptr, lse_ptr, heads, width, splits, scale, shrink_q,
    HAS_LEN: gl.constexpr, HAS_SINK: gl.constexpr, PIECES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Program: (64 heads innermost, then split, then token). `REGISTERS`: of `attend_right`, of the gatherers."""
    pid = gl.program_id(0)
    head0 = (pid % PIECES) * 64
    part = pid // PIECES
    token = part // splits
    end = width
    if HAS_LEN:
        end = gl.minimum(width, gl.load(len_ptr + token))
    total = (end + 63) // 64
    share = (total + splits - 1) // splits
    first = (part % splits) * share
    blocks = gl.maximum(gl.minimum(share, total - first), 1)
    end = gl.minimum(end, (first + blocks) * 64)
    idx_ptr += token.to(gl.int64) * width
    q_lat, q_rope, k_lat, k_rope, p_s, bias_s, shrink_s = shared_tiles(gl.float16)
    full, empty, p_full, p_empty, ready = barriers(1, 1, 128)
    gl.warp_specialize(
        [
            (attend_left, (sink_ptr, out_ptr, lse_ptr, q_lat, q_rope, k_lat, k_rope, bias_s, p_s, shrink_s, full,
                           empty, p_full, p_empty, ready, part, head0, heads, blocks, scale, HAS_SINK)),
            (attend_right, (q_ptr, out_ptr, q_lat, q_rope, k_lat, p_s, shrink_s, empty, p_full, p_empty, ready,
                            token, part, head0, heads, blocks, shrink_q)),
            (gather, (cache_ptr, idx_ptr, k_lat, k_rope, bias_s, full, empty, end, first, blocks, 0)),
            (gather, (cache_ptr, idx_ptr, k_lat, k_rope, bias_s, full, empty, end, first, blocks, 1)),
        ],
        [4, 4, 4],
        REGISTERS,
    )  # fmt: skip


@gluon.jit
def combine(
    part_ptr, weight_ptr, sink_ptr, out_ptr, lse_ptr, heads, splits, HAS_SINK: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Joins parts f32 [T, splits, H, 512] of weights 2^weight [T, splits, H]; program: a head of a token."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    pid = gl.program_id(0)
    token = pid // heads
    head = pid % heads
    split = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, L))
    col = gl.arange(0, 512, layout=gl.SliceLayout(0, L))
    row = (token * splits + split) * heads + head
    weight = gl.load(weight_ptr + row, mask=split < splits, other=float("-inf"))
    x = gl.load(part_ptr + (row.to(gl.int64) * 512)[:, None] + col[None, :], mask=(split < splits)[:, None], other=0.0)
    top = gl.max(weight, 0)
    top = gl.where(top == float("-inf"), 0.0, top)
    share = gl.exp2(weight - top)
    total = gl.sum(share, 0)
    below = total
    if HAS_SINK:
        below += gl.where(total == 0.0, 0.0, gl.exp2(gl.load(sink_ptr + head) * 1.4426950408889634 - top))
    out = gl.sum(x * share[:, None], 0) / gl.where(below == 0.0, 1.0, below)
    gl.store(out_ptr + pid.to(gl.int64) * 512 + col, out.to(gl.bfloat16))
    gl.store(lse_ptr + pid, gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453))


@dataclass(frozen=True)
class Config:
    """How a shape is run. splits: programs that share the rows of 64 heads of a token; registers of the warps of
    `attend_right` and of the gatherers (`attend_left` has the rest)."""

    splits: int
    registers: tuple[int, int, int] = (160, 80, 72)


@lru_cache(maxsize=1024)
def choose(tokens: int, heads: int, width: int, sms: int = 132) -> Config:
    """The power of two of splits whose estimated time is least, in units of a block of 64 rows (3 us on an H100).

    A program costs its blocks and about 2 more to start and end; programs run in waves of `sms`. Joining costs what the
    parts' way to memory and back takes, about 9 MB a unit.
    """
    programs, blocks = tokens * -(-heads // HEADS), max(1, -(-width // BLOCK))
    best, least = 1, math.inf
    for splits in (1, 2, 4, 8, 16, 32):
        if splits > blocks:
            break
        cost = -(-programs * splits // sms) * (-(-blocks // splits) + 2.0)
        if splits > 1:
            cost += 0.5 + tokens * heads * splits * LATENT * 8 / 9e6
        if cost < least:
            best, least = splits, cost
    return Config(best)


def _check(q: Tensor, cache: Tensor, indices: Tensor, sink: Tensor | None, lengths: Tensor | None) -> None:
    lead, heads = q.shape[:-2], q.shape[-2] if q.dim() > 2 else 0
    if q.dim() < 3 or q.shape[-1] != LATENT + ROPE or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise ValueError(f"q must be contiguous bf16 [.., H, {LATENT + ROPE}], got {q.dtype} {list(q.shape)}")
    if cache.dtype != torch.uint8 or cache.shape[-1] != ROW_BYTES or not cache.is_contiguous():
        raise ValueError(f"cache must be contiguous uint8 [.., {ROW_BYTES}], got {cache.dtype} {list(cache.shape)}")
    if indices.dtype != torch.int32 or indices.shape[:-1] != lead or not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous int32 {[*lead]} + [K], got {indices.dtype} {list(indices.shape)}")
    if sink is not None and (sink.dtype != torch.float32 or sink.shape != (heads,) or not sink.is_contiguous()):
        raise ValueError(f"sink must be float32 [{heads}], contiguous, got {sink.dtype} {list(sink.shape)}")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != lead or not lengths.is_contiguous()):
        raise ValueError(f"lengths must be contiguous int32 {list(lead)}, got {lengths.dtype} {list(lengths.shape)}")
    for name, x in (("q", q), ("cache", cache)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes")


@on_its_device
def sparse_mla_decode(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
    lengths: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of q over the cache rows that `indices` names: (out bf16 [.., H, 512], lse f32 [.., H]).

    q bf16 [.., H, 576]: 512 latent values, 64 of rope. cache uint8 [S, 656] or [pages, 64, 656] (see `ops/cache.py`).
    indices int32 [.., K]: row numbers (page * 64 + offset), -1 for none; `lengths` int32 [..]: only so many of the
    first indices count. sink f32 [H]: a further score in the softmax that has no value; `lse`, the natural logarithm
    of the sum of e^score, leaves it out. A token without any row gives zeros and an lse of -inf.

    Needs an sm_90 device. No synchronisation; may be captured in a CUDA graph. Raises `ValueError` for other shapes,
    dtypes or layouts.
    """
    _check(q, cache, indices, sink, lengths)
    lead, heads, width = q.shape[:-2], q.shape[-2], indices.shape[-1]
    tokens = math.prod(lead)
    if out is None:
        out = torch.empty(*lead, heads, LATENT, dtype=torch.bfloat16, device=q.device)
    elif out.shape != (*lead, heads, LATENT) or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bf16 {[*lead, heads, LATENT]}, got {out.dtype} {list(out.shape)}")
    lse = torch.empty(*lead, heads, dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse
    config = config or choose(tokens, heads, width)
    splits = config.splits
    part, weight = out, lse
    if splits > 1:
        part = torch.empty(tokens, splits, heads, LATENT, dtype=torch.float32, device=q.device)
        weight = torch.empty(tokens, splits, heads, dtype=torch.float32, device=q.device)
    decode[(tokens * splits * -(-heads // HEADS),)](
        q, cache, indices, lengths, sink, part, weight, heads, width, splits, scale * LOG2E / Q_SHRINK, Q_SHRINK,
        lengths is not None, sink is not None, -(-heads // HEADS), config.registers, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        combine[(tokens * heads,)](
            part, weight, sink, out, lse, heads, splits, sink is not None, 1 << (splits - 1).bit_length(), num_warps=4
        )
    return out, lse


def variants() -> list[Variant]:
    """The compiled forms that `sparse_mla_decode` chooses among."""
    kinds = {
        "q_ptr": "*bf16", "cache_ptr": "*u8", "idx_ptr": "*i32", "len_ptr": "*i32", "sink_ptr": "*fp32",
        "lse_ptr": "*fp32", "heads": "i32:16", "width": "i32:16", "splits": "i32", "scale": "fp32", "shrink_q": "fp32",
    }  # fmt: skip
    joined = {
        "part_ptr": "*fp32", "weight_ptr": "*fp32", "sink_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32",
        "heads": "i32:16", "splits": "i32",
    }  # fmt: skip
    found = []
    for name, out in (("whole", "*bf16"), ("split", "*fp32")):
        constants = {"HAS_LEN": True, "HAS_SINK": True, "PIECES": 2, "REGISTERS": Config(1).registers}
        found.append(Variant(f"sparse_mla_{name}", decode, {**kinds, "out_ptr": out}, constants, 4))
    for splits in (2, 16, 32):
        constants = {"HAS_SINK": True, "SPLITS": splits}
        found.append(Variant(f"sparse_mla_combine_{splits}", combine, joined, constants, 4))
    return found
