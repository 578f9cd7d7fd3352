"""Helpers written in the language itself: plain functions of tiles that every target runs without knowing them.

They add no operation, so reading one also shows how to write the next. Shapes are as the docstrings say; `axis` may be
negative; float results are f32 unless said otherwise (cast the result to store it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilery.tile.builder import fail
from tilery.tile.dtypes import DType, b1, e4m3, f32, i8, i32, i64, u8
from tilery.tile.functions import ELEMENTWISE, argmax, dot, join, max, mean, sort, split, sum
from tilery.tile.lang import Number, Tile, arange, full, maximum, minimum, where
from tilery.tile.size import Size, as_size

_exp, _log, _sqrt, _rsqrt = (ELEMENTWISE[n] for n in ("exp", "log", "sqrt", "rsqrt"))
_abs, _round, _floor, _ceil = (ELEMENTWISE[n] for n in ("abs", "round", "floor", "ceil"))
_sigmoid, _tanh, _erf, _cos = (ELEMENTWISE[n] for n in ("sigmoid", "tanh", "erf", "cos"))
Axes = int | tuple[int, ...]


def _float(x: Tile) -> Tile:
    return x if x.dtype.is_float and x.dtype.bits >= 32 else x.to(f32)


def _static(extent: Any, what: str) -> int:
    if not isinstance(extent, Size) or extent.const is None:
        raise fail(f"{what} must be a number known while tracing, got {extent}")
    return extent.const


# --- elementwise ------------------------------------------------------------------------------------------------


def relu(x: Tile) -> Tile:
    """max(x, 0); the dtype of `x`."""
    return maximum(x, 0)


def leaky_relu(x: Tile, slope: Number = 0.01) -> Tile:
    return where(x > 0, x, x * slope)


def prelu(x: Tile, weight: Tile) -> Tile:
    """Leaky ReLU with learned slopes that broadcast against `x`."""
    return where(x > 0, x, x * weight)


def silu(x: Tile) -> Tile:
    """x * sigmoid(x), in f32."""
    x = _float(x)
    return x * _sigmoid(x)


def gelu(x: Tile, approximate: str = "none") -> Tile:
    """x * Phi(x), in f32; `approximate="tanh"` as in torch."""
    x = _float(x)
    if approximate == "tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if approximate != "none":
        raise fail(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))


def clip(x: Tile, low: Any = None, high: Any = None) -> Tile:
    """`x` limited to [low, high]; either may be absent."""
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


def axpy(a: Any, x: Tile, y: Tile) -> Tile:
    """a * x + y."""
    return a * x + y


def erfc(x: Tile) -> Tile:
    """1 - erf(x): loses relative precision for large x."""
    return 1.0 - _erf(_float(x))


def signbit(x: Tile) -> Tile:
    """bool: the sign bit, that of -0.0 and NaN included."""
    return _float(x).bitcast(i32) < 0


def logical_not(x: Tile) -> Tile:
    return x == 0 if x.dtype != b1 else ~x


def _truth(x: Tile) -> Tile:
    return x if x.dtype == b1 else x != 0


def logical_and(a: Tile, b: Tile) -> Tile:
    return _truth(a) & _truth(b)


def logical_or(a: Tile, b: Tile) -> Tile:
    return _truth(a) | _truth(b)


def remainder(a: Tile, b: Any) -> Tile:
    """The remainder that has the divisor's sign (Python's %); `%` on tiles has the dividend's, as in C."""
    rest = ELEMENTWISE["fmod"](a, b) if a.dtype.is_float else a % b
    return where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


def floor_div(a: Tile, b: Any) -> Tile:
    """The quotient rounded down (Python's //); `//` on tiles rounds toward zero, as in C."""
    if a.dtype.is_float:
        return _floor(a / b)
    rest = a % b
    return a // b - ((rest != 0) & ((rest < 0) != (b < 0))).to(a.dtype)


def ceil_div(a: Tile, b: Any) -> Tile:
    """The quotient rounded up."""
    if a.dtype.is_float:
        return _ceil(a / b)
    rest = a % b
    return a // b + ((rest != 0) & ((rest < 0) == (b < 0))).to(a.dtype)


