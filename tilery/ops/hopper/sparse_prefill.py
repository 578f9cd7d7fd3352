"""Sparse MLA prefill on Hopper: absorbed attention of many query tokens, each over its own rows of a latent cache.

    out[t, h] = sum_k p_k latent(row_k),   p = softmax_k(q[t, h] . row_k * scale),   row_k = kv[indices[t, k]]

Over bf16 rows here; over packed FP8 rows it is `sparse_mla.sparse_mla_decode`, which does not care how many tokens
there are. A program holds 64 heads of one token: eight warps compute (`_mla.py`), four gather rows with asynchronous
copies of 16 bytes straight into the swizzled tiles. Source: DeepSeek-V2 report, section 2.1.2; DeepSeek-V3.2-Exp.

Legend: T query tokens, H heads, K indices of a token, L rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper._mla import attend_left, attend_right, barriers, shared_tiles
from tilery.ops.hopper.sparse_mla import LATENT, LOG2E, ROPE, sparse_mla_decode
from tilery.ops.hopper.variant import Variant


@gluon.jit
def gather(kv_ptr, idx_ptr, k_lat, k_rope, bias_s, full, empty, end, blocks):
    """`blocks` blocks of the rows idx[: end] of kv [L, 576]; indices are loaded a block ahead."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    col = gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    narrow = 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, L))[None, :]
    row = gl.load(idx_ptr + at, mask=at < end, other=-1)
    for j in range(blocks):
        stage = j % 2
        phase = ((j // 2) & 1) ^ 1
        at += 64
        next_row = gl.load(idx_ptr + at, mask=at < end, other=-1)
        there = (row >= 0)[:, None]
        base = kv_ptr + (gl.maximum(row, 0).to(gl.int64) * 576)[:, None]
        for c in gl.static_range(4):
            if c % 2 == 0:
                mbarrier.wait(empty.index(stage * 2 + c // 2), phase)
            async_copy.async_copy_global_to_shared(k_lat.index(stage * 4 + c), base + (c * 128 + col), mask=there)
            async_copy.mbarrier_arrive(full.index(stage * 5 + c), increment_count=False)
            if c == 0:
                bias_s.index(stage).store(gl.where(row >= 0, 0.0, float("-inf")))
                mbarrier.arrive(full.index(stage * 5), count=1)
            if c == 1:
                async_copy.async_copy_global_to_shared(k_rope.index(stage), base + narrow, mask=there)
                async_copy.mbarrier_arrive(full.index(stage * 5 + 4), increment_count=False)
        row = next_row


@gluon.jit
def prefill(
    q_ptr, kv_ptr, idx_ptr, len_ptr, sink_ptr, out_ptr, lse_ptr, heads, width, scale, HAS_LEN: gl.constexpr,
    HAS_SINK: gl.constexpr, PIECES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Program: (64 heads innermost, then token). `REGISTERS`: of `attend_right` and of `gather`."""
    pid = gl.program_id(0)
    head0 = (pid % PIECES) * 64
    token = pid // PIECES
    end = width
    if HAS_LEN:
        end = gl.minimum(width, gl.load(len_ptr + token))
    blocks = gl.maximum((end + 63) // 64, 1)
    idx_ptr += token.to(gl.int64) * width
    q_lat, q_rope, k_lat, k_rope, p_s, bias_s, shrink_s = shared_tiles(gl.bfloat16)
    full, empty, p_full, p_empty, ready = barriers(129, 128, 128)
    gl.warp_specialize(
        [
            (attend_left, (sink_ptr, out_ptr, lse_ptr, q_lat, q_rope, k_lat, k_rope, bias_s, p_s, shrink_s, full,
                           empty, p_full, p_empty, ready, token, head0, heads, blocks, scale, HAS_SINK)),
            (attend_right, (q_ptr, out_ptr, q_lat, q_rope, k_lat, p_s, shrink_s, empty, p_full, p_empty, ready,
                            token, token, head0, heads, blocks, 1.0)),
            (gather, (kv_ptr, idx_ptr, k_lat, k_rope, bias_s, full, empty, end, blocks)),
        ],
        [4, 4],
        REGISTERS,
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Registers of the warps of `attend_right` and of `gather` (`attend_left` has the rest)."""

    registers: tuple[int, int] = (168, 104)


@on_its_device
def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
    lengths: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of q [T, H, 576] bf16 over rows of kv: (out bf16 [T, H, 512], lse f32 [T, H]).

    kv: bf16 [L, 576], or packed uint8 [L, 656]. indices int32 [T, K]: rows, -1 for none; `lengths` int32 [T]: only so
    many of the first indices count. sink f32 [H], out, lse, errors and capture: as `sparse_mla_decode`.
    """
    if kv.dtype == torch.uint8:
        return sparse_mla_decode(q, kv, indices, scale=scale, sink=sink, lengths=lengths, out=out)
    if q.dim() != 3 or q.shape[2] != LATENT + ROPE or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise ValueError(f"q must be contiguous bf16 [T, H, {LATENT + ROPE}], got {q.dtype} {list(q.shape)}")
    if kv.dim() != 2 or kv.shape[1] != LATENT + ROPE or kv.dtype != torch.bfloat16 or not kv.is_contiguous():
        raise ValueError(f"kv must be contiguous bf16 [L, {LATENT + ROPE}], got {kv.dtype} {list(kv.shape)}")
    tokens, heads, _ = q.shape
    if indices.dim() != 2 or indices.dtype != torch.int32 or len(indices) != tokens or not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous int32 [{tokens}, K], got {indices.dtype} {list(indices.shape)}")
    if sink is not None and (sink.dtype != torch.float32 or sink.shape != (heads,) or not sink.is_contiguous()):
        raise ValueError(f"sink must be float32 [{heads}], contiguous, got {sink.dtype} {list(sink.shape)}")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != (tokens,) or lengths.stride(0) != 1):
        raise ValueError(f"lengths must be int32 [{tokens}], contiguous, got {lengths.dtype} {list(lengths.shape)}")
    if q.data_ptr() % 16 or kv.data_ptr() % 16:
        raise ValueError("q and kv must start at a multiple of 16 bytes")
    if out is None:
        out = torch.empty(tokens, heads, LATENT, dtype=torch.bfloat16, device=q.device)
    elif out.shape != (tokens, heads, LATENT) or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bf16 {[tokens, heads, LATENT]}, got {out.dtype} {list(out.shape)}")
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if tokens:
        prefill[(tokens * math.ceil(heads / 64),)](
            q, kv, indices, lengths, sink, out, lse, heads, indices.shape[1], scale * LOG2E, lengths is not None,
            sink is not None, math.ceil(heads / 64), (config or Config()).registers, num_warps=4,
        )  # fmt: skip
    return out, lse


def variants() -> list[Variant]:
    """The compiled form of `sparse_mla_prefill` over bf16 rows."""
    kinds = {
        "q_ptr": "*bf16", "kv_ptr": "*bf16", "idx_ptr": "*i32", "len_ptr": "*i32", "sink_ptr": "*fp32",
        "out_ptr": "*bf16", "lse_ptr": "*fp32", "heads": "i32:16", "width": "i32:16", "scale": "fp32",
    }  # fmt: skip
    constants = {"HAS_LEN": True, "HAS_SINK": True, "PIECES": 2, "REGISTERS": Config().registers}
    return [Variant("sparse_mla_prefill", prefill, kinds, constants, 4)]
