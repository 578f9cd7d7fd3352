"""The engine's kernels in the tile language against eager torch, at the bundled model's shapes on this CPU.

    python benchmarks/cpu_kernels.py [--seconds 0.4] [--threads 1] [--out FILE]

1 and 16 rows as in decode, 256 as in prefill; caches packed, contexts of 256 rows. Both run in turn on equal tensors,
torch by the operators' references; the figure is the least time of a call, so that other work on the machine does not
count. Results are compared before anything is timed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import environment, write_result

from tilery.ops import native, registry

HIDDEN, RANK, LATENT, ROPE, HEADS, NOPE = 256, 192, 512, 64, 16, 32
INDEX_HEADS, INDEX_DIM, EXPERTS, WIDTH, VOCABULARY, SLOTS, CONTEXT = 16, 128, 16, 768, 8192, 16_384, 256


def calls(tokens: int, rand: torch.Generator) -> dict[str, Callable[[Any], Any]]:
    """What to run by name: functions of the operators' record."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rand)

    reference = registry.select(overrides={"*": "reference"})
    rows, pages = torch.zeros(SLOTS, 656, dtype=torch.uint8), torch.zeros(SLOTS // 64, 64 * 132, dtype=torch.uint8)
    reference.write_mla(rows, torch.arange(SLOTS), normal(SLOTS, LATENT), normal(SLOTS, ROPE))
    reference.write_index(pages, torch.arange(SLOTS), normal(SLOTS, INDEX_DIM))
    x, residual, weight = normal(tokens, HIDDEN), normal(tokens, HIDDEN), normal(HIDDEN)
    q, kv, key = normal(tokens, RANK + LATENT + ROPE + INDEX_DIM).split((RANK, LATENT + ROPE, INDEX_DIM), dim=1)
    norms = (normal(RANK), normal(LATENT), normal(INDEX_DIM), normal(INDEX_DIM))
    cos, sin = normal(tokens, ROPE // 2), normal(tokens, ROPE // 2)
    slots = torch.randperm(SLOTS, generator=rand)[:tokens]
    queries, index_q = normal(tokens, HEADS, NOPE + ROPE), normal(tokens, INDEX_HEADS, INDEX_DIM)
    index_w, gate_up = normal(tokens, INDEX_HEADS), normal(tokens, 2 * WIDTH)
    table, ids = normal(VOCABULARY, HIDDEN).bfloat16(), torch.randint(0, VOCABULARY, (tokens,), generator=rand)
    tables, positions = (normal(4096, ROPE // 2), normal(4096, ROPE // 2)), torch.randint(0, 4096, (tokens,))
    logits, bias = normal(tokens, EXPERTS), normal(EXPERTS) * 0.1
    context = torch.randperm(SLOTS, generator=rand)[: max(tokens, CONTEXT)]
    found: dict[str, Callable[[Any], Any]] = {
        "embed": lambda o: o.embed(table, ids, *tables, positions, torch.float32),
        "rms_norm": lambda o: o.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda o: o.add_rms_norm(x, residual, weight, 1e-6),
        "mla_indexer_prolog": lambda o: o.mla_indexer_prolog(q, kv, key, *norms, cos, sin, slots, rows, pages, 1e-6),
        "index_queries": lambda o: o.index_queries(index_q, index_w, cos, sin, 0.1),
        "route_grouped": lambda o: o.route_grouped(logits, bias, 4, 4, 2, True, 2.5),
        "swiglu": lambda o: o.swiglu(gate_up),
    }
    if tokens <= 32:  # decode
        absorbed = normal(tokens, HEADS, LATENT + ROPE)
        seen = torch.stack([torch.randperm(SLOTS, generator=rand)[:CONTEXT] for _ in range(tokens)])
        found["split_queries"] = lambda o: o.split_queries(queries, cos, sin, LATENT)
        found["mla_decode"] = lambda o: o.mla_decode(absorbed, rows, seen, LATENT, 0.1)
    else:
        found["rotate_queries"] = lambda o: o.rotate_queries(queries, cos, sin)
        found["read_mla"] = lambda o: o.read_mla(rows, context, LATENT, torch.float32)
        found["read_index"] = lambda o: o.read_index(pages, context, torch.float32)
    return found


def same(name: str, got: Any, expected: Any) -> None:
    pairs = zip(got, expected) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        if name == "split_queries" and a.shape[-1] == LATENT + ROPE:
            a, b = a[..., LATENT:], b[..., LATENT:]  # the rest is for a product to fill
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def least(functions: list[Callable[[], Any]], seconds: float) -> list[float]:
    """The least time of a call of each, in microseconds; they run in turn."""
    best = [float("inf")] * len(functions)
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end:
        for i, function in enumerate(functions):
            for _ in range(5):
                started = time.perf_counter()
                function()
                best[i] = min(best[i], time.perf_counter() - started)
    return [1e6 * b for b in best]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.4, help="per kernel, shape and side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    ops, reference = registry.select(), registry.select(overrides={"*": "reference"})
    native.set_threads(ops, args.threads)
    torch.set_num_threads(args.threads)
    results = []
    for tokens in (1, 16, 256):
        for name, call in calls(tokens, torch.Generator().manual_seed(tokens)).items():
            same(name, call(ops), call(reference))
            tile, eager = least([lambda: call(ops), lambda: call(reference)], args.seconds)  # noqa: B023
            row = {"operator": name, "rows": tokens, "implementation": ops.chosen[name]}
            results.append({**row, "tile_us": tile, "eager_us": eager, "speedup": eager / tile})
            print(
                f"{name:20} {tokens:4} rows  tile {tile:8.1f} us  eager {eager:8.1f} us  {eager / tile:5.1f}x",
                flush=True,
            )
    worst = min(row["speedup"] for row in results)
    print(f"least speed-up {worst:.2f}x")
    write_result("cpu_kernels", {"threads": args.threads, "results": results, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
