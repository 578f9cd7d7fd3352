"""Implementations of the operators in C++ for CPUs, fused for the small batches of decode (kernels.cpp).

Optional: without a compiler the torch implementations run. Each wrapper checks what its kernel takes (fp32 activations,
contiguous weights) and hands anything else, and large batches where a matrix library is faster, to torch.
Imports: the other operator modules, for those cases.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tilery.ops import indexer, moe, quant
from tilery.ops import linear as linears
from tilery.ops.native import build
from tilery.ops.quant import BlockWeight, Weight
from tilery.ops.registry import Operators, Platform, implementation
from tilery.tile.graph import RECORDER
from tilery.tile.targets.cpu import build as tile_build
from tilery.tile.targets.cpu import executable
from tilery.tile.targets.cpu.tape import Recording

SMALL = 32
"""Tokens up to which reading the weights dominates; above, torch's matrix product wins."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, quant.E4M3: 2}
_F32 = torch.float32


def _unavailable(platform: Platform) -> str | None:
    if platform.bf16_matmul:
        return "this CPU multiplies bf16 matrices natively; torch does"
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None


def native(of: str) -> Any:
    return implementation(of, "native", "cpu", rank=10, unavailable=_unavailable)


POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
TYPES = {"P": POINTER, "L": LONG, "I": INT}
SIGNATURES = {
    "set_threads": "PI",
    "linear": "PLLPPILLPLLLL",
    "absorb": "PLLPPILLPLLLLLL",
    "widen": "PPPLL",
    "experts": "PPPPPPPPPPPIPLLLLL",
    "select_decode": "PPPIPPLLLLL",
}
"""Arguments of the C functions, a letter each."""


class _Library:
    """The C functions as Python ones, looked up at first use. While calls are recorded (`targets.cpu.tape`) theirs are
    too."""

    def __getattr__(self, name: str) -> Any:
        library, letters = build.load(), SIGNATURES[name]
        function = getattr(library, f"tilery_{name}")
        function.argtypes = [TYPES[letter] for letter in letters]
        function.restype = None
        if name == "set_threads":
            setattr(self, name, function)
            return function
        replay = POINTER.in_dll(library, f"tilery_{name}_replay").value or 0
        pointers = [number for number, letter in enumerate(letters) if letter == "P"]

        def call(*arguments: int | None) -> None:
            recorder = RECORDER.get()
            if isinstance(recorder, Recording):
                recorder.add(replay, [value or 0 for value in arguments], pointers)
            else:
                function(*arguments)

        setattr(self, name, call)
        return call


C = _Library()
_pool_for: tuple[Operators, int] | None = None
"""What `set_threads` last set the helpers for: most steps are like the one before."""


def set_threads(ops: Operators, count: int, decoding: int | None = None) -> None:
    """CPU threads for tensor work in this process, from now on; with `decoding`, for a step that does nothing but
    decode so many tokens.

    torch's OpenMP workers go on spinning for a while after each parallel loop, on cores that the helpers of these
    kernels and of generated ones (one pool) need: in a step that is small enough for them torch gets one thread.
    """
    global _pool_for
    small = decoding is not None and decoding <= SMALL and ops.narrow_weights
    wanted = 1 if small else count
    if torch.get_num_threads() != wanted:  # torch's number is one of the calling thread
        torch.set_num_threads(wanted)
    if _pool_for is not None and _pool_for[0] is ops and _pool_for[1] == count:
        return
    if "tile" in ops.chosen.values() and ops.platform.device == "cpu":
        executable.set_threads(count)
    if ops.narrow_weights:
        C.set_threads(tile_build.pool() if tile_build.compiler() else None, count)
    _pool_for = ops, count


def records(ops: Operators) -> bool:
    """Whether small steps are nothing but C calls, which can be recorded."""
    return ops.platform.device == "cpu" and ops.narrow_weights and tile_build.compiler() is not None


def _rows(x: Tensor) -> bool:
    """fp32 rows that are dense in themselves (a stride between them is fine)."""
    return x.dtype is _F32 and x.stride(-1) == 1


def _raw(weight: Weight) -> tuple[int, int | None, int]:
    """(numbers, scales, kind) for C."""
    if isinstance(weight, BlockWeight):
        return *weight.addresses, 2
    return weight.data_ptr(), None, KINDS[weight.dtype]


