"""FP8 block matrix product for Hopper: out = a @ b^T with 1x128 scales of a and 128x128 scales of b.

Up to 64 rows the kernel is swapped (weights are the rows of the tensor-core instruction), and its work cut along the
inputs where tiles are fewer than processors; above that tiles are 128 to 256 rows tall. `choose` holds the choices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper.variant import Variant
from tilery.ops.quant import BLOCK, E4M3

PIECE = 64
"""Rows of one tensor-core instruction."""
ALIGN = 4
"""fp32 scales per 16 bytes: what TMA wants rows of scales to be a multiple of."""


@dataclass(frozen=True)
class Config:
    """One compiled form of the kernel (`_common`).

    swap: outputs, not tokens, are the rows of the tensor-core instruction. pieces: of 64 rows in a tile. height: pieces
    a warpgroup multiplies. width: the other side of a tile. stages: of the ring. split: tiles may be cut along the
    inputs, all of them into `ways` parts, or (ways 0) those that full waves leave over. raster: row tiles that
    neighbouring programs take before the next column (negative: column tiles before the next row). burst: stages filled
    at once. turns: two warpgroups multiply in turn. columns: of a piece stored at once.
    """

    swap: bool
    pieces: int
    height: int
    width: int
    stages: int
    split: bool = False
    ways: int = 0
    raster: int = 8
    burst: int = 1
    turns: int = 0
    columns: int = 128

    def __post_init__(self) -> None:
        if (
            self.width not in ((32, 64) if self.swap else (128,))
            or self.pieces % self.height
            or self.columns not in (64, 128)
        ):
            raise ValueError(f"no kernel for {self}")
        if self.stages % self.burst or (self.turns and self.pieces // self.height != 2):
            raise ValueError(f"a ring of whole bursts, turns of two warpgroups: not {self}")

    @property
    def tile(self) -> tuple[int, int]:
        """(tokens, outputs) of a tile."""
        return (self.width, PIECE * self.pieces) if self.swap else (PIECE * self.pieces, self.width)

    def parts(self, tiles: int, programs: int) -> int:
        """At most how many fp32 numbers a product of so many tiles leaves in the workspace."""
        return (tiles * self.ways or programs) * PIECE * self.pieces * self.width if self.split else 0


FEW = Config(swap=True, pieces=1, height=1, width=64, stages=12, split=True)
"""Up to 64 tokens, 64 outputs a tile."""
FEWER = Config(swap=True, pieces=1, height=1, width=32, stages=16, split=True)
MEDIUM = Config(swap=False, pieces=2, height=1, width=128, stages=5)
"""128 x 128."""
TALL = Config(swap=False, pieces=3, height=1, width=128, stages=4, raster=4)
"""192 x 128, one piece for each of three warpgroups."""
LARGE = Config(swap=False, pieces=4, height=2, width=128, stages=4, turns=2, columns=64)
"""256 x 128: the least traffic from L2 a product."""
LARGE_SHALLOW = replace(LARGE, stages=3, turns=0, columns=128)
"""For few inputs: a stage less, so that a whole piece is stored at once."""

PROCESSORS = 132
"""Of an H100 or H200 SXM, for which configurations are chosen."""
COST = {MEDIUM: 1.07, TALL: 1.02, LARGE: 1.0}
"""Time a piece, relative, of long products on an H100 (docs/notes/hopper_gemm.md)."""


def choose(m: int, n: int, k: int) -> Config:
    """The configuration for out [m, n] and k inputs: what full and partial waves of its tiles take least time."""
    if m <= PIECE:
        return FEW if m > FEWER.width else FEWER

    def waves_of_pieces(config: Config) -> float:
        return -(-tiles(config, m, n) // PROCESSORS) * config.pieces * COST[config]

    best = min(COST, key=waves_of_pieces)
    if best == MEDIUM and 2 * tiles(best, m, n) <= PROCESSORS:
        return replace(best, split=True)
    if best == LARGE:
        return LARGE_SHALLOW if k <= 2048 else LARGE if k >= 8192 else replace(LARGE, raster=-16)
    return best


def tiles(config: Config, m: int, n: int) -> int:
    """Tiles of out [m, n]."""
    tokens, outputs = config.tile
    return -(-m // tokens) * -(-n // outputs)


def align_scales(scales: Tensor) -> Tensor:
    """Scales of rows, fp32 [R, K/128] in any layout -> the same numbers with the rows contiguous: strides (1, R rounded
    up to 4), as `fp8_gemm` reads them. No copy where they lie so already."""
    rows, blocks = scales.shape
    aligned = scales.stride(1) % ALIGN == 0 and scales.data_ptr() % 16 == 0
    if scales.stride(0) == 1 and scales.stride(1) >= rows and aligned:
        return scales
    padded = scales.new_empty(blocks, -(-rows // ALIGN) * ALIGN)
    padded[:, :rows] = scales.T
    return padded[:, :rows].T


@on_its_device
def fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """out[m, n]: over blocks of 128 inputs, the sum of a[m, .] @ b[n, .] * a_scale[m, block] * b_scale[n / 128, block].

    a e4m3 [M, K], a_scale fp32 [M, K/128], b e4m3 [N, K], b_scale fp32 [ceil(N/128), K/128], out bf16 [M, N]; K a
    multiple of 128, N of 8. a_scale is read with the rows contiguous (`align_scales`; any other layout is copied), so
    let the quantiser write it so. Deterministic. Raises ValueError for shapes and dtypes that do not fit.

    Can be captured in a CUDA graph once it has run outside of one; graphs that hold such products share a workspace, so
    replay them one after another.
    """
    m, k = _operands("a", a, a_scale)
    n, blocks = b.shape[0], k // BLOCK
    if b.dim() != 2 or b.shape[1] != k or b.dtype != E4M3 or not b.is_contiguous() or n % 8:
        raise ValueError(f"b must be dense e4m3 [N, {k}] with N a multiple of 8, not {b.dtype} {list(b.shape)}")
    rows = -(-n // BLOCK)
    if tuple(b_scale.shape) != (rows, blocks) or b_scale.dtype != torch.float32 or not b_scale.is_contiguous():
        raise ValueError(f"b_scale must be dense fp32 [{rows}, {blocks}], not {b_scale.dtype} {list(b_scale.shape)}")
    out = output(out, (m, n), a)
    if m:
        config = config or choose(m, n, k)
        launch(config, a, align_scales(a_scale), b, b_scale, out, n, tiles(config, m, n))
    return out


def _operands(name: str, x: Tensor, scale: Tensor) -> tuple[int, int]:
    """Checks an activation and its scales; its shape."""
    if x.dim() != 2 or x.dtype != E4M3 or not x.is_contiguous() or x.shape[1] % BLOCK or not x.shape[1]:
        raise ValueError(f"{name} must be dense e4m3 [rows, K], K a multiple of {BLOCK}, not {x.dtype} {list(x.shape)}")
    rows, k = x.shape
    if tuple(scale.shape) != (rows, k // BLOCK) or scale.dtype != torch.float32:
        raise ValueError(f"{name}_scale must be fp32 [{rows}, {k // BLOCK}], not {scale.dtype} {list(scale.shape)}")
    return rows, k


def output(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out` if it fits, else a new bf16 tensor."""
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=like.device)
    if tuple(out.shape) != shape or out.dtype != torch.bfloat16 or not out.is_contiguous() or out.device != like.device:
        raise ValueError(f"out must be dense bf16 {list(shape)} on {like.device}, not {out.dtype} {list(out.shape)}")
    return out


