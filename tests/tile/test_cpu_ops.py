"""Every operation of the table in generated C++ against the interpreter, on ragged sizes; and the zoo."""

import random

import pytest
import torch

from tests.tile.cpu_compare import close, compare, copied, run_both, specialised
from tests.tile.zoo import CASES
from tilery import tile
from tilery.tile import Dim, Float, InOut, Static, Tensor, b1, bf16, e4m3, e5m2, f16, f32, f64, i8, i16, i32, i64, u8
from tilery.tile.lang import elementwise
from tilery.tile.ops import OPS, REDUCTIONS
from tilery.tile.targets.cpu import build
from tilery.tile.targets.cpu.executable import compile_cpu, compile_many

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

N, M, K = Dim("N"), Dim("M"), Dim("K")
SIZES = (0, 1, 7, 33)
INTS = (i8, u8, i16, i32, i64)
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
UNARY = tuple(
    n for n, op in OPS.items() if op.elementwise and op.cpp.count("{1}") == 0 and n not in ("where", "cast", "bitcast")
)
INT_UNARY = ("neg", "abs", "bit_not")
INT_BINARY = (
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "maximum",
    "minimum",
    "bit_and",
    "bit_or",
    "bit_xor",
    "shl",
    "shr",
    *COMPARE,
)
FLOAT_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "pow", "fmod", "atan2", "hypot", "copysign", *COMPARE)


def result_type(name, dtype):
    return b1 if OPS[name].name in (*COMPARE, "isnan", "isfinite") else dtype


@tile.kernel
def unary(x: Tensor[N, (*Float, f64, *INTS)], names: Static[tuple]):
    outs = tuple(tile.empty([N], result_type(name, x.dtype)) for name in names)
    for n in tile.parallel(tile.blocks(N, "n")):
        v = x[n]
        for name, out in zip(names, outs):
            out[n] = elementwise(name, v)
    return outs


@tile.kernel
def binary(x: Tensor[N, (*Float, f64, *INTS)], y: Tensor[N, (*Float, f64, *INTS)], names: Static[tuple]):
    outs = tuple(tile.empty([N], result_type(name, x.dtype)) for name in names)
    for n in tile.parallel(tile.blocks(N, "n")):
        for name, out in zip(names, outs):
            out[n] = elementwise(name, x[n], y[n])
    return outs


def on_sizes(kernel, make, rtol=1e-5, **static):
    """One binary, run for every ragged size."""
    items = [specialised(kernel, *make(n), **static) for n in (*SIZES, 100)]
    executable = compile_cpu(items[0][0], items[0][2], optimise="-O1")
    for ir, arguments, env in items:
        for got, expected in zip(*run_both(ir, arguments, env, executable)):
            close(got, expected, rtol)


@pytest.mark.parametrize("dtype", [f32, bf16, f64])
def test_unary_floats(dtype):
    names = tuple(n for n in UNARY if n != "bit_not")

    def make(n):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 2
        x[:5] = torch.tensor([0.5, -0.0, float("inf"), float("nan"), 1.5])[:n]
        return (x.to(dtype.torch),)

    on_sizes(unary, make, names=names)


@pytest.mark.parametrize("dtype", INTS)
def test_unary_integers(dtype):
    names = tuple(n for n in INT_UNARY if dtype != u8 or n != "abs")
    on_sizes(unary, lambda n: (torch.randint(-100, 100, (n,)).to(dtype.torch),), names=names)


@pytest.mark.parametrize("dtype", [f32, f16, f64])
def test_binary_floats(dtype):
    def make(n):
        x, y = torch.randn(n) * 3, torch.randn(n) * 3
        x[:4] = torch.tensor([float("nan"), 1.0, 2.0, float("inf")])[:n]
        y[:4] = torch.tensor([1.0, float("nan"), 2.0, 3.0])[:n]
        return x.to(dtype.torch), y.to(dtype.torch)

    on_sizes(binary, make, names=FLOAT_BINARY)


@pytest.mark.parametrize("dtype", INTS)
def test_binary_integers_wrap_and_divide_toward_zero(dtype):
    def make(n):
        x, y = torch.randint(-128, 128, (n,)), torch.randint(1, 7, (n,))
        return x.to(dtype.torch), y.to(dtype.torch)

    on_sizes(binary, make, names=INT_BINARY)


CASTS = (b1, i8, u8, i16, i32, i64, f16, bf16, f32, f64, e4m3, e5m2)


@tile.kernel
def casts(x: Tensor[N, CASTS], kinds: Static[tuple]):
    outs = tuple(tile.empty([N], kind) for kind in kinds)
    for n in tile.parallel(tile.blocks(N, "n")):
        for kind, out in zip(kinds, outs):
            out[n] = x[n].to(kind)
    return outs