def gcd(a: Tile, b: Tile) -> Tile:
    """Greatest common divisor of i32 tiles: Euclid's 46 steps at most, unrolled, so it is slow."""
    a, b = _abs(a), _abs(b)
    for _ in range(46):
        a, b = where(b == 0, a, b), where(b == 0, 0, a % maximum(b, 1))
    return a


def pow2_ceil(x: Tile) -> Tile:
    """The smallest power of two >= x, exactly, for 0 and normal positive f32; subnormal x gives 2^-126."""
    return ((_float(x).bitcast(i32) + 0x7FFFFF) & 0x7F800000).bitcast(f32)


# --- along an axis ----------------------------------------------------------------------------------------------


def _expand(x: Tile, axes: Sequence[int], rank: int) -> Tile:
    """`x` with the axes that a reduction removed put back as 1."""
    return x[tuple(None if at in axes else slice(None) for at in range(rank))]


def _axes(axis: Axes, rank: int) -> list[int]:
    """Sorted from the last to the first, so that reducing one leaves the others in place."""
    items = axis if isinstance(axis, tuple) else (axis,)
    return sorted((a % rank for a in items), reverse=True)


def _amax(x: Tile, axes: Sequence[int]) -> Tile:
    x = _abs(x)
    for at in axes:
        x = max(x, axis=at)
    return x


def softmax(x: Tile, axis: int = -1) -> Tile:
    """exp(x - max) / sum, in f32; NaN where every element is -inf, as in torch."""
    x = _float(x)
    e = _exp(x - max(x, axis, keepdims=True))
    return e / sum(e, axis, keepdims=True)


def var(x: Tile, axis: int = -1, correction: int = 1, keepdims: bool = False) -> Tile:
    """Variance by two passes, divided by n - correction (torch's default 1)."""
    x = _float(x)
    d = x - mean(x, axis, keepdims=True)
    if not correction:
        return mean(d * d, axis, keepdims)
    ones = full(list(x.shape), 1.0, f32)
    return sum(d * d, axis, keepdims) / (sum(ones, axis, keepdims) - float(correction))


def rms_norm(x: Tile, weight: Tile | None = None, eps: Any = 1e-6) -> Tile:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019), in f32."""
    x = _float(x)
    x = x * _rsqrt(mean(x * x, -1, keepdims=True) + eps)
    return x if weight is None else x * _float(weight)


def layer_norm(x: Tile, weight: Tile | None = None, bias: Tile | None = None, eps: Any = 1e-5) -> Tile:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016), in f32."""
    x = _float(x)
    d = x - mean(x, -1, keepdims=True)
    d = d * _rsqrt(mean(d * d, -1, keepdims=True) + eps)
    d = d if weight is None else d * _float(weight)
    return d if bias is None else d + _float(bias)


def online_softmax(scores: Tile, m: Tile, l: Tile) -> tuple[Tile, Tile, Tile, Tile]:  # noqa: E741
    """One step over a block of columns: scores [R, C], running maximum m and sum l [R] -> (p, alpha, m, l).

    Then `acc = acc * alpha[:, None] + dot(p, values)`. Start with m = -inf, l = 0; rows that saw only -inf stay at
    l = 0 without NaN (Milakov and Gimelshein 2018).
    """
    top = maximum(m, max(scores, axis=1))
    safe = where(top == float("-inf"), 0.0, top)
    p, alpha = _exp(scores - safe[:, None]), _exp(m - safe)
    return p, alpha, top, l * alpha + sum(p, axis=1)


def merge_softmax(m1: Tile, l1: Tile, acc1: Tile, m2: Tile, l2: Tile, acc2: Tile) -> tuple[Tile, Tile, Tile]:
    """Joins two partial attentions over disjoint columns: (m, l, acc), acc not yet divided by l."""
    top = maximum(m1, m2)
    safe = where(top == float("-inf"), 0.0, top)
    a, b = _exp(m1 - safe), _exp(m2 - safe)
    return top, l1 * a + l2 * b, acc1 * a[:, None] + acc2 * b[:, None]


