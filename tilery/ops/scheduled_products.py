"""Products with quantised weights: kernels of the tile language ("tile", any device) and for Hopper ("hopper", sm_90).

Where shapes or layouts are not a Hopper kernel's, the tile language's runs; it takes all that the contracts allow.
Imports: the operators' module; the kernels when they are first called.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tilery.ops import products
from tilery.ops.products import PIECE, Int4Weight, check_experts, check_fp8, check_int4, check_int8, tiles_of
from tilery.ops.quant import BLOCK, E4M3
from tilery.ops.registry import implementation
from tilery.ops.scheduled import _no_hopper
from tilery.ops.tiled import tiled

OUTPUTS = 8
"""What the number of outputs must be a multiple of for Hopper's kernels."""
MOST_GROUPS = 1024


@functools.cache
def _kernels() -> ModuleType:
    from tilery.ops.kernels import products as kernels

    return kernels


@functools.cache
def _knows_fp8(device: torch.device) -> bool:
    """Whether Triton compiles e4m3 for the GPU; where not, kernels take the bytes."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _blocks(x: Tensor) -> Tensor:
    """[.., K] -> [.., K/128, 128], of FP8 in the form that the device knows."""
    if x.dtype is E4M3 and x.is_cuda and not _knows_fp8(x.device):
        x = x.view(torch.uint8)
    return x.unflatten(-1, (-1, BLOCK))


def _rows(scale: Tensor) -> Tensor:
    """Scales as the tile language wants them: dense in the last dimension."""
    return scale if scale.stride(-1) == 1 else scale.contiguous()


# ---- tile language ---------------------------------------------------------------------------------------------------


@tiled("fp8_gemm")
def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    out = check_fp8(a, a_scale, b, b_scale, out)
    _kernels().fp8_gemm(_blocks(a), _rows(a_scale), _blocks(b), b_scale, out)
    return out


@tiled("fp8_grouped_gemm_contiguous")
def fp8_grouped_gemm_contiguous(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor | None = None
) -> Tensor:
    out = check_fp8(a, a_scale, b, b_scale, out, check_experts(b, "offsets", offsets, len(b) + 1))
    _kernels().fp8_gemm_contiguous(_blocks(a), _rows(a_scale), _blocks(b), b_scale, offsets, out)
    return out


@tiled("fp8_grouped_gemm_masked")
def fp8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor | None = None
) -> Tensor:
    out = check_fp8(a, a_scale, b, b_scale, out, check_experts(b, "counts", counts), masked=True)
    _kernels().fp8_gemm_masked(_blocks(a), _rows(a_scale), _blocks(b), b_scale, counts, out)
    return out


@tiled("int8_gemm")
def int8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    out = check_int8(a, a_scale, b, b_scale, out)
    _kernels().int8_gemm(_blocks(a), a_scale, _blocks(b), b_scale, out)
    return out


@tiled("int8_grouped_gemm")
def int8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, groups: Tensor, out: Tensor | None = None
) -> Tensor:
    out = check_int8(a, a_scale, b, b_scale, out, check_experts(b, "groups", groups, tiles_of(a)))
    _kernels().int8_gemm_tiles(_blocks(a), a_scale, _blocks(b), b_scale, groups, out)
    return out


@tiled("int8_grouped_gemm_masked")
def int8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor | None = None,
    expected: int | None = None,
) -> Tensor:  # fmt: skip
    out = check_int8(a, a_scale, b, b_scale, out, check_experts(b, "counts", counts), masked=True)
    _kernels().int8_gemm_masked(_blocks(a), a_scale, _blocks(b), b_scale, counts, out)
    return out


def _kind(a: Tensor) -> Any:
    """What FP8 rows and INT4 weights are multiplied as: what the device converts to fastest."""
    return _kernels().f16 if a.is_cuda and a.dtype is E4M3 else _kernels().bf16


def _int4(a: Tensor, a_scale: Tensor | None, weight: Any, out: Tensor | None) -> Tensor:
    out = check_int4(a, a_scale, weight, out)
    scale = None if a_scale is None else _rows(a_scale)
    _kernels().int4_gemm(_blocks(a), scale, weight.packed, weight.scale, weight.zero, out, _kind(a))
    return out


def _int4_masked(a: Tensor, a_scale: Tensor | None, weight: Any, counts: Tensor, out: Tensor | None) -> Tensor:
    out = check_int4(a, a_scale, weight, out, 1, counts)
    scale = None if a_scale is None else _rows(a_scale)
    _kernels().int4_gemm_masked(_blocks(a), scale, weight.packed, weight.scale, weight.zero, counts, out, _kind(a))
    return out


@tiled("w4a16_gemm")
def w4a16_gemm(a: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    return _int4(a, None, weight, out)


@tiled("w4a8_gemm")
def w4a8_gemm(a: Tensor, a_scale: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    return _int4(a, a_scale, weight, out)


@tiled("w4a16_grouped_gemm_masked")
def w4a16_grouped_gemm_masked(
    a: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    return _int4_masked(a, None, weight, counts, out)


@tiled("w4a8_grouped_gemm_masked")
def w4a8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    return _int4_masked(a, a_scale, weight, counts, out)


# ---- Hopper ----------------------------------------------------------------------------------------------------------


def _hopper(of: str) -> Any:
    return implementation(of, "hopper", "cuda", rank=30, unavailable=_no_hopper)


def _aligned(*tensors: Tensor) -> bool:
    """Whether all begin where Hopper's copies of tiles can."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def _fits_fp8(a: Tensor, b: Tensor, out: Tensor | None) -> bool:
    few = b.dim() == 2 or (b.dim() == 3 and 0 < b.shape[0] <= MOST_GROUPS)
    fits = few and b.shape[-2] % OUTPUTS == 0 and (out is None or (out.dtype is torch.bfloat16 and _aligned(out)))
    return fits and _aligned(a, b)


