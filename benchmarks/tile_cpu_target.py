"""How the tile language should run on a CPU: generated C++, Numba, or torch operators per tile.

Four kernels at decode and prefill shapes, f32 so that Numba (which has no bf16) takes part; and one launch.
    python benchmarks/tile_cpu_target.py [--out FILE] [--threads N]
Numba is measured if it can be imported (it is no dependency; put it on PYTHONPATH). "torch per tile" is the fallback
without a compiler, "eager" the usual PyTorch operators. Times are the least of several rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import environment, write_result

from tilery import tile
from tilery.tile import Dim, Tensor, f32, i32
from tilery.tile.targets.cpu import compile_cpu, set_threads
from tilery.tile.targets.cpu.fallback import fallback_launch

T, H, N, D = Dim("T"), Dim("H"), Dim("N"), Dim("D", multiple_of=2)
B, L, P = Dim("B"), Dim("L"), Dim("P")


@tile.kernel
def rms_norm(x: Tensor[T, H, f32], w: Tensor[H, f32], eps: float):
    y = tile.empty([T, H], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :]
        y[t, :] = v * tile.rsqrt(tile.mean(v * v, axis=1, keepdims=True) + eps) * w[:]
    return y


@tile.kernel
def swiglu(x: Tensor[T, 2 * H, f32]):
    y = tile.empty([T, H], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        gate, up = x[t, :H], x[t, H:]
        y[t, :] = gate * tile.sigmoid(gate) * up
    return y


@tile.kernel
def rope(x: Tensor[T, N, D, f32], cos: Tensor[T, D // 2, f32], sin: Tensor[T, D // 2, f32]):
    y = tile.empty([T, N, D], f32)
    for t in tile.parallel(T):
        c, s = cos[t, :], sin[t, :]
        a, b = x[t, :, : D // 2], x[t, :, D // 2 :]
        y[t, :, : D // 2] = a * c - b * s
        y[t, :, D // 2 :] = b * c + a * s
    return y


@tile.kernel
def attention(
    q: Tensor[B, N, D, f32], kv: Tensor[P, 64, D, f32], table: Tensor[B, L, i32], lens: Tensor[B, i32], scale: float
):
    o = tile.empty([B, N, D], f32)
    for b in tile.parallel(B):
        qt = q[b, :, :]
        m, total, acc = tile.full([N], float("-inf"), f32), tile.zeros([N], f32), tile.zeros([N, D], f32)
        for j in tile.range(tile.blocks(lens[b], "kv")):
            k = kv[table[b, j // 64], j % 64, :]
            s = tile.dot(qt, k.T) * scale
            top = tile.maximum(m, tile.max(s, axis=1))
            p, a = tile.exp(s - top[:, None]), tile.exp(m - top)
            total, acc, m = total * a + tile.sum(p, axis=1), acc * a[:, None] + tile.dot(p, k), top
        o[b, :, :] = acc / total[:, None]
    return o


def eager_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def eager_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def eager_attention(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, scale: float
) -> torch.Tensor:
    outs = []
    for b, n in enumerate(lens.tolist()):
        k = kv[table[b, : (n + 63) // 64].long()].flatten(0, 1)[:n]
        outs.append(torch.softmax(q[b] @ k.T * scale, -1) @ k)
    return torch.stack(outs)


def numba_kernels() -> dict[str, Any]:
    """The same in Numba; empty without it. `fast` lets sums be vectorised; the others keep IEEE meaning."""
    try:
        import numba
        import numpy as np
    except ImportError:
        return {}
    jit = numba.njit(nogil=True, error_model="numpy")
    fast = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

    @fast
    def n_rms_norm(x, w, eps, y):
        for t in range(x.shape[0]):
            total = np.float32(0)
            for i in range(x.shape[1]):
                total += x[t, i] * x[t, i]
            r = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
            for i in range(x.shape[1]):
                y[t, i] = x[t, i] * r * w[i]

    @jit
    def n_swiglu(x, y):
        half = y.shape[1]
        for t in range(x.shape[0]):
            for i in range(half):
                g = x[t, i]
                y[t, i] = g / (np.float32(1) + np.exp(-g)) * x[t, half + i]

    @jit
    def n_rope(x, cos, sin, y):
        half = x.shape[2] // 2
        for t in range(x.shape[0]):
            for n in range(x.shape[1]):
                for i in range(half):
                    a, b = x[t, n, i], x[t, n, half + i]
                    y[t, n, i] = a * cos[t, i] - b * sin[t, i]
                    y[t, n, half + i] = b * cos[t, i] + a * sin[t, i]

    @fast
    def n_attention(q, kv, table, lens, scale, y):
        heads, width = q.shape[1], q.shape[2]
        scores = np.empty(kv.shape[0] * 64, np.float32)
        for b in range(q.shape[0]):
            for n in range(heads):
                top = np.float32(-np.inf)
                for j in range(lens[b]):
                    row = kv[table[b, j // 64], j % 64]
                    dot = np.float32(0)
                    for i in range(width):
                        dot += q[b, n, i] * row[i]
                    scores[j] = dot * np.float32(scale)
                    top = max(top, scores[j])
                total = np.float32(0)
                for i in range(width):
                    y[b, n, i] = 0
                for j in range(lens[b]):
                    row = kv[table[b, j // 64], j % 64]
                    p = np.exp(scores[j] - top)
                    total += p
                    for i in range(width):
                        y[b, n, i] += p * row[i]
                for i in range(width):
                    y[b, n, i] /= total

    return {"rms_norm": n_rms_norm, "swiglu": n_swiglu, "rope": n_rope, "attention": n_attention}


def cases() -> list[tuple[str, str, Any, tuple[Any, ...], Callable[..., torch.Tensor]]]:
    """(kernel, shape, kernel object, arguments, eager function)."""
    out: list[Any] = []
    for t, h in ((1, 512), (4, 512), (16, 512), (1024, 4096)):
        x, w = torch.randn(t, h), torch.randn(h)
        out.append(("rms_norm", f"{t} x {h}", rms_norm, (x, w, 1e-6), lambda x, w, e: F.rms_norm(x, w.shape, w, e)))
        out.append(("swiglu", f"{t} x {h}", swiglu, (torch.randn(t, 2 * h),), eager_swiglu))
    for t, n in ((1, 8), (4, 8), (16, 8), (1024, 32)):
        x, c = torch.randn(t, n, 64), torch.randn(t, 32)
        out.append(("rope", f"{t} x {n} x 64", rope, (x, c, c.sin()), eager_rope))
    for b, length in ((1, 128), (4, 128), (16, 512), (32, 2048)):
        pages = (length + 63) // 64
        kv, table = torch.randn(b * pages, 64, 64), torch.randperm(b * pages).int().view(b, pages)
        q, lens = torch.randn(b, 8, 64), torch.full((b,), length - 3, dtype=torch.int32)
        arguments = (q, kv, table, lens, 0.125)
        out.append(("attention", f"{b} x 8 x 64, {length - 3} rows", attention, arguments, eager_attention))
    return out


def best(call: Callable[[], Any]) -> float:
    """Microseconds of one call: the least of many short rounds, so that a busy machine disturbs few of them."""
    call()
    start = time.perf_counter()
    call()
    each = max(time.perf_counter() - start, 1e-7)
    number = max(1, min(500, int(0.0005 / each)))
    rounds = []
    until = time.perf_counter() + 0.4
    while time.perf_counter() < until or len(rounds) < 3:
        start = time.perf_counter()
        for _ in range(number):
            call()
        rounds.append((time.perf_counter() - start) / number * 1e6)
    return round(min(rounds), 2)


@tile.kernel
def nothing(a: Tensor[1, f32], b: Tensor[1, f32], c: Tensor[1, f32]):
    y = tile.empty([1], f32)
    for _ in tile.parallel(1):
        y[0] = a[0] + b[0] + c[0]
    return y


def measure(
    name: str, shape: str, kernel: Any, arguments: tuple[Any, ...], eager: Callable[..., torch.Tensor],
    compiled: Callable[..., Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """One row: every way to run a kernel, checked against eager torch."""
    bound = kernel.signature.bind(arguments, {})
    env = kernel.signature.bind_dims(bound)
    started = time.perf_counter()
    executable = compile_cpu(kernel.trace(kernel.signature.specialise(bound)), env)
    row: dict[str, Any] = {"kernel": name, "shape": shape, "compile_s": round(time.perf_counter() - started, 2)}
    values = [bound[p.value.name] for p in executable.kernel.params]
    (got,) = executable.launch(values, env)
    wanted = eager(*arguments)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    row["cpp_us"] = best(lambda: executable.launch(values, env))
    row["numba_us"] = None
    if compiled is not None:
        result = torch.empty_like(wanted)
        arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in (*arguments, result)]
        compiled(*arrays)
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
        row["numba_us"] = best(lambda: compiled(*arrays))
    per_tile = fallback_launch(executable.kernel, env)
    row["per_tile_us"] = best(lambda: per_tile(values, env))
    row["eager_us"] = best(lambda: eager(*arguments))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write JSON here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    set_threads(args.threads)
    compiled = numba_kernels()
    rows = []
    columns = ("cpp_us", "numba_us", "per_tile_us", "eager_us")
    print(f"{'kernel':10} {'shape':24}" + "".join(f"{c:>13}" for c in columns))
    for name, shape, kernel, arguments, eager in cases():
        rows.append(row := measure(name, shape, kernel, arguments, eager, compiled.get(name)))
        print(f"{name:10} {shape:24}" + "".join(f"{row[c]:13.1f}" if row[c] else f"{'-':>13}" for c in columns))
    one = [torch.ones(1) for _ in range(3)]
    bound = nothing.signature.bind(tuple(one), {})
    executable = compile_cpu(nothing.trace(nothing.signature.specialise(bound)), {})
    launch = {
        "launch_4_tensors_us": best(lambda: executable.launch(one, {})),
        "torch_add_us": best(lambda: torch.add(one[0], one[1])),
        "torch_empty_us": best(lambda: torch.empty((1,), dtype=torch.float32)),
    }
    ratio = statistics.geometric_mean(r["eager_us"] / r["cpp_us"] for r in rows)
    print(launch, f"eager / C++, geometric mean: {ratio:.2f}")
    if args.out:
        record = {"runs": rows, "launch": launch, "threads": args.threads, "eager_over_cpp": round(ratio, 2)}
        write_result("tile_cpu_target", {**record, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
