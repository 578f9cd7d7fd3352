"""Products with INT4 weights for Hopper: groups of 128 inputs, bf16 (W4A16) or e4m3 (W4A8) activations, few tokens.

    w[o, i] = (q[o, i] - zero[o, i / 128]) * scale[o, i / 128]      q in 0 .. 15; symmetric: zero = 0, q in -8 .. 7

`pack_int4` puts weights into the order of the kernels (`_int4`), which is another one for each activation type.
`w4a16_gemm` and `w4a8_gemm` stream the weights once for every 64 tokens; the grouped products take experts of equal
room, filled from the front. `choose` and `choose_masked` hold the choices.

The kernels ask for programmatic dependent launch: the dense ones fill their rings with weights, which no kernel
writes, while the kernel before them ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper._int_host import describe, descriptor_type, output, processors, workspace
from tilery.ops.hopper.int8_gemm import share
from tilery.ops.hopper.variant import Variant
from tilery.ops.quant import E4M3

GROUP = 128
"""Inputs that share a scale."""

ROWS = 64
"""Outputs of a packed unit."""

PANEL = {2: 128, 3: 256}
"""What the outputs are padded to, by the dimensions of a weight: the most rows of a tile."""

WAYS = 2
"""Warpgroups that take turns at a dense tile's blocks; the stages of a ring are a multiple."""

MOST = 64
"""Tokens of the widest dense tile."""


