"""What the host functions of the integer products share: TMA descriptors, a workspace, argument checks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tilery.ops.hopper._host import kept_for_ever

PARTS_BYTES = 32 << 20
"""Workspace for partial sums, per device; configurations keep below it."""

TICKETS = 16384
"""Counters per device: tiles that may be split at a time."""

WIDTHS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
}


@functools.cache
def layout(block: tuple[int, ...], dtype: torch.dtype, plain: bool) -> Any:
    """The shared-memory layout of a TMA block; `plain`: row-major without swizzle."""
    from triton.experimental.gluon import language as gl

    bits = dtype.itemsize * 8
    if plain:
        return gl.NVMMASharedLayout(0, bits, rank=len(block))
    types = {8: gl.int8, 16: gl.bfloat16, 32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), types[bits])


def describe(tensor: Tensor, *block: int, plain: bool = False) -> Any:
    """A TMA descriptor of `tensor` with that block."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block), layout(block, tensor.dtype, plain))


def descriptor_type(dtype: torch.dtype, *block: int, plain: bool = False) -> str:
    """How a variant's signature spells `describe(tensor of dtype, *block)`."""
    return f"tensordesc<{WIDTHS[dtype]}[{','.join(map(str, block))}],{layout(block, dtype, plain)!r}>"


@kept_for_ever
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(PARTS_BYTES // 4, dtype=torch.float32, device=device),
        torch.zeros(TICKETS, dtype=torch.int32, device=device),
    )


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(space for partial sums, counters that are zero between kernels). One per device: kernels that use it must follow
    one another, on one stream or in one graph at a time. Allocated by the first call, which cannot be in a capture."""
    return _workspace(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def output(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`out`, checked (dense bf16 or fp32 of `shape`), or a new bf16 tensor."""
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    if tuple(out.shape) != shape or out.dtype not in (torch.bfloat16, torch.float32) or not out.is_contiguous():
        raise ValueError(f"out must be dense bf16 or fp32 {list(shape)}, not {out.dtype} {list(out.shape)}")
    return out


def require(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], like: Tensor | None = None
) -> None:
    """Raises `ValueError` unless `tensor` is dense, of `dtype` and `shape` (None: any extent), on `like`'s device."""
    fits = len(tensor.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape))
    if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} must be dense {dtype} [{wanted}], not {tensor.dtype} {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, other operands on {like.device}")
