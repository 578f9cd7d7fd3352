"""The helpers written in the language, each against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from tilery import tile
from tilery.tile import Dim, Static, Tensor, b1, bf16, e4m3, f32, i8, i32, lib, u8

T, N, K = Dim("T"), Dim("N"), Dim("K")


@tile.kernel
def unary(x: Tensor[N, f32], f: Static[object], dtype: Static[object]):
    y = tile.empty([N], dtype)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = f(x[n])
    return y


@tile.kernel
def binary(a: Tensor[N, (f32, i32)], b: Tensor[N, (f32, i32)], f: Static[object], dtype: Static[object]):
    y = tile.empty([N], dtype)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = f(a[n], b[n])
    return y


@tile.kernel
def rows(x: Tensor[T, K, f32], f: Static[object]):
    y = tile.empty([T, K], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t, :] = f(x[t, :])
    return y


def numbers(n: int = 37) -> torch.Tensor:
    return torch.cat([torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3, torch.tensor([0.0, -0.0, 1.0])])


UNARY = {
    "relu": (lib.relu, F.relu, f32),
    "leaky_relu": (lib.leaky_relu, F.leaky_relu, f32),
    "silu": (lib.silu, F.silu, f32),
    "gelu": (lib.gelu, F.gelu, f32),
    "gelu tanh": (lambda x: lib.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), f32),
    "clip": (lambda x: lib.clip(x, -1, 0.5), lambda x: x.clamp(-1, 0.5), f32),
    "clip low": (lambda x: lib.clip(x, low=-1), lambda x: x.clamp(min=-1), f32),
    "erfc": (lib.erfc, torch.erfc, f32),
    "signbit": (lib.signbit, torch.signbit, b1),
    "logical_not": (lib.logical_not, torch.logical_not, b1),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    ours, theirs, dtype = UNARY[name]
    x = numbers()
    torch.testing.assert_close(unary.interpret(x, ours, dtype), theirs(x), rtol=2e-6, atol=2e-6)


BINARY = {
    "prelu": (lib.prelu, lambda a, b: torch.where(a > 0, a, a * b), "f"),
    "axpy": (lambda a, b: lib.axpy(2.0, a, b), lambda a, b: 2 * a + b, "f"),
    "logical_and": (lib.logical_and, torch.logical_and, "fib"),
    "logical_or": (lib.logical_or, torch.logical_or, "fib"),
    "remainder": (lib.remainder, torch.remainder, "fi"),
    "floor_div": (lib.floor_div, lambda a, b: torch.div(a, b, rounding_mode="floor"), "fi"),
    "ceil_div": (lib.ceil_div, lambda a, b: -torch.div(-a, b, rounding_mode="floor"), "fi"),
    "gcd": (lib.gcd, torch.gcd, "i"),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    ours, theirs, kinds = BINARY[name]
    a, b = numbers(), numbers().flip(0) + 0.25
    if "f" in kinds:
        torch.testing.assert_close(binary.interpret(a, b, ours, b1 if "b" in kinds else f32), theirs(a, b))
    if "i" in kinds:
        g = torch.Generator().manual_seed(3)
        a, b = (torch.randint(-40, 40, (64,), generator=g).int() for _ in "ab")
        b = torch.where(b == 0, 7, b)
        torch.testing.assert_close(binary.interpret(a, b, ours, b1 if "b" in kinds else i32), theirs(a, b))


def test_gcd_at_its_worst() -> None:
    a, b = torch.tensor([1836311903, 0, 12]).int(), torch.tensor([1134903170, 5, 0]).int()  # Fibonacci neighbours
    assert binary.interpret(a, b, lib.gcd, i32).tolist() == [1, 5, 12]


def test_pow2_ceil_is_exact() -> None:
    x = torch.tensor([0.0, 1.0, 1.0000001, 0.75, 2.0**-126, 3e38, 447.99, 448.0, math.inf])
    expected = [0.0, 1.0, 2.0, 1.0, 2.0**-126, math.inf, 512.0, 512.0, math.inf]
    assert unary.interpret(x, lib.pow2_ceil, f32).tolist() == expected


ROWS = {
    "softmax": (lib.softmax, lambda x: x.softmax(-1)),
    "rms_norm": (lib.rms_norm, lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6)),
    "layer_norm": (lib.layer_norm, lambda x: F.layer_norm(x, x.shape[-1:])),
    "var": (lambda x: x * lib.var(x, keepdims=True), lambda x: x * x.var(-1, keepdim=True)),
    "var biased": (lambda x: x * lib.var(x, 1, 0)[:, None], lambda x: x * x.var(-1, correction=0, keepdim=True)),
    "tril": (lib.tril, None),
    "triu": (lambda x: lib.triu(x, 2), None),
}


@pytest.mark.filterwarnings("ignore:var")  # torch: of one element
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (0, 4), (16, 128)])
def test_rows(name: str, shape: tuple[int, int]) -> None:
    ours, theirs = ROWS[name]
    x = torch.randn(shape)
    if theirs is None:  # the mask is of the block's own rows
        x = x[:16]
        theirs = torch.tril if name == "tril" else lambda x: torch.triu(x, 2)
    expected = theirs(x)
    torch.testing.assert_close(rows.interpret(x, ours), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@tile.kernel
def norms(x: Tensor[T, K, bf16], w: Tensor[K, bf16], b: Tensor[K, bf16]):
    y, z = tile.empty([T, K], f32), tile.empty([T, K], f32)
    for t in tile.parallel(T):
        y[t, :] = lib.rms_norm(x[t, :], w[:])
        z[t, :] = lib.layer_norm(x[t, :], w[:], b[:])
    return y, z


def test_norms_with_weights() -> None:
    x, w, b = torch.randn(3, 40).bfloat16(), torch.randn(40).bfloat16(), torch.randn(40).bfloat16()
    y, z = norms.interpret(x, w, b)
    torch.testing.assert_close(y, F.rms_norm(x.float(), (40,), w.float(), 1e-6), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, F.layer_norm(x.float(), (40,), w.float(), b.float()), rtol=1e-5, atol=1e-5)


@tile.kernel
def attention(q: Tensor[T, 16, f32], k: Tensor[N, 16, f32], v: Tensor[N, 8, f32], half: int):
    o = tile.empty([T, 8], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        m, l = tile.full([t.extent], float("-inf"), f32), tile.zeros([t.extent], f32)  # noqa: E741
        acc = tile.zeros([t.extent, 8], f32)
        m2, l2, acc2 = m, l, acc
        for n in tile.range(tile.blocks(half, "low")):
            p, alpha, m, l = lib.online_softmax(tile.dot(q[t, :], k[n, :].T), m, l)  # noqa: E741
            acc = tile.dot(p, v[n, :], acc * alpha[:, None])
        for n in tile.range(tile.blocks(half, N, "high")):
            p, alpha, m2, l2 = lib.online_softmax(tile.dot(q[t, :], k[n, :].T), m2, l2)
            acc2 = tile.dot(p, v[n, :], acc2 * alpha[:, None])
        _, total, acc = lib.merge_softmax(m, l, acc, m2, l2, acc2)
        o[t, :] = acc / total[:, None]
    return o


@pytest.mark.parametrize("half", [0, 1, 20, 37])
def test_online_softmax(half: int) -> None:
    q, k, v = torch.randn(5, 16), torch.randn(37, 16), torch.randn(37, 8)
    expected = (q @ k.T).softmax(-1) @ v
    torch.testing.assert_close(attention.interpret(q, k, v, half), expected, rtol=1e-4, atol=1e-5)


@tile.kernel
def top(x: Tensor[T, K, f32], k: Static[int]):
    values, indices = tile.empty([T, k], f32), tile.empty([T, k], i32)
    for t in tile.parallel(tile.blocks(T, "t")):
        values[t, :], indices[t, :] = lib.top_k_small(x[t, :], k)
    return values, indices


def test_top_k_ties_and_minus_infinity() -> None:
    x = torch.randint(0, 6, (9, 20)).float()
    values, indices = top.interpret(x, 4)
    order = torch.sort(x, dim=-1, descending=True, stable=True)
    assert torch.equal(values, order.values[:, :4])
    assert torch.equal(indices, order.indices[:, :4].int())
    x = torch.full((1, 8), -math.inf)
    x[0, 5], x[0, 2] = 1.0, -3.0
    values, indices = top.interpret(x, 4)
    assert indices.tolist() == [[5, 2, -1, -1]]
    assert values.tolist() == [[1.0, -3.0, -math.inf, -math.inf]]


@tile.kernel
def order(x: Tensor[T, K, f32], descending: bool):
    y = tile.empty([T, K], i32)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t, :] = lib.argsort(x[t, :], descending)
    return y


@pytest.mark.parametrize("descending", [False, True])
def test_argsort_is_stable(descending: bool) -> None:
    x = torch.randint(-3, 4, (5, 37)).float() * torch.tensor([1.0, -1.0])[torch.randint(0, 2, (5, 37))]
    expected = torch.argsort(x, dim=-1, descending=descending, stable=True)
    assert torch.equal(order.interpret(x, descending), expected.int())


@tile.kernel
def hot(x: Tensor[N, i32]):
    y = tile.empty([N, 7], f32)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n, :] = lib.one_hot(x[n], 7)
    return y


def test_one_hot() -> None:
    x = torch.tensor([0, 6, 3, 7, -1]).int()
    expected = (x[:, None] == torch.arange(7)).float()
    assert torch.equal(hot.interpret(x), expected)


def test_hadamard() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(7):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)

    @tile.kernel
    def hadamard(x: Tensor[T, 128, (f32, bf16)]):
        y, span, one = tile.empty([T, 128], f32), tile.empty([T, 128], f32), tile.empty([T, 128], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[t, :] = lib.hadamard128(x[t, :])
            span[tile.span(t.start, 1), :] = lib.hadamard128(x[tile.span(t.start, 1), :])
            one[t.start, :] = lib.hadamard128(x[t.start, :])
        return y, span, one

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 128).to(dtype)
        y, span, one = hadamard.interpret(x)
        torch.testing.assert_close(y, x.float() @ matrix / 128**0.5, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(span[0], y[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(span[0], one[0])


# --- quantisation -----------------------------------------------------------------------------------------------


@tile.kernel
def fp8(x: Tensor[T, 256, bf16], pow2: bool):
    y, s, back = tile.empty([T, 256], e4m3), tile.empty([T, 2], f32), tile.empty([T, 256], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        q, scale = lib.quantize_fp8(x[t, :].reshape(t.extent, 2, 128), pow2=pow2)
        y[t, :], s[t, :] = q.reshape(t.extent, 256), scale
        back[t, :] = lib.dequantize(q, scale).reshape(t.extent, 256)
    return y, s, back


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("count", [0, 1, 19])
def test_fp8_by_128(pow2: bool, count: int) -> None:
    x = (torch.randn(count, 256) * 10).bfloat16()
    y, s, back = fp8.interpret(x, pow2)
    g = x.float().view(count, 2, 128)
    scale = g.abs().amax(-1).clamp(min=1e-4) / 448
    scale = torch.exp2(torch.ceil(torch.log2(scale))) if pow2 else scale
    assert torch.equal(s, scale)
    assert torch.equal(
        y.float(), (g / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).float().view(count, 256)
    )
    assert torch.equal(back, (y.float().view(count, 2, 128) * scale[..., None]).view(count, 256))


@tile.kernel
def fp8_blocks(w: Tensor[Dim("R", multiple_of=128), Dim("C", multiple_of=128), f32]):
    rows, columns = w.shape
    y, s = tile.empty([rows, columns], e4m3), tile.empty([rows // 128, columns // 128], f32)
    for r in tile.parallel(rows // 128):
        q, scale = lib.quantize_fp8(w[tile.span(r * 128, 128), :].reshape(1, 128, columns // 128, 128), (1, 3))
        y[tile.span(r * 128, 128), :] = q.reshape(128, columns)
        s[r, :] = scale.reshape(columns // 128)
    return y, s


def test_fp8_by_128_x_128() -> None:
    w = torch.randn(256, 384)
    y, s = fp8_blocks.interpret(w)
    g = w.view(2, 128, 3, 128)
    scale = g.abs().amax((1, 3)).clamp(min=1e-4) / 448
    assert torch.equal(s, scale)
    expected = (g / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(y.float(), expected.float().view(256, 384))


@tile.kernel
def int8(x: Tensor[T, K, f32]):
    y, s = tile.empty([T, K], i8), tile.empty([T], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t, :], s[t] = lib.quantize_int8(x[t, :])
    return y, s


@pytest.mark.parametrize("shape", [(1, 1), (17, 100), (0, 3)])
def test_int8_per_token(shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * 4
    y, s = int8.interpret(x)
    scale = x.abs().amax(-1).clamp(min=1e-8) / 127
    assert torch.equal(s, scale)
    assert torch.equal(y, (x / scale[:, None]).round().clamp(-127, 127).to(torch.int8))


@tile.kernel
def int4(x: Tensor[T, 64, f32]):
    y, s, back = tile.empty([T, 32], u8), tile.empty([T, 2], f32), tile.empty([T, 64], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        q, scale = lib.quantize_int4(x[t, :].reshape(t.extent, 2, 32))
        packed = lib.pack_int4(q.reshape(t.extent, 64))
        y[t, :], s[t, :] = packed, scale
        unpacked = lib.unpack_int4(packed).reshape(t.extent, 2, 32)
        back[t, :] = lib.dequantize(unpacked, scale).reshape(t.extent, 64)
    return y, s, back


@pytest.mark.parametrize("count", [1, 18])
def test_int4_groups_two_in_a_byte(count: int) -> None:
    x = torch.randn(count, 64)
    y, s, back = int4.interpret(x)
    g = x.view(count, 2, 32)
    scale = g.abs().amax(-1).clamp(min=1e-8) / 7
    q = (g / scale[..., None]).round().clamp(-7, 7)
    assert torch.equal(s, scale)
    assert torch.equal(back, (q * scale[..., None]).view(count, 64))
    pairs = q.view(count, 32, 2).int() & 15
    assert torch.equal(y, (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8))


# --- random numbers ---------------------------------------------------------------------------------------------


@tile.kernel
def draws(seed: int, count: Static[int]):
    bits, u, z = tile.empty([count], i32), tile.empty([count], f32), tile.empty([count], f32)
    for _ in tile.parallel(1):
        position = tile.arange(count)
        bits[:] = lib.random_bits(seed, position)
        u[:] = lib.uniform(seed, position)
        z[:] = lib.normal(seed, position)
    return bits, u, z


def test_random_numbers() -> None:
    bits, u, z = draws.interpret(7, 16384)
    assert bits.unique().numel() == 16384
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.var()) - 1 / 12) < 0.002
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.02
    assert bool(z.isfinite().all())
    cells = torch.histc(u, 64, 0, 1)
    assert float(((cells - 256) ** 2 / 256).sum()) < 115  # chi-square of 63 degrees, p = 0.9999
    ones = torch.stack([(bits >> b) & 1 for b in range(32)]).float().mean(1)
    assert bool(((ones - 0.5).abs() < 0.02).all())
    other = draws.interpret(8, 16384)[0]
    changed = torch.stack([((bits ^ other) >> b) & 1 for b in range(32)]).float().mean(1)
    assert bool(((changed - 0.5).abs() < 0.02).all())
    assert torch.equal(draws.interpret(7, 64)[0], bits[:64])
