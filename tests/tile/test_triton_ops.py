"""Every operation through emitted Triton source in Triton's interpreter, against the reference interpreter."""

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, InOut, Tensor, b1, bf16, e4m3, e5m2, f16, f32, f64, i8, i16, i32, i64, interpret, ops, u8
from tilery.tile.functions import ELEMENTWISE
from tilery.tile.lowering import lower
from tilery.tile.schedule import Schedule
from tilery.tile.targets.triton import run_interpreted

pytest.importorskip("triton")

N, M, K, H = Dim("N"), Dim("M"), Dim("K"), Dim("H")
DTYPES = {d.name: d for d in (b1, i8, u8, i16, i32, i64, f16, bf16, f32, f64, e4m3, e5m2)}


def check(kernel, *args, rtol=1e-5, atol=1e-6, schedule=None):
    """Both interpreters on copies of the arguments; returns the outputs of the emitted source."""
    bound = kernel.signature.bind(args, {})
    ir = kernel.trace(kernel.signature.specialise(bound))
    env = kernel.signature.bind_dims(bound)
    lowered = lower(ir, env, "triton", schedule)
    ours = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in bound.items()}
    got = run_interpreted(lowered, ours, env)
    wanted = interpret.run(lowered.stage("bound"), bound, env)
    written = [p.value.name for p in ir.params if p.inout]
    pairs = [*zip(got, wanted), *((ours[name], bound[name]) for name in written)]
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
    return got


def elementwise(name, binary, dtype):
    @tile.kernel
    def unary_kernel(x: Tensor[N, dtype]):
        y = tile.empty([N], dtype)
        for i in tile.parallel(tile.blocks(N, "i")):
            v = ELEMENTWISE[name](x[i])
            y[i] = v.to(dtype)
        return y

    @tile.kernel
    def binary_kernel(x: Tensor[N, dtype], z: Tensor[N, dtype]):
        y = tile.empty([N], dtype)
        for i in tile.parallel(tile.blocks(N, "i")):
            y[i] = ELEMENTWISE[name](x[i], z[i])
        return y

    return binary_kernel if binary else unary_kernel


BINARY = ("pow", "fmod", "atan2", "hypot", "copysign", "mul_rn")


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"bit_not", "floordiv", "mod"}))
def test_elementwise_float(name):
    x = torch.cat([torch.rand(27) * 0.9 + 0.05, -torch.rand(6), torch.tensor([1.5, 2.5, -0.5, 3.0, -7.25])])
    kernel = elementwise(name, name in BINARY, f32)
    arguments = (x, x.flip(0).contiguous()) if name in BINARY else (x,)
    check(kernel, *arguments, rtol=1e-5, atol=1e-5, schedule=Schedule(blocks={"i": 16}))


@pytest.mark.parametrize("name", ["neg", "abs", "bit_not"])
@pytest.mark.parametrize("dtype", [i8, i32, i64])
def test_elementwise_integer(name, dtype):
    check(elementwise(name, False, dtype), torch.arange(-9, 10).to(dtype.torch))