def _fits_int8(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and b.dim() > 1 and b.shape[-2] % OUTPUTS == 0 and _aligned(a, b)


@_hopper("fp8_gemm")
def fp8_gemm_hopper(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    if not _fits_fp8(a, b, out):
        return fp8_gemm(a, a_scale, b, b_scale, out)
    from tilery.ops.hopper import gemm

    return gemm.fp8_gemm(a, a_scale, b, b_scale, out)


@_hopper("fp8_grouped_gemm_contiguous")
def fp8_grouped_gemm_contiguous_hopper(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor | None = None
) -> Tensor:
    if not _fits_fp8(a, b, out):
        return fp8_grouped_gemm_contiguous(a, a_scale, b, b_scale, offsets, out)
    from tilery.ops.hopper import grouped_gemm

    return grouped_gemm.fp8_gemm_contiguous(a, a_scale, b, b_scale, offsets, out)


@_hopper("fp8_grouped_gemm_masked")
def fp8_grouped_gemm_masked_hopper(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor | None = None
) -> Tensor:
    if not _fits_fp8(a, b, out) or a.dim() != 3 or a.shape[1] % PIECE:
        return fp8_grouped_gemm_masked(a, a_scale, b, b_scale, counts, expected, out)
    from tilery.ops.hopper import grouped_gemm

    return grouped_gemm.fp8_gemm_masked(a, a_scale, b, b_scale, counts, expected, out)


@_hopper("int8_gemm")
def int8_gemm_hopper(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    if not _fits_int8(a, b):
        return int8_gemm(a, a_scale, b, b_scale, out)
    from tilery.ops.hopper import int8_gemm as kernels

    return kernels.int8_gemm(a, a_scale, b, b_scale, out)


@_hopper("int8_grouped_gemm")
def int8_grouped_gemm_hopper(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, groups: Tensor, out: Tensor | None = None
) -> Tensor:
    if not _fits_int8(a, b):
        return int8_grouped_gemm(a, a_scale, b, b_scale, groups, out)
    from tilery.ops.hopper import int8_gemm as kernels

    return kernels.int8_grouped_gemm(a, a_scale, b, b_scale, groups, out)


@_hopper("int8_grouped_gemm_masked")
def int8_grouped_gemm_masked_hopper(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor | None = None,
    expected: int | None = None,
) -> Tensor:  # fmt: skip
    if not _fits_int8(a, b):
        return int8_grouped_gemm_masked(a, a_scale, b, b_scale, counts, out, expected)
    from tilery.ops.hopper import int8_gemm as kernels

    return kernels.int8_grouped_gemm_masked(a, a_scale, b, b_scale, counts, out, expected)


@_hopper("pack_int4")
def pack_int4(
    weight_q: Tensor, scale: Tensor, zero: Tensor | None = None, activations: torch.dtype = torch.bfloat16
) -> Any:
    """In the order of Hopper's kernels; plain where they do not take the weight."""
    plain = products.pack_int4(weight_q, scale, zero, activations)
    if weight_q.shape[-2] % OUTPUTS or (zero is not None and activations is E4M3):
        return plain
    from tilery.ops.hopper import int4_gemm

    return int4_gemm.pack_int4(weight_q, scale, zero, activations)


@_hopper("w4a16_gemm")
def w4a16_gemm_hopper(a: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int4Weight):
        return w4a16_gemm(a, weight, out)
    from tilery.ops.hopper import int4_gemm

    return int4_gemm.w4a16_gemm(a, weight, out)


@_hopper("w4a8_gemm")
def w4a8_gemm_hopper(a: Tensor, a_scale: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int4Weight):
        return w4a8_gemm(a, a_scale, weight, out)
    from tilery.ops.hopper import int4_gemm

    return int4_gemm.w4a8_gemm(a, a_scale, weight, out)


@_hopper("w4a16_grouped_gemm_masked")
def w4a16_grouped_gemm_masked_hopper(
    a: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    if isinstance(weight, Int4Weight):
        return w4a16_grouped_gemm_masked(a, weight, counts, out, expected)
    from tilery.ops.hopper import int4_gemm

    return int4_gemm.w4a16_grouped_gemm_masked(a, weight, counts, out, expected)


@_hopper("w4a8_grouped_gemm_masked")
def w4a8_grouped_gemm_masked_hopper(
    a: Tensor, a_scale: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    if isinstance(weight, Int4Weight):
        return w4a8_grouped_gemm_masked(a, a_scale, weight, counts, out, expected)
    from tilery.ops.hopper import int4_gemm

    even = a_scale.dim() != 3 or a_scale.stride(0) == a_scale.shape[1] * a_scale.stride(1)
    return int4_gemm.w4a8_grouped_gemm_masked(
        a, a_scale if even else a_scale.contiguous(), weight, counts, out, expected
    )