def _wide(weight: Weight, x: Tensor) -> Tensor:
    """A weight for torch's own product with `x`."""
    if x.dtype is not _F32 or not isinstance(weight, BlockWeight) or not weight.values.is_contiguous():
        return linears.fitting(weight, x)
    out = torch.empty(weight.shape)
    columns = weight.shape[-1]
    C.widen(weight.values.data_ptr(), weight.scale.data_ptr(), out.data_ptr(), out.numel() // columns, columns)
    return out


def _dense(weight: Weight) -> bool:
    return weight.dense if isinstance(weight, BlockWeight) else weight.is_contiguous()


@native("linear")
def linear(x_TI: Tensor, weight_OI: Weight) -> Tensor:
    tokens, inputs = x_TI.shape
    if tokens > SMALL or not _rows(x_TI) or not _dense(weight_OI):
        return linears.linear(x_TI, _wide(weight_OI, x_TI))
    outputs = weight_OI.shape[0]
    y = torch.empty(tokens, outputs)
    numbers, scales, kind = _raw(weight_OI)
    C.linear(
        x_TI.data_ptr(), x_TI.stride(0), 0, numbers, scales, kind, 0, 0, y.data_ptr(), tokens, 1, inputs, outputs
    )  # fmt: skip
    return y


def _heads(weight_NOI: Weight) -> tuple[int, int] | None:
    """The distances between heads (numbers, scales), or None if a head is not dense in itself."""
    if isinstance(weight_NOI, BlockWeight):
        return weight_NOI.heads
    return (weight_NOI.stride(0), 0) if weight_NOI[0].is_contiguous() else None


@native("heads_linear")
def heads_linear(x_TNI: Tensor, weight_NOI: Weight) -> Tensor:
    distances = _heads(weight_NOI)
    if x_TNI.shape[0] > SMALL or not _rows(x_TNI) or distances is None:
        return linears.heads_linear(x_TNI, _wide(weight_NOI, x_TNI))
    tokens, heads, inputs = x_TNI.shape
    outputs = weight_NOI.shape[1]
    y = torch.empty(tokens, heads, outputs)
    C.linear(
        x_TNI.data_ptr(), x_TNI.stride(0), x_TNI.stride(1), *_raw(weight_NOI), *distances, y.data_ptr(),
        tokens, heads, inputs, outputs,
    )  # fmt: skip
    return y


@native("heads_absorb")
def heads_absorb(x_TNO: Tensor, weight_NOI: Weight, out_TNI: Tensor) -> None:
    distances = _heads(weight_NOI)
    if x_TNO.shape[0] > SMALL or not _rows(x_TNO) or not _rows(out_TNI) or distances is None:
        return linears.heads_absorb(x_TNO, _wide(weight_NOI, x_TNO), out_TNI)
    tokens, heads, inputs = x_TNO.shape
    C.absorb(
        x_TNO.data_ptr(), x_TNO.stride(0), x_TNO.stride(1), *_raw(weight_NOI), *distances, out_TNI.data_ptr(),
        out_TNI.stride(0), out_TNI.stride(1), tokens, heads, inputs, out_TNI.shape[2],
    )  # fmt: skip
    return None


@native("select_decode")
def select_decode(q_TND: Tensor, weight_TN: Tensor, rows: Tensor, slots_TC: Tensor, k: int) -> Tensor:
    if q_TND.dtype is not _F32 or weight_TN.dtype is not _F32:
        return indexer.select_decode_cpu(q_TND, weight_TN, rows, slots_TC, k)
    q, weights, slots = q_TND.contiguous(), weight_TN.contiguous(), slots_TC.contiguous()
    tokens, heads, dim = q.shape
    k = min(k, slots.shape[1])
    out = torch.empty(tokens, k, dtype=torch.int64)
    C.select_decode(
        q.data_ptr(), weights.data_ptr(), rows.data_ptr(), KINDS[rows.dtype], slots.data_ptr(), out.data_ptr(),
        tokens, heads, dim, slots.shape[1], k,
    )  # fmt: skip
    return out


@native("experts_swiglu")
def experts_swiglu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Weight, down_EHI: Weight,
    shared: tuple[Weight, Weight] | None = None,
) -> Tensor:  # fmt: skip
    tokens, hidden = x_TH.shape
    kept = [_raw(weight) for weight in (gate_up_EIH, down_EHI, *(shared or ()))]
    if x_TH.dtype is not _F32 or tokens > SMALL or any(one[2] != kept[0][2] for one in kept):
        return moe.experts_swiglu_cpu(
            x_TH, weights_TK, experts_TK, _wide(gate_up_EIH, x_TH), _wide(down_EHI, x_TH),
            shared and (_wide(shared[0], x_TH), _wide(shared[1], x_TH)),
        )  # fmt: skip
    x, weights, ids = x_TH.contiguous(), weights_TK.contiguous(), experts_TK.int().contiguous()
    out = torch.empty(tokens, hidden)
    matrices = [pointer for one in kept for pointer in one[:2]] + [None] * (8 - 2 * len(kept))
    C.experts(
        x.data_ptr(), weights.data_ptr(), ids.data_ptr(), *matrices, kept[0][2], out.data_ptr(),
        tokens, ids.shape[1], hidden, gate_up_EIH.shape[1] // 2, shared[1].shape[1] if shared else 0,
    )  # fmt: skip
    return out