def top_k_small(x: Tile, k: int) -> tuple[Tile, Tile]:
    """(values, i32 indices) [..., k] of the k largest along the last axis, in order; k rounds of max, so for small k.

    Ties: the lowest index first. -inf (an integer's lowest value) is never chosen: index -1 stands for "no more".
    """
    lowest, spots, columns = x.dtype.lowest, arange(k), arange(x.shape[-1])
    values = full([*x.shape[:-1], k], lowest, x.dtype)
    indices = full([*x.shape[:-1], k], -1, i32)
    last = (*[slice(None)] * (x.ndim - 1), None)
    for round in range(k):
        best = max(x, axis=-1).to(x.dtype)
        index = argmax(x, axis=-1)
        index = where(best == lowest, -1, index)
        values = where(spots == round, best[last], values)
        indices = where(spots == round, index[last], indices)
        x = where(columns == index[last], lowest, x)
    return values, indices


def argsort(x: Tile, descending: bool = False) -> Tile:
    """i32 indices that sort f32 (or narrower) along the last axis, lowest index first among equals; NaN last or first
    by its bits."""
    bits = where(_float(x) == 0, 0.0, _float(x)).bitcast(i32)
    order = where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = ~order if descending else order
    keys = sort(order.to(i64) * (1 << 32) + arange(x.shape[-1]).to(i64))
    return (keys & 0xFFFFFFFF).to(i32)


# --- masks ------------------------------------------------------------------------------------------------------


def one_hot(index: Tile, classes: int, dtype: DType = f32) -> Tile:
    """[...] integers -> [..., classes]; an index outside gives zeros."""
    return (index[(*[slice(None)] * index.ndim, None)] == arange(classes)).to(dtype)


def _positions(x: Any) -> Tile:
    return x if isinstance(x, Tile) else arange(x)


def tril_mask(rows: Any, columns: Any, diagonal: Any = 0) -> Tile:
    """bool [rows, columns], true where column <= row + diagonal; each a size, or a tile (block index) of positions."""
    return _positions(columns)[None, :] <= _positions(rows)[:, None] + diagonal


def triu_mask(rows: Any, columns: Any, diagonal: Any = 0) -> Tile:
    """bool [rows, columns], true where column >= row + diagonal."""
    return _positions(columns)[None, :] >= _positions(rows)[:, None] + diagonal


def tril(x: Tile, diagonal: Any = 0) -> Tile:
    """A 2-D tile with zeros above the diagonal."""
    return where(tril_mask(x.shape[0], x.shape[1], diagonal), x, 0)


def triu(x: Tile, diagonal: Any = 0) -> Tile:
    """A 2-D tile with zeros below the diagonal."""
    return where(triu_mask(x.shape[0], x.shape[1], diagonal), x, 0)


# --- quantisation -----------------------------------------------------------------------------------------------


def quantize_fp8(
    x: Tile, axis: Axes = -1, pow2: bool = False, floor: Number = 1e-4, dtype: DType = e4m3
) -> tuple[Tile, Tile]:
    """(values, f32 scales without the axes): scale = max(|x|max, floor) / 448, up to a power of two with `pow2`.

    Groups of 128: `quantize_fp8(x.reshape(n // 128, 128))`; 128 x 128: of [r, 128, c, 128] over axes (1, 3).
    """
    x = _float(x)
    axes = _axes(axis, x.ndim)
    scale = maximum(_amax(x, axes), floor) / (448.0 if dtype == e4m3 else 57344.0)
    scale = pow2_ceil(scale) if pow2 else scale
    return (x / _expand(scale, axes, x.ndim)).to(dtype), scale


def _quantize_int(x: Tile, axis: Axes, top: int, floor: Number) -> tuple[Tile, Tile]:
    x = _float(x)
    axes = _axes(axis, x.ndim)
    scale = maximum(_amax(x, axes), floor) / float(top)
    return clip(_round(x / _expand(scale, axes, x.ndim)), -top, top).to(i8), scale


def quantize_int8(x: Tile, axis: Axes = -1, floor: Number = 1e-8) -> tuple[Tile, Tile]:
    """(i8 values in -127 .. 127, f32 scales without the axes), symmetric, rounded to nearest even."""
    return _quantize_int(x, axis, 127, floor)


