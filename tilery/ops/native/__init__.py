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

from tilery.ops import attention, cache, elementwise, indexer, moe
from tilery.ops import linear as linears
from tilery.ops.native import build
from tilery.ops.registry import Operators, Platform, implementation

SMALL = 32
"""Tokens up to which reading the weights dominates; above, torch's matrix product wins."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
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


POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
TYPES = {"P": POINTER, "L": LONG, "I": INT, "F": FLOAT}
SIGNATURES = {
    "set_threads": "I",
    "linear": "PLPIPLLL",
    "heads_linear": "PLLPIPLLLL",
    "rms_norm": "PLPPLLF",
    "layer_norm": "PLPPPLLF",
    "swiglu": "PPLL",
    "rope": "PLLPPPLLLI",
    "write_mla": "PLIPPLPLLLL",
    "write_index": "PIPPLLL",
    "read_mla": "PLIPPLLL",
    "read_index": "PIPPLL",
    "mla_decode": "PPLIPPLLLLLF",
    "select_decode": "PPPIPPLLLLL",
    "route": "PPPPLLLLLIF",
    "experts": "PPPPPIPLLLLL",
}
"""Arguments of the C functions, a letter each."""


class _Library:
    """The C functions with their argument types set, looked up at first use."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(build.load(), f"tilery_{name}")
        function.argtypes = [TYPES[letter] for letter in SIGNATURES[name]]
        function.restype = None
        setattr(self, name, function)
        return function


C = _Library()


def set_threads(ops: Operators, count: int, decoding: int | None = None) -> None:
    """CPU threads for tensor work in this process, from now on; with `decoding`, for a step that does nothing but
    decode so many tokens.

    torch's OpenMP workers go on spinning for a while after each parallel loop, on cores that the helpers of these
    kernels need: in a step that is small enough for these kernels torch gets one thread.
    """
    small = ops.narrow_weights and decoding is not None and decoding <= SMALL
    torch.set_num_threads(1 if small else count)
    if ops.narrow_weights:
        C.set_threads(count)


def _weight(w: Tensor) -> Tensor:
    """A weight for torch's own product with fp32 activations."""
    return w if w.dtype is _F32 else w.float()


def _rows(x: Tensor) -> bool:
    """fp32 rows that are dense in themselves (a stride between them is fine)."""
    return x.dtype is _F32 and x.stride(-1) == 1


@native("linear")
def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    tokens, inputs = x_TI.shape
    if tokens > SMALL or not _rows(x_TI) or not weight_OI.is_contiguous():
        return linears.linear(x_TI, _weight(weight_OI) if x_TI.dtype is _F32 else weight_OI)
    outputs = weight_OI.shape[0]
    y = torch.empty(tokens, outputs)
    bf16 = weight_OI.dtype is torch.bfloat16
    C.linear(x_TI.data_ptr(), x_TI.stride(0), weight_OI.data_ptr(), bf16, y.data_ptr(), tokens, inputs, outputs)
    return y


@native("heads_linear")
def heads_linear(x_TNI: Tensor, weight_NIO: Tensor) -> Tensor:
    if not _rows(x_TNI) or not weight_NIO.is_contiguous():
        return linears.heads_linear(x_TNI, _weight(weight_NIO) if x_TNI.dtype is _F32 else weight_NIO)
    tokens, heads, inputs = x_TNI.shape
    outputs = weight_NIO.shape[2]
    y = torch.empty(tokens, heads, outputs)
    bf16 = weight_NIO.dtype is torch.bfloat16
    strides = x_TNI.stride()
    C.heads_linear(
        x_TNI.data_ptr(), strides[0], strides[1], weight_NIO.data_ptr(), bf16, y.data_ptr(),
        tokens, heads, inputs, outputs,
    )  # fmt: skip
    return y


@native("rms_norm")
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    if x_TH.dim() != 2 or not _rows(x_TH) or weight_H.dtype is not _F32:
        return elementwise.rms_norm_cpu(x_TH, weight_H, eps)
    tokens, hidden = x_TH.shape
    y = torch.empty(tokens, hidden)
    C.rms_norm(x_TH.data_ptr(), x_TH.stride(0), weight_H.data_ptr(), y.data_ptr(), tokens, hidden, eps)
    return y