def test_casts_between_all_types():
    calls = []
    for dtype in CASTS:
        x = torch.randint(0, 100, (100,)).float() + (0 if dtype.is_int else 0.37)
        x[:4] = torch.tensor([0.0, 1.0, 2.5, 3.5])
        x = x.to(dtype.torch)
        calls.append((casts, (x,), {"kinds": tuple(k for k in CASTS if k != dtype)}))
    wild = torch.tensor([1e30, -1e30, 500.0, -70000.0, float("inf"), float("nan"), 1e-9, 464.0, 465.0])
    calls.append((casts, (wild,), {"kinds": (e4m3, e5m2, f16, bf16)}))
    compare(calls, rtol=0, atol=0)


@tile.kernel
def misc(x: Tensor[N, f32], h: Tensor[N, bf16], c: Tensor[N, b1], n: int):
    bits, back, low = tile.empty([N], i32), tile.empty([N], f32), tile.empty([N], i16)
    picked, filled, place = tile.empty([N], f32), tile.empty([N], bf16), tile.empty([N], i32)
    for i in tile.parallel(tile.blocks(N, "n")):
        v = x[i]
        bits[i] = v.bitcast(i32)
        back[i] = v.bitcast(i32).bitcast(f32)
        low[i] = h[i].bitcast(i16)
        picked[i] = tile.where(c[i] & (v > 0), v, -1.0)
        filled[i] = tile.full([i.extent], 1.2345, bf16) + h[i] * h[i]
        place[i] = i.index * n + tile.arange(i.extent) + i.count
    return bits, back, low, picked, filled, place


def test_bitcast_where_full_arange():
    def make(n):
        return torch.randn(n), torch.randn(n).bfloat16(), torch.rand(n) > 0.5

    items = [specialised(misc, *make(n), 3) for n in SIZES]
    executable = compile_cpu(items[0][0], items[0][2], optimise="-O1")
    for ir, arguments, env in items:
        got, expected = run_both(ir, arguments, env, executable)
        for a, b in zip(got[:5], expected[:5]):
            close(a, b)


@tile.kernel
def reductions(x: Tensor[N, M, K, (f32, i32, f64)]):
    outs = []
    for kind in REDUCTIONS[:6]:
        kept = i32 if kind.startswith("arg") else x.dtype
        outs.append((kind, tile.empty([M, K], kept), tile.empty([N, K], kept), tile.empty([N, M], kept)))
    flags = tile.empty([N, M, 2], b1)
    total = tile.empty([1], x.dtype)
    for _ in tile.parallel(1):
        v = x[:, :, :]
        for kind, first, middle, last in outs:
            f = getattr(tile, kind)
            first[:, :], middle[:, :], last[:, :] = f(v, axis=0), f(v, axis=1), f(v, axis=2)
        flags[:, :, :] = tile.join(tile.any(v > 0, axis=2), tile.all(v > 0, axis=2))
        total[0] = tile.sum(v)
    return *(t for _, *three in outs for t in three), flags, total


@pytest.mark.parametrize("dtype", [f32, i32])
def test_reductions_over_every_axis(dtype):
    shapes = [(1, 7, 33), (7, 1, 2), (33, 2, 1), (0, 7, 3), (3, 0, 7), (7, 3, 0), (2, 5, 40)]
    calls = [(reductions, (torch.randint(-3, 4, shape).to(dtype.torch),), {}) for shape in shapes]
    compare(calls)


@tile.kernel
def products(
    a: Tensor[M, K, (f32, bf16, f16, e4m3, e5m2, i8)],
    b: Tensor[K, N, (f32, bf16, f16, e4m3, e5m2, i8)],
    c: Tensor[N, K, (f32, bf16, f16, e4m3, e5m2, i8)],
):
    kind = i32 if a.dtype == i8 else f32
    plain, flipped, added = (tile.empty([M, N], kind) for _ in range(3))
    for _ in tile.parallel(1):
        x = a[:, :]
        plain[:, :] = tile.dot(x, b[:, :])
        flipped[:, :] = tile.dot(x, c[:, :].T)
        added[:, :] = tile.dot(x, b[:, :], tile.full([M, N], 3, kind)) + tile.dot(x, c[:, :].T)
    return plain, flipped, added


@pytest.mark.parametrize("dtype", [f32, bf16, e4m3, i8])
def test_dot(dtype):
    def some(*shape):
        return (torch.randint(-9, 10, shape).float() if dtype == i8 else torch.randn(shape)).to(dtype.torch)

    shapes = [(1, 1, 1), (7, 33, 5), (4, 16, 8), (33, 7, 40), (8, 64, 24), (0, 3, 4), (3, 0, 4), (3, 4, 0)]
    compare([(products, (some(m, k), some(k, n), some(n, k)), {}) for m, k, n in shapes], rtol=1e-4, atol=1e-4)


@tile.kernel
def ordered(x: Tensor[M, K, (f32, i32, bf16)], where: Tensor[M, N, i32]):
    up, down = tile.empty([M, K], x.dtype), tile.empty([M, K], x.dtype)
    taken, other = tile.empty([M, N], x.dtype), tile.empty([M, K], x.dtype)
    for _ in tile.parallel(1):
        v = x[:, :]
        up[:, :], down[:, :] = tile.sort(v), tile.sort(v, descending=True)
        taken[:, :] = tile.take(v, where[:, :], axis=1)
        other[:, :] = tile.take(v.T, (tile.arange(M)[None, :] * 0).broadcast_to(K, M), axis=0).T
    return up, down, taken, other