@dataclass(frozen=True)
class _Workspace:
    """Partial sums and arrival counts of split tiles; the kernel leaves the counts at zero."""

    parts: Tensor
    arrivals: Tensor


_workspaces: dict[tuple[int, int], _Workspace] = {}
PARTS = 132 * 256 * 128
"""fp32 numbers for partial sums: a part of 256 x 128 for each of 132 programs, 17 MB."""
ARRIVALS = 1 << 18
"""Pieces that may be split: 1 MB."""


def workspace(device: torch.device) -> _Workspace:
    """The workspace of the current stream; while a graph is captured, the one that all graphs of the device share."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    capturing = torch.cuda.is_current_stream_capturing()
    key = (index, -1 if capturing else torch.cuda.current_stream(device).cuda_stream)
    if key not in _workspaces:
        if capturing:
            raise RuntimeError("no workspace yet: run an FP8 product once before capturing one in a graph")
        for each in {key, (index, -1)} - _workspaces.keys():
            _workspaces[each] = _Workspace(
                torch.empty(PARTS, dtype=torch.float32, device=device),
                torch.zeros(ARRIVALS, dtype=torch.int32, device=device),
            )
    return _workspaces[key]


@functools.cache
def processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _layout(box: tuple[int, int], dtype: str) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, dtype))


def _descriptor(x: Tensor, box: tuple[int, int], dtype: str) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), _layout(box, dtype))


def boxes(config: Config) -> dict[str, tuple[tuple[int, int], str]]:
    """What TMA moves at once, of each argument: (shape, dtype)."""
    rows = PIECE * config.pieces if config.pieces & (config.pieces - 1) == 0 else PIECE
    wide, tall = (config.width, BLOCK), (rows, BLOCK)
    return {
        "token_desc": (wide if config.swap else tall, "float8e4nv"),
        "token_scale_desc": ((1, config.width if config.swap else rows), "float32"),
        "weight_desc": (tall if config.swap else wide, "float8e4nv"),
        "out_desc": ((config.width, PIECE) if config.swap else (PIECE, config.columns), "bfloat16"),
    }


def constants(config: Config, groups: int) -> dict[str, Any]:
    """The kernel's compile-time arguments; groups 0 for a plain product."""
    return {
        "PIECES": config.pieces, "HEIGHT": config.height, "S": config.stages, "SWAP": config.swap,
        "GP": max(32, 1 << (groups - 1).bit_length()) if groups else 0,
        "RASTER": config.raster, "SPLIT": config.split, "BURST": config.burst, "TURNS": config.turns,
    }  # fmt: skip


