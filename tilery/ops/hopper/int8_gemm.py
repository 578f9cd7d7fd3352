"""INT8 W8A8 matrix products for Hopper: out = (a @ b^T) * a_scale[row] * b_scale[output], summed in s32.

Up to 128 rows the swapped kernel, which streams the weights once; above that the wide one (`_int8`). `choose` holds the
choices. Groups: `int8_grouped_gemm` (rows of one group follow one another in tiles of 128) and
`int8_grouped_gemm_masked` (a room of equal size for every group, filled from the front).

The kernels ask for programmatic dependent launch: the ring of the swapped one fills with weights, which no kernel
writes, while the kernel before it ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper._int_host import (
    PARTS_BYTES,
    TICKETS,
    describe,
    descriptor_type,
    output,
    processors,
    require,
    workspace,
)
from tilery.ops.hopper.variant import Variant

BLOCK = 128
"""Inputs of a unit: one row of a swizzled shared-memory tile, in bytes."""

MOST_PARTS = 4
"""Programs that share a tile: adding up more parts costs more than their help saves."""

GROUP_ROWS = 128
"""Rows of a tile of `int8_grouped_gemm`: each belongs to one group."""


@dataclass(frozen=True)
class Config:
    """One compiled form of a kernel.

    swapped: outputs are the rows of the instruction. rows, columns: of a tile, as the instruction sees them. stages: of
    the ring. warps: that multiply. per_processor: programs that run on a multiprocessor at a time; above one, registers
    are limited. raster (wide): row tiles that neighbouring programs take before the next column. dependent: ask for
    programmatic dependent launch.
    """

    swapped: bool
    rows: int
    columns: int
    stages: int
    warps: int
    per_processor: int = 1
    raster: int = 16
    dependent: bool = True

    @property
    def options(self) -> dict[str, int]:
        """Compiler options: so few registers that the programs fit, 64 Ki registers a multiprocessor."""
        if self.per_processor == 1:
            return {}
        threads = 32 * (self.warps + 4)
        return {"maxnreg": min(168, 65536 // (threads * self.per_processor) // 8 * 8)}


def choose(m: int, n: int, k: int, processors: int = 132) -> Config:
    """The configuration for out [m, n] and k inputs."""
    if m <= 128:
        return _swapped(1 << max(3, (m - 1).bit_length()))
    wide = Config(False, 128, 256, 3, 8)
    square = Config(False, 128, 128, 5, 8)
    # a square tile takes 7 % longer for the same work, but more of them fill the last wave better
    return min((wide, square), key=lambda config: _waves(config, m, n, processors) * (1.0 if config is wide else 1.07))


def _swapped(tokens: int) -> Config:
    """For up to `tokens` tokens (8 to 128) a tile."""
    return Config(True, 64, tokens, {8: 10, 16: 10, 32: 8, 64: 6, 128: 8}[tokens], 4, 1 if tokens == 128 else 2)


def _waves(config: Config, m: int, n: int, processors: int) -> int:
    """Columns that one multiprocessor computes, one tile after another."""
    tiles = -(-m // config.rows) * -(-n // config.columns)
    return -(-tiles // processors) * config.columns


@on_its_device
def int8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """out[m, n] = (sum over k of a[m, k] * b[n, k]) * a_scale[m] * b_scale[n].

    a int8 [M, K], a_scale fp32 [M] (per token), b int8 [N, K], b_scale fp32 [N] (per output channel); out [M, N] bf16,
    or what `out` is (bf16 or fp32). K a multiple of 128, N of 8. Sums are exact in s32, so the result does not depend
    on the configuration. Raises ValueError for shapes and dtypes that do not fit.

    Can be captured in a CUDA graph once it has run outside of one; graphs that hold such products share a workspace, so
    replay them one after another. b and b_scale must not be written by the kernel just before this one.
    """
    m, n, k = _operands(a, b)
    require("a_scale", a_scale, torch.float32, (m,), a)
    require("b_scale", b_scale, torch.float32, (n,), a)
    out = output(out, (m, n), a.device)
    if m == 0:
        return out
    config = config or choose(m, n, k, processors(a.device))
    if not config.swapped:
        _wide(config, a, a_scale, b, b_scale, out, n, None)
        return out
    if m > config.columns:
        raise ValueError(f"{config} is for at most {config.columns} rows, not {m}")
    from tilery.ops.hopper import _int8

    parts, tickets = workspace(a.device)
    tiles = -(-n // config.rows)
    programs = share(tiles, k // BLOCK, processors(a.device) * config.per_processor)
    if 8 * programs * config.rows * config.columns > PARTS_BYTES or tiles > TICKETS:
        raise ValueError(f"{n} outputs are too many for one product")
    _int8.swapped[(programs,)](
        describe(b, config.rows, BLOCK), describe(a, config.columns, BLOCK), a_scale, b_scale, out,
        parts.view(torch.int32), tickets, m, n, k // BLOCK, S=config.stages, num_warps=config.warps,
        launch_pdl=config.dependent, **config.options,
    )  # fmt: skip
    return out


@on_its_device
def int8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, groups: Tensor, out: Tensor | None = None
) -> Tensor:
    """`int8_gemm` where row tile i (128 rows from 128 i on) multiplies by the weights of group `groups[i]`.

    a int8 [M, K], M a multiple of 128, a_scale fp32 [M], b int8 [E, N, K], b_scale fp32 [E, N], groups int32 [M / 128],
    on the device; -1 leaves the tile's rows of `out` alone. out bf16 (or fp32) [M, N].
    """
    m, k = a.shape if a.dim() == 2 else (0, 0)
    if m % GROUP_ROWS or not m:
        raise ValueError(f"a must be int8 [M, K], M a positive multiple of {GROUP_ROWS}, not {list(a.shape)}")
    require("b", b, torch.int8, (None, None, k), a)
    n = b.shape[1]
    _operands(a, b.flatten(0, 1), n)
    require("a_scale", a_scale, torch.float32, (m,), a)
    require("b_scale", b_scale, torch.float32, (b.shape[0], n), a)
    require("groups", groups, torch.int32, (m // GROUP_ROWS,), a)
    out = output(out, (m, n), a.device)
    _wide(choose(max(m, 129), n, k, processors(a.device)), a, a_scale, b.flatten(0, 1), b_scale, out, n, groups)
    return out


@on_its_device
def int8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor | None = None,
    expected: int | None = None,
) -> Tensor:  # fmt: skip
    """out[e, m] = (a[e, m] @ b[e]^T) * a_scale[e, m] * b_scale[e] for the first counts[e] rows of every group.

    a int8 [E, R, K], a_scale fp32 [E, R], b int8 [E, N, K], b_scale fp32 [E, N], counts int32 [E] on the device, out
    bf16 (or fp32) [E, R, N], whose other rows are left alone. expected: rows that a group usually has (at most R); it
    chooses the tile, not the result.
    """
    if a.dim() != 3:
        raise ValueError(f"a must be int8 [E, R, K], not {list(a.shape)}")
    e, room, k = a.shape
    require("b", b, torch.int8, (e, None, k), a)
    n = b.shape[1]
    _operands(a.flatten(0, 1), b.flatten(0, 1), n)
    require("a_scale", a_scale, torch.float32, (e, room), a)
    require("b_scale", b_scale, torch.float32, (e, n), a)
    require("counts", counts, torch.int32, (e,), a)
    out = output(out, (e, room, n), a.device)
    if e * room == 0:
        return out
    from tilery.ops.hopper import _int8

    config = masked_config(min(expected or room, room))
    tiles = e * -(-n // config.rows)
    _int8.masked[(min(tiles, processors(a.device) * config.per_processor),)](
        describe(b.flatten(0, 1), config.rows, BLOCK), describe(a.flatten(0, 1), config.columns, BLOCK), a_scale,
        b_scale, out, counts, e, room, n, k // BLOCK, S=config.stages, num_warps=config.warps,
        launch_pdl=config.dependent, **config.options,
    )  # fmt: skip
    return out


def masked_config(expected: int) -> Config:
    """For groups of about `expected` rows: tiles that hold one and a third as many, so that most groups need one."""
    tokens = min(128, 1 << max(4, (expected * 4 // 3 - 1).bit_length()))
    return Config(True, 128, tokens, {16: 11, 32: 10, 64: 8, 128: 5}[tokens], 8)


def share(tiles: int, blocks: int, slots: int) -> int:
    """Programs for `tiles` of `blocks` units each on `slots` places: whole tiles, or each tile in equal parts, where
    that fills most places or the parts are as many as help; else as many as there are places, which then divide the
    units evenly."""
    if tiles > slots:
        waves = -(-tiles // slots)
        return slots if tiles / (waves * slots) < 0.9 else -(-tiles // waves)
    split = min(slots // tiles, blocks, MOST_PARTS)
    return tiles * split if split == MOST_PARTS or tiles * split >= 0.7 * slots else min(slots, tiles * blocks)


def _operands(a: Tensor, b: Tensor, n: int = 8) -> tuple[int, int, int]:
    """Checks a [M, K] and b [N, K]; (M, N, K). n: outputs of a group."""
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.dtype != torch.int8 or not x.is_contiguous() or not x.shape[1] or x.shape[1] % BLOCK:
            raise ValueError(
                f"{name} must be dense int8 [.., K], K a multiple of {BLOCK}, not {x.dtype} {list(x.shape)}"
            )
        if x.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")
    if a.shape[1] != b.shape[1] or a.device != b.device or a.device.type != "cuda":
        raise ValueError(f"a {list(a.shape)} on {a.device} does not fit b {list(b.shape)} on {b.device}")
    if not b.shape[0] or b.shape[0] % 8 or n % 8:
        raise ValueError(f"the number of outputs must be a positive multiple of 8, not {b.shape[0]}")
    return a.shape[0], b.shape[0], a.shape[1]


def _wide(
    config: Config, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, n: int, groups: Tensor | None
) -> None:
    from tilery.ops.hopper import _int8

    m, k = a.shape
    if out.dtype == torch.float32:  # the tile waits in shared memory to be stored: 256 columns do not fit
        config = Config(False, 128, 128, 4, 8)
    tiles = -(-m // config.rows) * -(-n // config.columns)
    _int8.wide[(min(tiles, processors(a.device)),)](
        describe(a, config.rows, BLOCK), describe(b, config.columns, BLOCK), describe(out, config.rows, config.columns),
        a_scale if groups is None else groups, a_scale, b_scale, m, n, k, S=config.stages, RASTER=config.raster,
        GROUPED=groups is not None, num_warps=config.warps, launch_pdl=config.dependent,
    )  # fmt: skip


@functools.cache
def variants() -> list[Variant]:
    """The kernels as the host functions launch them."""
    from tilery.ops.hopper import _int8

    found = []
    shared = {"a_scale": "*fp32", "b_scale": "*fp32", "N": "i32:16"}
    for config in (Config(False, 128, 256, 3, 8), Config(False, 128, 128, 5, 8)):
        for grouped in (False, True):
            signature = {
                **shared, "a_desc": _block(config.rows), "b_desc": _block(config.columns), "groups": "*i32",
                "out_desc": descriptor_type(torch.bfloat16, config.rows, config.columns), "M": "i32", "K": "i32:16",
            }  # fmt: skip
            constants = {"S": config.stages, "RASTER": config.raster, "GROUPED": grouped}
            name = f"int8-{config.rows}x{config.columns}{'-grouped' if grouped else ''}"
            found.append(_variant(name, _int8.wide, signature, constants, config))
    for tokens in (8, 16, 32, 64, 128):
        config = _swapped(tokens)
        signature = {
            **shared, "b_desc": _block(config.rows), "a_desc": _block(tokens), "out": "*bf16", "parts": "*i32",
            "tickets": "*i32", "M": "i32", "KB": "i32",
        }  # fmt: skip
        found.append(_variant(f"int8-swapped-{tokens}", _int8.swapped, signature, {"S": config.stages}, config))
    for expected in (12, 20, 40, 128):
        config = masked_config(expected)
        signature = {
            **shared, "b_desc": _block(config.rows), "a_desc": _block(config.columns), "out": "*bf16", "counts": "*i32",
            "E": "i32", "room": "i32", "KB": "i32",
        }  # fmt: skip
        found.append(_variant(f"int8-masked-{config.columns}", _int8.masked, signature, {"S": config.stages}, config))
    return found


def _block(rows: int) -> str:
    return descriptor_type(torch.int8, rows, BLOCK)


def _variant(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], config: Config) -> Variant:
    constants = {**constants, "num_warps": config.warps}
    return Variant(name, kernel, signature, constants, config.warps, config.options)