@dataclass(frozen=True)
class Int4Weight:
    """A packed weight of `shape` [O, I] or [E, O, I].

    packed int32: units of 64 outputs by 128 inputs, 4 KiB each. One matrix: [P / 64, 4 I / 128, 256], P = O rounded up
    to 128. Experts: [E * P / 256 * I / 128 * 16, 256], P = O rounded up to 256; the four units of 256 outputs lie
    together, so that a tile's block of 128 inputs is 16 KiB at a stretch. scale bf16 or fp32 [(E *) I / 128 * P],
    outputs contiguous. zero bf16 like scale, 128 + the zero point, or None where symmetric. activations: what it
    multiplies, bf16 or e4m3.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, ...]
    activations: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        """Outputs, rounded up to what is stored."""
        panel = PANEL[len(self.shape)]
        return -(-self.shape[-2] // panel) * panel


@dataclass(frozen=True)
class Config:
    """One compiled form of a kernel. tokens, rows: of a tile. stages: of the ring. per_processor: programs that a
    multiprocessor gets (dense: two fit where `limit` is set, so that the next kernel's can begin to load). registers:
    of a thread that multiplies. limit: of registers at launch; 0: none. dependent: ask for programmatic dependent
    launch."""

    tokens: int
    rows: int
    stages: int
    per_processor: int
    registers: int
    limit: int
    dependent: bool = True

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        return {"maxnreg": self.limit} if self.limit else {}


def choose(m: int, n: int, processors: int = 132) -> Config:
    """For `m` tokens (at most 64) and `n` outputs."""
    tokens = 1 << max(3, (m - 1).bit_length())
    if tokens == 64:
        return Config(tokens, ROWS, 6, 1, 160, 0)
    if tokens <= 16 and n >= 128 * processors:  # whole tiles for everyone
        return Config(tokens, 128, {8: 8, 16: 6}[tokens], 2, 104, 80)
    return Config(tokens, ROWS, {8: 10, 16: 8, 32: 6}[tokens], 2, 80, 80)


def choose_masked(expected: int, activations: torch.dtype) -> Config:
    """For groups of about `expected` tokens: tiles that hold one and a third as many, so that most groups need one."""
    tokens = min(64, 1 << max(3, (expected * 4 // 3 - 1).bit_length()))
    rows = 256 if tokens < 64 else 128
    stage = rows * 64 + tokens * GROUP * activations.itemsize + rows * 4 * 2
    return Config(tokens, rows, min(7, 200_000 // stage), 1, 168, 0)


# ---- packing -------------------------------------------------------------------------------------------------------


@functools.cache
def _places(fp8: bool) -> Tensor:
    """For each byte of a unit, row * 128 + input of its low nibble's weight; int64 [4096]."""
    from tilery.ops.hopper import _int4

    byte, place = torch.arange(ROWS * GROUP // 2), torch.zeros(ROWS * GROUP // 2, dtype=torch.int64)
    for bit, (row, column) in enumerate(_int4.order(fp8)):
        place += (byte >> bit & 1) * (row * GROUP + column)
    return place


def _nibbles(fp8: bool) -> list[tuple[int, int]]:
    """Which (half, byte of the word) lies in nibbles 0 to 7 of a word; half 1: 64 inputs further on."""
    if fp8:
        return [(half, byte) for byte in range(4) for half in range(2)]
    return [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]


def pack_int4(
    weight_q: Tensor, scale: Tensor, zero: Tensor | None = None, activations: torch.dtype = torch.bfloat16
) -> Int4Weight:
    """Quantised weights -> what the kernels read.

    weight_q: integers [O, I] or [E, O, I], I a multiple of 128, O of 8; in -8 .. 7, or with `zero` in 0 .. 15. scale
    bf16 or fp32 [..., O, I / 128]. zero: integers in 0 .. 15, like scale; bf16 activations only. Raises ValueError for
    what does not fit. Any device; the result is on the same one.
    """
    if activations not in (torch.bfloat16, E4M3) or (zero is not None and activations == E4M3):
        raise ValueError(f"{activations} activations{' with zeros' if zero is not None else ''} are not supported")
    if weight_q.dim() not in (2, 3) or not weight_q.numel() or weight_q.shape[-1] % GROUP or weight_q.shape[-2] % 8:
        raise ValueError(f"weights must be [.., O, I], O a multiple of 8, I of {GROUP}, not {list(weight_q.shape)}")
    *_, outputs, inputs = weight_q.shape
    per_group = (*weight_q.shape[:-1], inputs // GROUP)
    if tuple(scale.shape) != per_group or scale.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"scale must be bf16 or fp32 {list(per_group)}, not {scale.dtype} {list(scale.shape)}")
    if zero is not None and (tuple(zero.shape) != per_group or int(zero.min()) < 0 or int(zero.max()) > 15):
        raise ValueError(f"zero must be {list(per_group)} in 0 .. 15")
    low = -8 if zero is None else 0
    if int(weight_q.min()) < low or int(weight_q.max()) > low + 15:
        raise ValueError(f"weights must be in {low} .. {low + 15}")
    fp8 = activations == E4M3
    panel = PANEL[weight_q.dim()]
    packed = torch.cat([_pack(q, panel, fp8, zero is None) for q in weight_q.reshape(-1, outputs, inputs)])
    if weight_q.dim() == 3:
        packed = packed.view(-1, panel // ROWS, inputs // GROUP, 4, 256).transpose(1, 2).reshape(-1, 256)

    def by_group(x: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(x.reshape(-1, outputs, inputs // GROUP), (0, 0, 0, -outputs % panel))
        return rows.transpose(1, 2).contiguous().flatten()

    zeros = None if zero is None else by_group(zero.to(torch.bfloat16) + 128)
    return Int4Weight(packed, by_group(scale), zeros, tuple(weight_q.shape), activations)


def _pack(q: Tensor, panel: int, fp8: bool, symmetric: bool) -> Tensor:
    """Integers [O, I] -> int32 [P / 64, 4 I / 128, 256], P = O rounded up to `panel`."""
    outputs, inputs = q.shape
    code = q.to(torch.int32)
    if fp8:
        code = torch.where(code < 0, 7 - code, code)  # sign and magnitude, less one if negative
    elif symmetric:
        code = code + 8
    code = torch.nn.functional.pad(code, (0, 0, 0, -outputs % panel))
    units = code.view(-1, ROWS, inputs // GROUP, GROUP).transpose(1, 2).flatten(2)
    place = _places(fp8).to(q.device)
    halves = [units[..., place + shift].unflatten(-1, (-1, 4)) for shift in (0, GROUP // 2)]
    words = torch.zeros_like(halves[0][..., 0])
    for nibble, (half, byte) in enumerate(_nibbles(fp8)):
        words |= halves[half][..., byte] << (4 * nibble)
    return words.reshape(-1, 4 * inputs // GROUP, 256)


def unpack_int4(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pack_int4` was given: (weights int8, scale, zero int8 or None)."""
    *_, outputs, inputs = weight.shape
    fp8 = weight.activations == E4M3
    words = weight.packed
    if len(weight.shape) == 3:
        words = words.view(-1, inputs // GROUP, PANEL[3] // ROWS, ROWS * GROUP // 8).transpose(1, 2)
    words = words.reshape(-1, inputs // GROUP, ROWS * GROUP // 8)
    place = _places(fp8).to(words.device).view(-1, 4)
    units = torch.zeros(*words.shape[:2], ROWS * GROUP, dtype=torch.int32, device=words.device)
    for nibble, (half, byte) in enumerate(_nibbles(fp8)):
        units[..., place[:, byte] + half * GROUP // 2] = words >> (4 * nibble) & 15
    if fp8:
        units = torch.where(units > 7, 7 - units, units)
    elif weight.zero is None:
        units = units - 8
    rows = units.unflatten(-1, (ROWS, GROUP)).transpose(1, 2).reshape(-1, weight.rows, inputs)

    def by_row(x: Tensor) -> Tensor:
        columns = x.view(-1, inputs // GROUP, weight.rows).transpose(1, 2)[:, :outputs]
        return columns.reshape(*weight.shape[:-1], inputs // GROUP)

    zero = None if weight.zero is None else (by_row(weight.zero).float() - 128).to(torch.int8)
    return rows[:, :outputs].reshape(weight.shape).to(torch.int8), by_row(weight.scale), zero


# ---- products ------------------------------------------------------------------------------------------------------


@on_its_device
def w4a16_gemm(a: Tensor, weight: Int4Weight, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """out = a @ w^T: a bf16 [M, K], `weight` packed for bf16 of shape [N, K]; out [M, N] bf16, or what `out` is (bf16
    or fp32). Every 64 tokens stream the weights anew.

    Deterministic. Can be captured in a CUDA graph once it has run outside of one; graphs that hold such products share
    a workspace, so replay them one after another. The weight must not be written by the kernel just before this one.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    _check(a, weight, torch.bfloat16, 2)
    return _dense(a, None, weight, out, config)


@on_its_device
def w4a8_gemm(
    a: Tensor, a_scale: Tensor, weight: Int4Weight, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """`w4a16_gemm` with a e4m3 [M, K] times a_scale fp32 [M, K / 128], in any layout; `weight` packed for e4m3."""
    _check(a, weight, E4M3, 2)
    _check_scale(a, a_scale)
    return _dense(a, a_scale, weight, out, config)


@on_its_device
def w4a8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, weight: Int4Weight, counts: Tensor, out: Tensor | None = None,
    expected: int | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out[e, m] = (a[e, m] * a_scale[e, m]) @ w[e]^T for the first counts[e] rows of every expert.

    a e4m3 [E, R, K], a_scale fp32 [E, R, K / 128] whose experts and rows lie evenly (any layout with stride(0) = R *
    stride(1)), `weight` packed for e4m3 of shape [E, N, K], counts int32 [E] on the device; out [E, R, N] bf16, or what
    `out` is, whose other rows are left alone. expected: tokens that an expert usually has (at most R, which is what is
    taken if it is not given); it chooses the tile, not the result. Capture and errors: see `w4a16_gemm`.
    """
    _check(a, weight, E4M3, 3)
    _check_scale(a, a_scale)
    if a_scale.stride(0) != a_scale.shape[1] * a_scale.stride(1):
        raise ValueError(f"a_scale must have stride(0) = rows * stride(1), not strides {a_scale.stride()}")
    return _masked(a, a_scale, weight, counts, out, expected, config)


@on_its_device
def w4a16_grouped_gemm_masked(
    a: Tensor, weight: Int4Weight, counts: Tensor, out: Tensor | None = None, expected: int | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`w4a8_grouped_gemm_masked` with a bf16 [E, R, K] and `weight` packed for bf16."""
    _check(a, weight, torch.bfloat16, 3)
    return _masked(a, None, weight, counts, out, expected, config)


def _check(a: Tensor, weight: Int4Weight, dtype: torch.dtype, dimensions: int) -> None:
    if weight.activations != dtype or len(weight.shape) != dimensions:
        raise ValueError(
            f"the weight {list(weight.shape)} is packed for {weight.activations}, not for {dtype} "
            f"in {dimensions} dimensions"
        )
    if a.dtype != dtype or a.dim() != dimensions or not a.is_contiguous() or a.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"a must be dense {dtype} in {dimensions} dimensions, the last {weight.shape[-1]}, "
            f"not {a.dtype} {list(a.shape)}"
        )
    if dimensions == 3 and a.shape[0] != weight.shape[0]:
        raise ValueError(f"a has {a.shape[0]} experts, the weight {weight.shape[0]}")
    if a.device != weight.packed.device or a.device.type != "cuda" or a.data_ptr() % 16:
        raise ValueError(f"a, on {a.device}, must lie at a multiple of 16 bytes on the weight's GPU")


def _check_scale(a: Tensor, a_scale: Tensor) -> None:
    expected = (*a.shape[:-1], a.shape[-1] // GROUP)
    if tuple(a_scale.shape) != expected or a_scale.dtype != torch.float32 or a_scale.device != a.device:
        raise ValueError(f"a_scale must be fp32 {list(expected)}, not {a_scale.dtype} {list(a_scale.shape)}")


def _descriptors(a: Tensor, weight: Int4Weight, config: Config) -> tuple[Any, ...]:
    zero = weight.scale if weight.zero is None else weight.zero
    block = (config.rows // ROWS, 4, 256) if len(weight.shape) == 2 else (config.rows // 16, 256)
    return (
        describe(weight.packed, *block, plain=True), describe(a, config.tokens, GROUP),
        describe(weight.scale, config.rows, plain=True), describe(zero, config.rows, plain=True),
    )  # fmt: skip


def _dense(a: Tensor, a_scale: Tensor | None, weight: Int4Weight, out: Tensor | None, config: Config | None) -> Tensor:
    from tilery.ops.hopper import _int4

    (m, k), n = a.shape, weight.shape[0]
    out = output(out, (m, n), a.device)
    if config and m > config.tokens:
        raise ValueError(f"{config} is for at most {config.tokens} tokens, not {m}")
    parts, tickets = workspace(a.device)
    for first in range(0, m, MOST):
        rows = slice(first, min(m, first + MOST))
        some, to = a[rows], out[rows]
        here = config or choose(rows.stop - first, n, processors(a.device))
        scale = parts if a_scale is None else a_scale[rows]
        tiles = -(-n // here.rows)
        programs = share(tiles, k // GROUP, processors(a.device) * here.per_processor)
        if 2 * programs * here.rows * here.tokens > parts.numel() or tiles > tickets.numel():
            raise ValueError(f"{n} outputs are too many for one product")
        _int4.dense[(programs,)](
            *_descriptors(some, weight, here), scale, *(scale.stride() if a_scale is not None else (0, 0)), to, parts,
            tickets, some.shape[0], n, weight.rows, k // GROUP, ASYMMETRIC=weight.zero is not None, WAYS=WAYS,
            S=here.stages, REGISTERS=here.registers, num_warps=4, launch_pdl=here.dependent,
            **here.options,
        )  # fmt: skip
    return out


def _masked(
    a: Tensor, a_scale: Tensor | None, weight: Int4Weight, counts: Tensor, out: Tensor | None, expected: int | None,
    config: Config | None,
) -> Tensor:  # fmt: skip
    from tilery.ops.hopper import _int4

    (e, room, k), n = a.shape, weight.shape[1]
    if tuple(counts.shape) != (e,) or counts.dtype != torch.int32 or counts.device != a.device or counts.stride(0) != 1:
        raise ValueError(f"counts must be int32 [{e}], dense, on {a.device}, not {counts.dtype} {list(counts.shape)}")
    out = output(out, (e, room, n), a.device)
    if room == 0:
        return out
    config = config or choose_masked(min(expected or room, room), a.dtype)
    flat = a.flatten(0, 1)
    scale = weight.scale if a_scale is None else a_scale
    _int4.masked[(masked_programs(e * -(-n // config.rows), processors(a.device) * config.per_processor),)](
        *_descriptors(flat, weight, config), scale, *(scale.stride()[1:] if a_scale is not None else (0, 0)), out,
        counts, e, room, n, weight.rows, k // GROUP, ASYMMETRIC=weight.zero is not None, S=config.stages,
        REGISTERS=config.registers, num_warps=4, launch_pdl=config.dependent, **config.options,
    )  # fmt: skip
    return out


def masked_programs(tiles: int, slots: int) -> int:
    """As few programs as finish `tiles` in the same number of waves: they move in step, which the memory likes."""
    return -(-tiles // -(-tiles // slots))


# ---- compiling without a GPU ---------------------------------------------------------------------------------------


@functools.cache
def variants() -> list[Variant]:
    """The kernels as the host functions launch them."""
    from tilery.ops.hopper import _int4

    found = []
    for m, n, activations, asymmetric in (
        (1, 4096, torch.bfloat16, False), (16, 4096, torch.bfloat16, False), (16, 4096, torch.bfloat16, True),
        (16, 24576, torch.bfloat16, False), (16, 24576, torch.bfloat16, True), (32, 4096, torch.bfloat16, False),
        (64, 4096, torch.bfloat16, False), (16, 4096, E4M3, False),
        (16, 24576, E4M3, False), (64, 4096, E4M3, False),
    ):  # fmt: skip
        config = choose(m, n)
        signature = _signature(config, activations, 2) | {"parts": "*fp32", "tickets": "*i32", "M": "i32"}
        constants = {"ASYMMETRIC": asymmetric, "WAYS": WAYS}
        name = f"{_kind(activations, asymmetric)}-{config.rows}x{config.tokens}"
        found.append(_variant(name, _int4.dense, signature, constants, config))
    for expected, activations, asymmetric in (
        (20, E4M3, False), (40, E4M3, False), (20, torch.bfloat16, False), (20, torch.bfloat16, True)
    ):  # fmt: skip
        config = choose_masked(expected, activations)
        scale = torch.float32 if activations == E4M3 else torch.bfloat16  # both are taken by all
        signature = _signature(config, activations, 3, scale) | {"counts": "*i32", "E": "i32", "room": "i32"}
        name = f"{_kind(activations, asymmetric)}-masked-{config.rows}x{config.tokens}"
        found.append(_variant(name, _int4.masked, signature, {"ASYMMETRIC": asymmetric}, config))
    return found


def _kind(activations: torch.dtype, asymmetric: bool) -> str:
    return f"w4a{activations.itemsize * 8}{'-asymmetric' if asymmetric else ''}"


def _signature(
    config: Config, activations: torch.dtype, dimensions: int, scale: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    block = (config.rows // ROWS, 4, 256) if dimensions == 2 else (config.rows // 16, 256)
    per_row = descriptor_type(scale, config.rows, plain=True)
    return {
        "w_desc": descriptor_type(torch.int32, *block, plain=True),
        "a_desc": descriptor_type(activations, config.tokens, GROUP), "scale_desc": per_row, "zero_desc": per_row,
        "a_scale": "*fp32", "a_scale_m": "i32", "a_scale_k": "i32", "out": "*bf16", "N": "i32:16", "NP": "i32:16",
        "KB": "i32",
    }  # fmt: skip


def _variant(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], config: Config) -> Variant:
    constants = {**constants, "S": config.stages, "REGISTERS": config.registers, "num_warps": 4}
    return Variant(name, kernel, signature, constants, 4, config.options)