def quantize_int4(x: Tile, axis: Axes = -1, floor: Number = 1e-8) -> tuple[Tile, Tile]:
    """(i8 values in -7 .. 7, f32 scales); `pack_int4` puts two in a byte."""
    return _quantize_int(x, axis, 7, floor)


def dequantize(values: Tile, scale: Tile, axis: Axes = -1) -> Tile:
    """f32: values * scale, the scale spread over the axes that the quantisation removed."""
    return values.to(f32) * _expand(scale, _axes(axis, values.ndim), values.ndim)


def pack_int4(values: Tile) -> Tile:
    """[..., 2n] integers in -8 .. 7 -> u8 [..., n]; the even element is in the low half."""
    half = _static(values.shape[-1], "pack_int4: the last extent") // 2
    low, high = split(values.to(i32).reshape(*values.shape[:-1], half, 2))
    return ((low & 15) | ((high & 15) << 4)).to(u8)


def unpack_int4(packed: Tile) -> Tile:
    """u8 or i8 [..., n] -> i8 [..., 2n] in -8 .. 7: the inverse of `pack_int4`."""
    count = 2 * _static(packed.shape[-1], "unpack_int4: the last extent")
    word = packed.to(i32)
    low, high = ((word & 15) ^ 8) - 8, (((word >> 4) & 15) ^ 8) - 8
    return join(low, high).reshape(*packed.shape[:-1], count).to(i8)


# --- Hadamard transform -----------------------------------------------------------------------------------------


def hadamard_matrix(n: int, dtype: DType) -> Tile:
    """[n, n] of +1 and -1: (-1)^popcount(i & j) (Sylvester's order), n a power of two up to 32768."""
    if n < 1 or n & (n - 1):
        raise fail(f"a Hadamard matrix needs a power of two, got {n}")
    bits = arange(n)[:, None] & arange(n)[None, :]
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(dtype)


def hadamard128(x: Tile) -> Tile:
    """[R, 128] or [128] times the Hadamard matrix / sqrt(128): orthonormal, its own inverse; f32.

    Rows go through one dot; a single row, which no matrix unit takes, through a sum.
    """
    if _static(x.shape[-1], "hadamard128: the last extent") != 128 or x.ndim > 2:
        raise fail(f"hadamard128 needs [R, 128] or [128], got {x}")
    if x.ndim == 1 or x.shape[0] == as_size(1):
        row = _float(x).reshape(128, 1)
        out = sum(row * hadamard_matrix(128, f32), axis=0).reshape(*x.shape)
    else:
        out = dot(x, hadamard_matrix(128, x.dtype))
    return out * 0.08838834764831845


# --- random numbers ---------------------------------------------------------------------------------------------


def _mix(x: Tile) -> Tile:
    """A bijection of 32-bit words in two multiply-xorshift rounds (constants: C. Wellons, "lowbias32")."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(seed: Any, *counters: Any) -> Tile:
    """i32 pseudo-random words, a pure function of an i32 seed and i32 counters (position, row, step, ...).

    Quality: flipping any input bit flips each output bit with probability near 1/2; for one seed, words of distinct
    last counters are distinct. 32 bits of state: good for sampling and dropout, not for cryptography nor for
    simulations that draw more than about 2^30 numbers per seed.
    """
    word = full([], seed, i32) if isinstance(seed, int) else seed.to(i32)
    word = _mix(word ^ (0x9E3779B9 - (1 << 32)))
    for counter in counters:
        word = _mix(word * 0x2545F491 ^ counter)
    return word


def uniform(seed: Any, *counters: Any) -> Tile:
    """f32 in [0, 1), multiples of 2^-24; see `random_bits`."""
    return ((random_bits(seed, *counters) >> 8) & 0xFFFFFF).to(f32) * (2.0**-24)


def normal(seed: Any, *counters: Any) -> Tile:
    """f32 of the standard normal distribution, at most 5.8 from 0 (Box and Muller)."""
    radius = 1.0 - uniform(seed, *counters)
    angle = uniform(seed, *counters, 1)
    return _sqrt(-2.0 * _log(radius)) * _cos(angle * 6.283185307179586)