@native("layer_norm")
def layer_norm(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    if x_TH.dim() != 2 or not _rows(x_TH) or weight_H.dtype is not _F32 or bias_H.dtype is not _F32:
        return elementwise.layer_norm(x_TH, weight_H, bias_H, eps)
    tokens, hidden = x_TH.shape
    y = torch.empty(tokens, hidden)
    pointers = (weight_H.data_ptr(), bias_H.data_ptr(), y.data_ptr())
    C.layer_norm(x_TH.data_ptr(), x_TH.stride(0), *pointers, tokens, hidden, eps)
    return y


@native("swiglu")
def swiglu(gate_up_TI: Tensor) -> Tensor:
    if gate_up_TI.dim() != 2 or gate_up_TI.dtype is not _F32 or gate_up_TI.shape[0] > SMALL:
        return elementwise.swiglu_cpu(gate_up_TI)
    gate_up_TI = gate_up_TI.contiguous()
    tokens, width = gate_up_TI.shape
    y = torch.empty(tokens, width // 2)
    C.swiglu(gate_up_TI.data_ptr(), y.data_ptr(), tokens, width // 2)
    return y


def _rope(x: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    y = torch.empty(x.shape)
    heads = x.shape[1] if x.dim() == 3 else 1
    stride = x.stride(1) if x.dim() == 3 else 0
    C.rope(
        x.data_ptr(), x.stride(0), stride, cos_TD.data_ptr(), sin_TD.data_ptr(), y.data_ptr(),
        x.shape[0], heads, x.shape[-1], interleaved,
    )  # fmt: skip
    return y


@native("rope_interleaved")
def rope_interleaved(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    if not _rows(x_TND):
        return elementwise.rope_interleaved(x_TND, cos_TD, sin_TD)
    return _rope(x_TND, cos_TD.contiguous(), sin_TD.contiguous(), True)


@native("rope_half_split")
def rope_half_split(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    if not _rows(x_TND):
        return elementwise.rope_half_split(x_TND, cos_TD, sin_TD)
    return _rope(x_TND, cos_TD.contiguous(), sin_TD.contiguous(), False)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()


@native("write_mla")
def write_mla(rows: Tensor, slots_T: Tensor, latent_TL: Tensor, rope_TR: Tensor) -> None:
    if not _rows(latent_TL) or not _rows(rope_TR):
        return cache.write_mla(rows, slots_T, latent_TL, rope_TR)
    tokens, latent = latent_TL.shape
    rope = rope_TR.shape[1]
    width = cache.packed_mla_bytes(latent, rope) if rows.dtype is torch.uint8 else latent + rope
    if rows.shape[1] != width:
        unit = "bytes" if rows.dtype is torch.uint8 else "values"
        raise ValueError(f"a packed row of latent {latent} has {width} {unit}, the cache has {rows.shape[1]}")
    C.write_mla(
        rows.data_ptr(), _row_bytes(rows), KINDS[rows.dtype], slots_T.data_ptr(), latent_TL.data_ptr(),
        latent_TL.stride(0), rope_TR.data_ptr(), rope_TR.stride(0), tokens, latent, rope,
    )  # fmt: skip
    return None


@native("read_mla")
def read_mla(rows: Tensor, slots_T: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    if dtype is not _F32:
        return cache.read_mla_cpu(rows, slots_T, latent, dtype)
    groups = latent // cache.BLOCK
    rope = (rows.shape[1] - latent - 4 * groups) // 2 if rows.dtype is torch.uint8 else rows.shape[1] - latent
    out = torch.empty(slots_T.shape[0], latent + rope)
    C.read_mla(
        rows.data_ptr(), _row_bytes(rows), KINDS[rows.dtype], slots_T.contiguous().data_ptr(), out.data_ptr(),
        slots_T.shape[0], latent, rope,
    )  # fmt: skip
    return out


@native("write_index")
def write_index(rows: Tensor, slots_T: Tensor, keys_TD: Tensor) -> None:
    if not _rows(keys_TD):
        return cache.write_index(rows, slots_T, keys_TD)
    tokens, dim = keys_TD.shape
    C.write_index(
        rows.data_ptr(), KINDS[rows.dtype], slots_T.data_ptr(), keys_TD.data_ptr(), keys_TD.stride(0), tokens, dim
    )
    return None


@native("read_index")
def read_index(rows: Tensor, slots_T: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is not _F32:
        return cache.read_index_cpu(rows, slots_T, dtype)
    dim = cache.BLOCK if rows.dtype is torch.uint8 else rows.shape[1]
    out = torch.empty(slots_T.shape[0], dim)
    slots = slots_T.contiguous()
    C.read_index(rows.data_ptr(), KINDS[rows.dtype], slots.data_ptr(), out.data_ptr(), slots.shape[0], dim)
    return out


@native("mla_decode")
def mla_decode(q_TND: Tensor, rows: Tensor, slots_TK: Tensor, latent: int, scale: float) -> Tensor:
    if q_TND.dtype is not _F32:
        return attention.mla_decode_cpu(q_TND, rows, slots_TK, latent, scale)
    q, slots = q_TND.contiguous(), slots_TK.contiguous()
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads, latent)
    C.mla_decode(
        q.data_ptr(), rows.data_ptr(), _row_bytes(rows), KINDS[rows.dtype], slots.data_ptr(), out.data_ptr(),
        tokens, heads, slots.shape[1], latent, dim - latent, scale,
    )  # fmt: skip
    return out


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


@native("route_grouped")
def route_grouped(
    logits_TE: Tensor, bias_E: Tensor, k: int, groups: int, kept_groups: int, normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    logits, bias = logits_TE.float().contiguous(), bias_E.float().contiguous()
    tokens, experts = logits.shape
    weights, ids = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int64)
    C.route(
        logits.data_ptr(), bias.data_ptr(), weights.data_ptr(), ids.data_ptr(),
        tokens, experts, k, groups, kept_groups, normalize, factor,
    )  # fmt: skip
    return weights, ids


@native("experts_swiglu")
def experts_swiglu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Tensor, down_HEI: Tensor
) -> Tensor:
    tokens, hidden = x_TH.shape
    if x_TH.dtype is not _F32 or tokens > SMALL:
        wide = x_TH.dtype is _F32
        gate_up, down = (_weight(gate_up_EIH), _weight(down_HEI)) if wide else (gate_up_EIH, down_HEI)
        return moe.experts_swiglu_cpu(x_TH, weights_TK, experts_TK, gate_up, down)
    x, weights, ids = x_TH.contiguous(), weights_TK.contiguous(), experts_TK.contiguous()
    experts, width = gate_up_EIH.shape[0], gate_up_EIH.shape[1] // 2
    out = torch.empty(tokens, hidden)
    C.experts(
        x.data_ptr(), weights.data_ptr(), ids.data_ptr(), gate_up_EIH.data_ptr(), down_HEI.data_ptr(),
        gate_up_EIH.dtype is torch.bfloat16, out.data_ptr(), tokens, ids.shape[1], hidden, experts, width,
    )  # fmt: skip
    return out
