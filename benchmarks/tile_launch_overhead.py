"""What a call of a tile kernel costs on the host: warm, and the first call of a process with and without a cache entry.

    python benchmarks/tile_launch_overhead.py [--out FILE]

Warm: microseconds per call, the best of several loops, of a kernel of two inputs and one output on small tensors; on a
GPU beside a bare Triton launch of the same work, with the output made in the loop as a call makes it. First call:
milliseconds from the call to its result in a process that has imported torch, the package and the target.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import torch
from _common import environment, write_result

from tilery import tile
from tilery.tile import Dim, Tensor, f32

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

T, H = Dim("T"), Dim("H")


@tile.kernel
def add(x: Tensor[T, H, f32], y: Tensor[T, H, f32]):
    z = tile.empty([T, H], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        z[t, :] = x[t, :] + y[t, :]
    return z


if triton is not None:

    @triton.jit
    def bare_add(x, y, z, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


def best(call, device: str, number: int = 300) -> float:
    """Microseconds per call."""
    done = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    call()
    times = []
    for _ in range(60):
        done()
        times.append(timeit.timeit(call, number=number) / number * 1e6)
        done()
    return round(min(times), 2)


def warm(device: str) -> dict[str, float]:
    x, y = torch.randn(4, 256, device=device), torch.randn(4, 256, device=device)
    z = torch.empty_like(x)
    found = {
        "tile": best(lambda: add(x, y), device),
        "tile, out=": best(lambda: add(x, y, out=z), device),
        "torch.add": best(lambda: torch.add(x, y), device),
        "torch.empty_like alone": best(lambda: torch.empty_like(x), device),
        "empty function": best(lambda: None, device),
    }
    torch.testing.assert_close(add(x, y), x + y)
    if device == "cuda" and triton is not None:
        found["bare Triton launch"] = best(lambda: bare_add[(1,)](x, y, z, 1024, BLOCK=1024), device)

        def allocating() -> torch.Tensor:
            out = torch.empty_like(x)
            bare_add[(1,)](x, y, out, 1024, BLOCK=1024)
            return out

        found["bare Triton launch and torch.empty_like"] = best(allocating, device)
    return found


def first(device: str) -> float:
    """Milliseconds of the first call in this process."""
    if device == "cpu":
        import tilery.tile.targets.cpu
    else:
        import tilery.tile.targets.triton
    import tilery.tile.executables  # noqa: F401

    x, y = torch.randn(4, 256, device=device), torch.randn(4, 256, device=device)
    _ = x + y
    start = time.perf_counter()
    add(x, y)
    return (time.perf_counter() - start) * 1e3


def first_calls(device: str) -> dict[str, float]:
    """Each number from processes of their own, over a cache folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TILERY_CACHE_DIR": folder}
        times = []
        for _ in range(6):
            command = [sys.executable, __file__, "--first", device]
            times.append(json.loads(subprocess.run(command, env=environ, check=True, capture_output=True).stdout))
    return {"compiling": round(times[0], 1), "from the cache": round(statistics.median(times[1:]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--first", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first:
        print(json.dumps(first(args.first)))
        return
    torch.set_num_threads(1)
    result = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        result[device] = {"warm_us": warm(device), "first_call_ms": first_calls(device)}
        print(device, json.dumps(result[device], indent=1))
    write_result("tile_launch_overhead", {**result, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
