"""Dense MLA decode over a paged latent cache on Hopper: host side, configurations, compile-only variants.

The kernels and how they work: `_dense_mla`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilery.ops.hopper._dense_mla import mla_combine_kernel, mla_decode_kernel
from tilery.ops.hopper._host import kept_for_ever, on_its_device
from tilery.ops.hopper.variant import Variant

PAGE, ROWS, DIM, LATENT, WIDE, ROPE, BYTES = 64, 64, 576, 512, 128, 64, 656
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """charge: what a request costs beside its blocks, in blocks. least: blocks that a part has at least. ahead: a
    warpgroup begins with its own scores before it takes over the other one's weights. rows: of a combine program."""

    charge: int = 5
    least: int = 4
    ahead: bool = False
    rows: int = 8


def _box(columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([64, columns], gl.bfloat16)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@kept_for_ever
def _memory(device: torch.device, words: int, splits: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(words, dtype=torch.float32, device=device),
        torch.zeros(splits, dtype=torch.int32, device=device),
    )


def _workspace(device: torch.device, pieces: int, rows: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partial results f32 [pieces, rows, 512], their log-sum-exp f32 [pieces, rows], zeros i32 [2 * padded].

    Sizes are rounded up to powers of two, so that all that is ever kept is at most twice the largest.
    """
    words = pieces * rows * (LATENT + 1)
    memory, splits = _memory(device, 1 << (words - 1).bit_length(), 1 << (2 * padded - 1).bit_length())
    parts, lse = memory[:words].split((pieces * rows * LATENT, pieces * rows))
    return parts.view(pieces, rows, LATENT), lse.view(pieces, rows), splits[: 2 * padded]


def choose(tokens: int, packed: bool) -> Config:
    """The configuration for requests with `tokens` queries each: what was fastest on an H100."""
    return Config(ahead=tokens == 1 and not packed)


def _division(batch: int, rows: int, processors: int) -> tuple[int, int, int]:
    """(tiles of 64 rows a request, parts of the work, requests padded to a power of two)."""
    tiles = -(-rows // ROWS)
    return tiles, max(1, processors // tiles), max(128, 1 << (batch - 1).bit_length())


@on_its_device
def dense_mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of absorbed queries over a paged latent cache: (out [B, S, H, 512] bf16, lse [B, S, H] f32, natural).

    q [B, S, H, 576] bf16, contiguous, S at most 64, H one of 16, 32, 64, 128. cache: rows of pages of 64, [pages * 64,
    576] or [pages, 64, 576] bf16, or packed uint8 rows of 656 bytes (see `tilery.ops.cache`). block_table [B, width]
    int32: a request's pages in order; entries behind its length are not read. lengths [B] int32: cache rows of each
    request, its S newest ones being those of the queries, which see rows up to their own. A query that sees nothing
    gets zeros and -inf. Rows behind a request's length have no influence, be they NaN.

    Packed rows are widened to f16, exactly if their scales lie between 2^-15 and 2^7; queries are clamped to f16.

    No synchronisation with the host; calls on different streams must not overlap (they share a workspace). Raises
    `ValueError` for anything else.
    """
    if q.ndim != 4 or q.shape[3] != DIM or q.shape[2] not in (16, 32, 64, 128):
        raise ValueError(f"q must be [batch, tokens, 16 | 32 | 64 | 128, {DIM}], got {tuple(q.shape)}")
    batch, tokens, heads, _ = q.shape
    if q.dtype != torch.bfloat16 or not q.is_cuda or not q.is_contiguous():
        raise ValueError(f"q must be contiguous bf16 on a GPU, got {q.dtype} on {q.device}")
    if tokens > PAGE:
        raise ValueError(f"at most {PAGE} query tokens a request, got {tokens}")
    packed = cache.dtype == torch.uint8
    if cache.dtype not in (torch.bfloat16, torch.uint8) or cache.shape[-1] != (BYTES if packed else DIM):
        raise ValueError(f"cache must be bf16 rows of {DIM} or uint8 rows of {BYTES}, got {cache.dtype} rows of "
                         f"{cache.shape[-1]}")  # fmt: skip
    if not cache.is_contiguous() or cache.device != q.device:
        raise ValueError(f"cache must be contiguous, beside q on {q.device}")
    flat = cache.view(-1, cache.shape[-1])
    if flat.shape[0] % PAGE or flat.shape[0] == 0:
        raise ValueError(f"cache must be whole pages of {PAGE} rows, got {flat.shape[0]} rows")
    expected = (("block_table", block_table, (batch, block_table.shape[-1])), ("lengths", lengths, (batch,)))
    for name, x, shape in expected:
        if x.dtype != torch.int32 or x.shape != shape or x.stride(-1) != 1 or x.device != q.device:
            raise ValueError(f"{name} must be int32 {shape} beside q, got {x.dtype} {tuple(x.shape)} on {x.device}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if out is None:
        out = torch.empty(batch, tokens, heads, LATENT, dtype=torch.bfloat16, device=q.device)
    elif out.shape != (batch, tokens, heads, LATENT) or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bf16 {(batch, tokens, heads, LATENT)}")
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    if batch == 0 or tokens == 0:
        return out, lse

    config = config or choose(tokens, packed)
    rows = tokens * heads
    tiles, parts, padded = _division(batch, rows, _processors(q.device))
    part_out, part_lse, split = _workspace(q.device, 2 * parts, rows, padded)
    flat_q = q.view(-1, DIM)
    wide, narrow = _box(WIDE), _box(ROPE)
    if packed:
        words = flat.view(torch.int32)
        ropes = TensorDescriptor.from_tensor(flat.view(torch.bfloat16)[:, -ROPE:], [PAGE, ROPE], narrow)
        values = ropes
    else:
        words = block_table
        ropes = TensorDescriptor.from_tensor(flat, [PAGE, ROPE], narrow)
        values = TensorDescriptor.from_tensor(flat, [PAGE, WIDE], wide)
    mla_decode_kernel[(parts * tiles,)](
        TensorDescriptor.from_tensor(flat_q, [ROWS, WIDE], wide),
        TensorDescriptor.from_tensor(flat_q, [ROWS, ROPE], narrow),
        values, ropes, words, block_table, lengths, out, lse, part_out, part_lse, split, batch,
        block_table.stride(0), tokens, parts, scale * LOG2E, config.charge, config.least, 0,
        H=heads, TILES=tiles, BP=padded, AHEAD=config.ahead, PACKED=packed, num_warps=4,
    )  # fmt: skip
    mla_combine_kernel[(batch, -(-rows // config.rows))](
        part_out, part_lse, split, lengths, out, lse, tokens, H=heads, RC=config.rows, num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out, lse


def variants() -> list[Variant]:
    """The kernels as the host function launches them."""
    box = {columns: f"tensordesc<bf16[64,{columns}],{_box(columns)!r}>" for columns in (WIDE, ROPE)}
    pointers = {
        "lengths": "*i32",
        "out": "*bf16",
        "lse": "*fp32",
        "part_out": "*fp32",
        "part_lse": "*fp32",
        "split": "*i32",
    }
    numbers = {"B": "i32", "width": "i32", "S": "i32", "parts": "i32", "zero": "i32", "charge": "i32", "least": "i32"}
    signature = {"q_desc": box[WIDE], "qr_desc": box[ROPE], "kr_desc": box[ROPE], "packed": "*i32", "table": "*i32",
                 "scale": "fp32", **pointers, **numbers}  # fmt: skip
    found = []
    for name, heads, tiles, packed, config in (
        ("mla", 128, 4, False, choose(2, False)),
        ("mla-one-token", 128, 2, False, choose(1, False)),
        ("mla-16-heads", 16, 1, False, choose(1, False)),
        ("mla-packed", 128, 2, True, choose(1, True)),
    ):
        constants = {"H": heads, "TILES": tiles, "BP": 128, "AHEAD": config.ahead, "PACKED": packed}
        kinds = {**signature, "kv_desc": box[ROPE if packed else WIDE]}
        found.append(Variant(name, mla_decode_kernel, kinds, constants, 4))
    constants = {"H": 128, "RC": 8}
    found.append(Variant("mla-combine", mla_combine_kernel, {**pointers, **numbers}, constants, 4))
    return found