@pytest.mark.parametrize("dtype", [f32, i32, bf16])
def test_sort_and_take(dtype):
    calls = []
    for m, k, n in [(1, 1, 1), (7, 33, 5), (3, 2, 40), (0, 4, 4)]:
        x = (torch.randn(m, k) * 10).to(dtype.torch)
        if dtype == f32 and m * k > 3:
            x[0, 0], x[0, 1] = float("nan"), float("-inf")
        calls.append((ordered, (x, torch.randint(0, k, (m, n)).int()), {}))
    compare(calls)


@tile.kernel
def shapes(x: Tensor[M, 6, 4, f32]):
    flat, swapped, pairs = tile.empty([M, 24], f32), tile.empty([4, M, 6], f32), tile.empty([M, 6, 2, 2], f32)
    regrouped, interleaved = tile.empty([M, 3, 8], f32), tile.empty([M, 24], f32)
    summed, spread = tile.empty([M, 8], f32), tile.empty([M, 5, 24], f32)
    for m in tile.parallel(tile.blocks(M, "m")):
        v = x[m, :, :]
        flat[m, :] = v.reshape(m.extent, 24)
        swapped[:, m, :] = v.transpose(2, 0, 1)
        pairs[m, :, :, :] = v.reshape(m.extent, 6, 2, 2).transpose(0, 1, 3, 2)
        regrouped[m, :, :] = v.reshape(m.extent, 3, 8) * 2.0
        a, b = tile.split(v.reshape(m.extent, 12, 2))
        interleaved[m, :] = tile.join(b, a - b).reshape(m.extent, 24)
        summed[m, :] = tile.sum(v.reshape(m.extent, 3, 8), axis=1)
        spread[m, :, :] = tile.exp(v).reshape(m.extent, 1, 24).broadcast_to(m.extent, 5, 24)
    return flat, swapped, pairs, regrouped, interleaved, summed, spread


def test_shape_operations():
    compare([(shapes, (torch.randn(m, 6, 4),), {}) for m in SIZES])


@tile.kernel
def odd_reshape(x: Tensor[M, 6, 35, f32]):
    y = tile.empty([M, 14, 15], f32)
    for m in tile.parallel(M):
        y[m, :, :] = x[m, :, :].reshape(14, 15)
    return y


def test_a_reshape_that_needs_divisions():
    compare([(odd_reshape, (torch.randn(2, 6, 35),), {})])


@tile.kernel
def atomics(
    f: InOut[K, f32], h: InOut[K, bf16], d: InOut[K, f64], i: InOut[K, i32], b: InOut[K, u8], place: Tensor[N, i32],
    kind: Static[str],
):  # fmt: skip
    for n in tile.parallel(tile.blocks(N, "n")):
        at, v = place[n], n.index % 5
        for t in (f, h, d, i, b):
            if kind != "or" or not t.dtype.is_float:
                getattr(t, f"atomic_{kind}")((at,), v.to(t.dtype), where=n.index % 3 != 1)


@pytest.mark.parametrize("kind", ["add", "max", "min", "or"])
def test_atomics(kind):
    state = [
        torch.randint(0, 3, (9,)).to(t)
        for t in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8)
    ]
    compare([(atomics, (*state, torch.randint(0, 9, (n,)).int(), kind), {}) for n in SIZES])


@tile.kernel
def exchange(x: InOut[N, i32], count: InOut[1, i32]):
    old, tickets = tile.empty([N], i32), tile.empty([N], i32)
    for n in tile.parallel(N):
        old[n] = x.atomic_xchg((n,), n * 2)
        tickets[n] = count.atomic_add((0,), 1)
    return old, tickets


def test_atomics_return_old_values():
    compare([(exchange, (torch.randint(0, 99, (7,)).int(), torch.zeros(1, dtype=torch.int32)), {})])


def draw(rng, ragged):
    def size(low, high):
        choices = [n for n in SIZES if low <= n <= high]
        return rng.choice(choices) if ragged and choices else rng.randint(low, high)

    return size


@pytest.mark.parametrize("name", CASES)
def test_zoo(name):
    """Several random instances of a small kernel, contiguous or not, against plain torch."""
    made = [CASES[name](draw(random.Random(s), s % 2 == 1), torch.Generator().manual_seed(s)) for s in range(4)]
    items = []
    for kernel, arguments, expected in made:
        own = copied(arguments)
        ir, bound, env = specialised(kernel, **own)
        items.append((ir, bound, env, expected))
    executables = compile_many([(ir, env, None) for ir, _, env, _ in items], optimise="-O1")
    for (ir, bound, env, expected), executable in zip(items, executables):
        got = executable(bound, env)
        got = (*got, *(bound[p.value.name] for p in ir.params if p.inout))
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)