@tile.kernel
def integers(x: Tensor[N, (i8, i16, i32, i64, u8)], y: Tensor[N, (i8, i16, i32, i64, u8)]):
    out = tile.empty([10, N], x.dtype)
    for i in tile.parallel(tile.blocks(N, "i")):
        a, b = x[i], y[i]
        for n, v in enumerate(
            (a + b, a - b, a * b, a // b, a % b, a & b, a | b, a ^ b, tile.maximum(a, b), tile.minimum(a, 3))
        ):
            out[n, i] = v
    return out


@pytest.mark.parametrize("dtype", [i8, i16, i32, i64, u8])
def test_integer_arithmetic(dtype):
    low = 0 if dtype is u8 else -11
    x, y = torch.arange(low, low + 23).to(dtype.torch), torch.tensor([1, 2, 3, 5, 7, 9] * 4)[:23].to(dtype.torch)
    check(integers, x, y if dtype is u8 else torch.where(torch.arange(23) % 3 == 0, -y, y), rtol=0, atol=0)


@tile.kernel
def shifts(x: Tensor[N, i32], y: Tensor[N, i32]):
    out = tile.empty([3, N], i32)
    for i in tile.parallel(tile.blocks(N, "i")):
        out[0, i] = x[i] << y[i]
        out[1, i] = x[i] >> y[i]
        out[2, i] = x[i] >> 2
    return out


def test_shifts():
    check(shifts, torch.arange(-9, 12, dtype=torch.int32), torch.arange(21, dtype=torch.int32) % 7, rtol=0, atol=0)


@tile.kernel
def compares(x: Tensor[N, f32], y: Tensor[N, f32], a: int, f: float):
    out, picked = tile.empty([8, N], b1), tile.empty([N], i32)
    for i in tile.parallel(tile.blocks(N, "i")):
        p, q = x[i], y[i]
        masks = (p == q, p != q, p < q, p <= q, p > q, p >= q, tile.isnan(p / q), tile.isfinite(p / q))
        for n, m in enumerate(masks):
            out[n, i] = m & ~(p > f)
        picked[i] = tile.where((p > 0) | (q > 0), a, tile.where(p < q, -1, 0))
    return out, picked


def test_compare_and_select():
    x = torch.tensor([0.0, 1, 2, -1, float("inf"), 0, 3, 0.5, -0.5, 7, 9])
    check(compares, x, x.flip(0).contiguous(), 42, 6.0)


def caster(source, target):
    @tile.kernel
    def cast_kernel(x: Tensor[N, source]):
        y = tile.empty([N], target)
        for i in tile.parallel(tile.blocks(N, "i")):
            y[i] = x[i].to(target)
        return y

    return cast_kernel


@pytest.mark.parametrize("source", DTYPES)
def test_casts(source):
    """Between all pairs of types; floats round to nearest even, FP8 saturates."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(200, generator=generator) * 30, torch.tensor([0.0, 1, 2, 100.0, 3e-5, 1.0078125])])
    if not DTYPES[source].is_float:
        values = values.abs() if source in ("u8", "b1") else values
    elif not DTYPES[source].is_fp8:
        values = torch.cat([values, torch.tensor([1000.0, -1000.0, 60000.0])])
    for target in DTYPES:
        x = values if DTYPES[target].is_float else values.clamp(0 if target == "u8" else -100, 100)
        check(caster(DTYPES[source], DTYPES[target]), ops.cast(x, DTYPES[source]), rtol=0, atol=0)


@tile.kernel
def bitcasts(x: Tensor[N, f32], y: Tensor[N, bf16], z: Tensor[N, u8]):
    a, b, c = tile.empty([N], i32), tile.empty([N], i16), tile.empty([N], f32)
    for i in tile.parallel(tile.blocks(N, "i")):
        a[i] = x[i].bitcast(i32)
        b[i] = y[i].bitcast(i16)
        c[i] = z[i].bitcast(e4m3).to(f32)
    return a, b, c


def test_bitcast():
    x = torch.randn(19)
    check(bitcasts, x, x.bfloat16(), torch.arange(100, 119, dtype=torch.uint8), rtol=0, atol=0)


def reducer(kind, dtype, axis):
    out = i32 if kind.startswith("arg") or (dtype is b1 and kind == "sum") else dtype

    @tile.kernel
    def reduce_kernel(x: Tensor[M, H, dtype]):
        y = tile.empty([M], out)
        total = tile.empty([H], out)
        for _ in tile.parallel(1):
            v = getattr(tile, kind)(x[:, :], axis=axis).to(out)
            if axis == 1:
                y[:] = v
                total[:] = tile.zeros([H], out)
            else:
                y[:] = tile.zeros([M], out)
                total[:] = v
        return y, total

    return reduce_kernel


@pytest.mark.parametrize("kind", ["sum", "max", "min", "prod", "argmax", "argmin"])
@pytest.mark.parametrize("dtype", [f32, i8, i32, i64, u8])
def test_reduce(kind, dtype):
    low = 0 if dtype is u8 else -3
    x = torch.randint(low, 4, (5, 11), generator=torch.Generator().manual_seed(1)).to(dtype.torch)
    for axis in (0, 1):
        check(reducer(kind, dtype, axis), x, rtol=1e-6)


@pytest.mark.parametrize("kind", ["any", "all", "sum"])
def test_reduce_bool(kind):
    x = torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(1)).bool()
    for axis in (0, 1):
        check(reducer(kind, b1, axis), x)


@tile.kernel
def whole(x: Tensor[M, H, f32]):
    y = tile.empty([4], f32)
    for _ in tile.parallel(1):
        v = x[:, :]
        y[0] = tile.sum(v)
        y[1] = tile.max(v)
        y[2] = tile.mean(v)
        y[3] = tile.sum(v, keepdims=True).reshape()
    return y


def test_reduce_everything():
    check(whole, torch.randn(5, 7))


def scanner(kind, dtype, axis, reverse):
    @tile.kernel
    def scan_kernel(x: Tensor[M, H, dtype]):
        y = tile.empty([M, H], dtype)
        for _ in tile.parallel(1):
            y[:, :] = getattr(tile, kind)(x[:, :], axis=axis, reverse=reverse).to(dtype)
        return y

    return scan_kernel


@pytest.mark.parametrize("kind", ["cumsum", "cumprod", "cummax"])
@pytest.mark.parametrize("dtype", [f32, i32, i8])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(kind, dtype, reverse):
    x = torch.randint(-2, 3, (3, 6), generator=torch.Generator().manual_seed(2)).to(dtype.torch)
    for axis in (0, 1):
        check(scanner(kind, dtype, axis, reverse), x)


@tile.kernel
def sorts(x: Tensor[M, H, (f32, i32)]):
    up, down = tile.empty([M, H], x.dtype), tile.empty([M, H], x.dtype)
    for m in tile.parallel(M):
        up[m, :] = tile.sort(x[m, :])
        down[m, :] = tile.sort(x[m, :], descending=True)
    return up, down


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_sort(dtype):
    check(sorts, torch.randint(-50, 50, (2, 13), generator=torch.Generator().manual_seed(3)).to(dtype))


@tile.kernel
def takes(x: Tensor[M, H, f32], at: Tensor[M, K, (i32, i64)]):
    y = tile.empty([M, K], f32)
    for m in tile.parallel(tile.blocks(M, "m")):
        y[m, :] = tile.take(x[m, :], at[m, :], axis=1)
    return y


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_take(dtype):
    check(takes, torch.randn(3, 11), torch.randint(0, 11, (3, 5)).to(dtype), schedule=Schedule(blocks={"m": 2}))


@tile.kernel
def counts(x: Tensor[N, i32], keep: Tensor[N, b1]):
    y, z = tile.empty([13], i32), tile.empty([13], i32)
    for _ in tile.parallel(1):
        y[:] = tile.histogram(x[:], 13)
        z[:] = tile.histogram(x[:], 13, where=keep[:])
    return y, z


def test_histogram():
    check(counts, torch.randint(0, 13, (37,), dtype=torch.int32), torch.randint(0, 2, (37,)).bool(), rtol=0, atol=0)


@tile.kernel
def shapes(x: Tensor[M, 8, f32]):
    a, b, c = tile.empty([M, 8], f32), tile.empty([8, M], f32), tile.empty([M, 2, 4], f32)
    for m in tile.parallel(tile.blocks(M, "m")):
        v = x[m, :]
        even, odd = tile.split(v.reshape(m.extent, 4, 2))
        a[m, :] = tile.join(odd, -even).reshape(m.extent, 8)
        b[:, m] = v.T
        c[m, :, :] = v.reshape(m.extent, 2, 4).transpose(0, 2, 1).transpose(0, 2, 1)
    return a, b, c


def test_shapes():
    check(shapes, torch.randn(5, 8), schedule=Schedule(blocks={"m": 4}))


def multiplier(dtype, acc, transposed, precision="ieee"):
    @tile.kernel
    def dot_kernel(x: Tensor[M, K, dtype], w: Tensor[H, K, dtype] if transposed else Tensor[K, H, dtype]):
        y = tile.empty([M, H], i32 if dtype is i8 else f32)
        for m, h in tile.parallel(tile.blocks(M, "m"), tile.blocks(H, "h")):
            total = tile.zeros([m.extent, h.extent], i32 if dtype is i8 else f32)
            for k in tile.range(tile.blocks(K, "k")):
                b = w[h, k].T if transposed else w[k, h]
                if acc:
                    total = tile.dot(x[m, k], b, acc=total, precision=precision)
                else:
                    total = total + tile.dot(x[m, k], b, precision=precision)
            y[m, h] = total
        return y

    return dot_kernel


@pytest.mark.parametrize("dtype", [f32, f16, bf16, e4m3, e5m2, i8])
@pytest.mark.parametrize("acc", [False, True])
def test_dot(dtype, acc):
    x, w = torch.randn(19, 45) * 2, torch.randn(45, 21) * 2
    schedule = Schedule(blocks={"m": 16, "h": 16, "k": 32})
    check(multiplier(dtype, acc, False), x.to(dtype.torch), w.to(dtype.torch), rtol=1e-4, atol=1e-4, schedule=schedule)
    transposed = w.T.contiguous().to(dtype.torch)
    check(multiplier(dtype, acc, True), x.to(dtype.torch), transposed, rtol=1e-4, atol=1e-4, schedule=schedule)


def counter(kind, dtype):
    @tile.kernel
    def atomic_kernel(table: InOut[K, dtype], at: Tensor[N, i32], x: Tensor[N, dtype], total: InOut[1, i32]):
        old = tile.empty([N], i32)
        for i in tile.parallel(tile.blocks(N, "i")):
            getattr(table, f"atomic_{kind}")(at[i], x[i], where=at[i] != 2)
            seen = total.atomic_add(0, 1)
            old[i] = tile.full([i.extent], seen, i32)
        return old

    return atomic_kernel


ATOMICS = [(kind, dtype) for kind in ("add", "max", "min", "xchg") for dtype in (i32, f32, i64)]


@pytest.mark.parametrize(("kind", "dtype"), [*ATOMICS, ("or", i32), ("or", i64)])
def test_atomics(kind, dtype):
    at = (
        torch.randperm(16, dtype=torch.int32)[:11] if kind == "xchg" else torch.randint(0, 16, (11,), dtype=torch.int32)
    )
    table, x = torch.arange(16).to(dtype.torch), torch.randint(-9, 9, (11,)).to(dtype.torch)
    check(counter(kind, dtype), table, at, x, torch.zeros(1, dtype=torch.int32), schedule=Schedule(blocks={"i": 4}))


@tile.kernel
def ranks(x: Tensor[N, i32], free: InOut[8, i32]):
    """The old value of a masked atomic: 0 where the mask is off."""
    y = tile.empty([N], i32)
    for i in tile.parallel(N):
        y[i] = free.atomic_add(x[i], 1, where=x[i] < 5)
    return y


def test_old_values():
    check(
        ranks, torch.tensor([1, 2, 1, 7, 1, 6, 2], dtype=torch.int32), torch.zeros(8, dtype=torch.int32), rtol=0, atol=0
    )


@tile.kernel
def views(x: Tensor[N, 24, u8], out: InOut[N, 12, u8]):
    y = tile.empty([N, 2], f32)
    floats = x.view(f32, [N, 2], strides=[6, 1], offset=4)
    halves = out.view(bf16, [N, 4], strides=[6, 1], offset=2)
    for i in tile.parallel(tile.blocks(N, "i")):
        v = floats[i, :]
        y[i, :] = v
        halves[i, 0:2] = v.to(bf16)
    return y


def test_views():
    check(views, torch.randn(5, 6).view(torch.uint8), torch.zeros(5, 12, dtype=torch.uint8))


@tile.kernel
def control(x: Tensor[N, K, f32], n: Tensor[N, i32], start: int):
    y, steps = tile.empty([N], f32), tile.empty([N], i32)
    for i in tile.parallel(N):
        a, b, count, wide = 0.0, 1.0, 0, tile.zeros([4], i64)
        for k in tile.range(start, n[i]):
            a, b = b, a + x[i, k]
            wide = wide + k
            for inner in tile.range(0, k, 2):
                count = count + inner
        if n[i] > 2:
            a = a + 1
        elif n[i] == 1:
            a = -b
            count = 7
        y[i] = a + b + tile.max(wide).to(f32)
        steps[i] = count
    return y, steps


def test_control_flow():
    check(control, torch.randn(5, 6), torch.tensor([0, 1, 2, 4, 6], dtype=torch.int32), 0)
    check(control, torch.randn(5, 6), torch.tensor([0, 1, 2, 4, 6], dtype=torch.int32), 1)


@tile.kernel
def grid(x: Tensor[M, N, H, f32], low: int, high: int):
    y = tile.empty([M, N, H], f32, init=-1)
    for n, h, m in tile.parallel(tile.blocks(low, high, "n"), tile.blocks(H, "h"), M):
        y[m, n, h] = x[m, n, h] * 2
    return y


@pytest.mark.parametrize("persistent", [0, 1])
@pytest.mark.parametrize("bounds", [(0, 7), (2, 5), (5, 2)])
def test_grid(persistent, bounds):
    schedule = Schedule(blocks={"n": 2, "h": 4}, persistent=persistent)
    check(grid, torch.randn(3, 7, 9), *bounds, schedule=schedule)


@tile.kernel
def strided(x: Tensor[M, N, H, (f32, bf16)], at: Tensor[K, i64]):
    y = tile.empty([M, K, H], x.dtype)
    for m in tile.parallel(M):
        y[m, :, :] = x[m, at[:], :]
    return y


@pytest.mark.parametrize("wide", [False, True])
def test_strided_and_wide(wide):
    x = torch.randn(6, 9, 16)[1::2, 2:8, 3:10]
    at = torch.tensor([5, 0, 3])
    bound = strided.signature.bind((x, at), {})
    ir = strided.trace(strided.signature.specialise(bound))
    env = strided.signature.bind_dims(bound)
    lowered = lower(ir, env, "triton")
    from tilery.tile.targets.triton import Spec, emit

    names = frozenset({"x", "y"}) if wide else frozenset()
    spec = Spec(strided=frozenset({"x"}), wide=names)
    got = run_interpreted(lowered, bound, env, spec)
    torch.testing.assert_close(got[0], x[:, at], rtol=0, atol=0)
    source = emit(lowered.kernel, lowered.schedule, spec).source
    assert "x_stride0" in source
    assert ("tl.int64" in source) == wide