def launch(
    config: Config, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, n: int, count: int,
    starts: Tensor | None = None, stops: Tensor | None = None, spacing: int = 0, groups: int = 0,
) -> None:  # fmt: skip
    """Runs the kernel on checked operands: a [rows, K], a_scale [rows, K/128] with rows contiguous, b [groups * N, K].

    count: at most how many tiles there are. For `starts` and the rest see `_common.fp8_block_gemm`.
    """
    from tilery.ops.hopper._common import fp8_block_gemm

    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device)[0] != 9:
        raise ValueError(f"these products run on Hopper GPUs only, not on {a.device}")
    space = workspace(a.device)
    tensors = {"token_desc": a, "token_scale_desc": a_scale.T, "weight_desc": b, "out_desc": out}
    described = {name: _descriptor(tensors[name], *box) for name, box in boxes(config).items()}
    nothing = space.arrivals
    blocks = a.shape[1] // BLOCK
    programs = min(processors(a.device.index), count * (config.ways or blocks) if config.split else count)
    if config.parts(count, programs) > PARTS:
        raise ValueError(f"{config} needs more workspace than there is")
    fp8_block_gemm[(programs,)](
        described["token_desc"], described["token_scale_desc"], described["weight_desc"], b_scale,
        described["out_desc"], space.parts, space.arrivals, nothing if starts is None else starts,
        nothing if stops is None else stops, spacing, max(groups, 1), a.shape[0], n, blocks, config.ways,
        **constants(config, groups), num_warps=4,
    )  # fmt: skip


def variant(name: str, config: Config, groups: int = 0) -> Variant:
    """One configuration for compiling without a GPU."""
    from tilery.ops.hopper._common import fp8_block_gemm

    short = {"float8e4nv": "fp8e4nv", "float32": "fp32", "bfloat16": "bf16"}
    signature = {
        key: f"tensordesc<{short[dtype]}[{box[0]},{box[1]}],{_layout(box, dtype)!r}>"
        for key, (box, dtype) in boxes(config).items()
    }
    signature |= {"weight_scale": "*fp32", "parts": "*fp32", "arrivals": "*i32", "starts": "*i32", "stops": "*i32"}
    signature |= dict.fromkeys(("spacing", "groups", "M", "N", "KB", "ways"), "i32")
    return Variant(name, fp8_block_gemm, signature, {**constants(config, groups), "num_warps": 4}, 4)


def variants() -> list[Variant]:
    """Every configuration that `choose` returns."""
    shapes = [
        (m, n, k) for m in (1, 64, 100, 4096) for n, k in ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168))
    ]
    chosen = {choose(*shape): shape for shape in reversed(shapes)}
    return [variant("fp8_gemm_{}x{}x{}".format(*shape), config) for config, shape in chosen.items()]


def reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The product in float64: what `fp8_gemm` approximates, before its rounding to bf16. Any device."""
    return _widen(a, a_scale, 1) @ _widen(b, b_scale, BLOCK).T


def _widen(x: Tensor, scale: Tensor, rows: int) -> Tensor:
    scale = scale.double().repeat_interleave(rows, 0)[: x.shape[0]].repeat_interleave(BLOCK, 1)
    return x.double() * scale
