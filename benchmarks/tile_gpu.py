"""Every kernel of the tile language at its benchmark shapes on one GPU: right, fast, and beside torch.compile.

    PYTHONPATH=. python benchmarks/tile_gpu.py [--only NAME ...] [--out FILE]
    PYTHONPATH=. python benchmarks/tile_gpu.py --compare [--only NAME ...] [--out FILE]

For each kernel and each of its `bench` cases the result is compared with the reference within its tolerance, and the
kernel timed: a CUDA graph of several calls, medians of its replays, in microseconds per call. `bytes`: what the
kernel's tensors hold, each counted once; `of_copy` is that rate over the copy rate measured at the start of the run
(caches of InOut rows count whole, so only streaming kernels' rates mean something). Inputs that fit in the second-level
cache stay there between calls. Results: benchmarks/results/tile_gpu.json.

`--compare` times each kernel beside `torch.compile(mode="max-autotune-no-cudagraphs")` of the same work instead:
CUDA graphs of the same number of calls, replayed alternately. What was compiled is the kernel's reference, or what
`tile_gpu_rivals.py` has in its place; the row says which (`compared_with`). What cannot be captured (it waits for the
GPU) is timed call by call, and the row says so. Results: benchmarks/results/tile_gpu_compile.json.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _common import write_result

from tilery.tile import registry


def graph_of(call: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of `calls` calls, or None where `call` cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000 / calls


def eager_us(call: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000


def compare_us(ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int) -> dict[str, Any]:
    """Median microseconds per call of both, replayed alternately."""
    ours()
    torch.cuda.synchronize()
    first = min(eager_us(ours) for _ in range(3))
    calls = max(1, min(20, int(2000 / max(first, 1))))
    mine = graph_of(ours, calls)
    other = graph_of(theirs, calls) if theirs is not None else None
    times: dict[str, list[float]] = {"tilery": [], "torch_compile": []}
    for round_number in range(rounds + 3):
        a = replay_us(mine, calls) if mine is not None else eager_us(ours)
        b = None
        if theirs is not None:
            b = replay_us(other, calls) if other is not None else eager_us(theirs)
        if round_number >= 3:
            times["tilery"].append(a)
            if b is not None:
                times["torch_compile"].append(b)
    return {
        "us": statistics.median(times["tilery"]),
        "us_min": min(times["tilery"]),
        "torch_compile_us": statistics.median(times["torch_compile"]) if times["torch_compile"] else None,
        "captured": mine is not None,
        "torch_compile_captured": other is not None if theirs is not None else None,
    }


def copy_rate() -> float:
    """Bytes read plus written per second of a large device copy: the best of torch's copy and of an addition of 0."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    rates = []
    for call in (lambda: b.copy_(a), lambda: torch.add(a, 0.0, out=b)):
        graph = graph_of(call, 5)
        assert graph is not None
        rates.append(2 * a.numel() * 4 / (statistics.median(replay_us(graph, 5) for _ in range(15)) * 1e-6))
    return max(rates)


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


def check(kernel: Any, arguments: dict[str, Any]) -> tuple[bool, list[dict[str, float]]]:
    """Result and InOut tensors against the reference, in the order of the kernel's tolerances."""
    ours, theirs = clone(arguments), clone(arguments)
    got, wanted = tensors_of(kernel(**ours)), tensors_of(kernel.reference(**theirs))
    parameters = kernel.signature.parameters if kernel.signature is not None else []
    inout = [p.name for p in parameters if p.spec is not None and p.spec.inout]
    got += [ours[n] for n in inout if ours[n] is not None]
    wanted += [theirs[n] for n in inout if theirs[n] is not None]
    tolerance = kernel.tolerance
    tolerances = tolerance if isinstance(tolerance, tuple) else (tolerance,) * len(got)
    rows, ok = [], len(got) == len(wanted)
    for a, b, t in zip(got, wanted, tolerances):
        difference = t.compare(a.float(), b.float())
        ok = ok and difference.ok
        rows.append({"absolute": difference.absolute, "outside": difference.outside})
    return ok, rows


def moved_bytes(kernel: Any, arguments: dict[str, Any]) -> int:
    """Inputs and outputs, each once (an InOut tensor as what `bench` says in `_bytes`, else once)."""
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)] + tensors_of(kernel(**clone(arguments)))
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Operator:
    """Several launches that make one operator, measured like a kernel."""

    name: str
    call: Callable[..., Any]
    reference: Any
    tolerance: Any
    benches: dict[str, Callable[[torch.Generator, str], dict[str, Any]]]
    signature: None = None

    def __call__(self, **arguments: Any) -> Any:
        return self.call(**arguments)


def operators() -> list[Operator]:
    from tilery.ops.kernels import moe, sampling, sampling_pieces, topk

    def route(tokens: int) -> Any:
        return lambda rand, device: moe._v32(rand, device, tokens)

    def call_route(logits: Any, **rest: Any) -> Any:
        return moe.route(logits, **rest, chunk=moe.chunk_for(logits.shape[0]))

    def scores(rows: int, length: int) -> Any:
        return lambda rand, device: {"scores": torch.randn(rows, length, generator=rand).to(device), "k": 2048}

    def logits(rand: torch.Generator, device: str) -> dict[str, Any]:
        return {"logits": torch.randn(64, 129280, generator=rand).to(device)}

    def top_k_reference(scores: Any, k: int) -> Any:
        return topk._top_k_reference(scores, k, None)

    exact = moe.EXACT
    return [
        Operator(
            "route", call_route, moe._gate_and_sort_reference, (moe.CLOSE, *[exact] * 5),
            {"gate_to_permutation_64": route(64), "gate_to_permutation_4096": route(4096)},
        ),
        Operator(
            "top_k_fast", topk.top_k_fast, top_k_reference, exact,
            {"64_of_32768": scores(64, 32768), "4_of_131072": scores(4, 131072)},
        ),
        Operator(
            "sample_fast", sampling_pieces.sample_fast, sampling.sample.reference, sampling.sample.tolerance,
            {"mixed_64_of_129280": sampling.sample.benches["rows_64"]},
        ),
        Operator(
            "argmax", sampling.argmax, lambda logits: logits.argmax(1), exact, {"greedy_64_of_129280": logits}
        ),
    ]  # fmt: skip


def rows_of(only: list[str] | None) -> list[tuple[Any, str, Any]]:
    """(kernel, case name, its maker) of every benchmark case, whole operators first, then kernels."""
    kernels: list[Any] = [*operators(), *registry.kernels()]
    return [
        (kernel, case, make)
        for kernel in kernels
        for case, make in kernel.benches.items()
        if not only or kernel.name in only
    ]


def warm(part: int, parts: int, only: list[str] | None) -> None:
    """Compiles one share of our kernels into the cache on disk, so that the timed run starts with all of them."""
    for kernel, _, make in rows_of(only)[part::parts]:
        try:
            kernel(**make(torch.Generator().manual_seed(0), "cuda"))
        except Exception as error:
            print(f"warming {kernel.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def shown(row: dict[str, Any]) -> str:
    kept = {k: (round(v, 3) if isinstance(v, float) else v) for k, v in row.items() if k not in ("errors", "us_min")}
    return str(kept)


def measure(kernel: Any, case: str, make: Any, rounds: int, copy: float) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": kernel.name, "case": case}
    try:
        arguments = make(torch.Generator().manual_seed(0), "cuda")
        if kernel.reference is not None:
            row["correct"], row["errors"] = check(kernel, arguments)
        timed = compare_us(functools.partial(kernel, **arguments), None, rounds)
        row.update((k, v) for k, v in timed.items() if not k.startswith("torch_compile"))
        row["bytes"] = moved_bytes(kernel, arguments)
        row["tb_per_s"] = row["bytes"] / (row["us"] * 1e-6) / 1e12
        row["of_copy"] = row["tb_per_s"] * 1e12 / copy
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc(limit=4)
    print(shown(row), flush=True)
    torch.cuda.empty_cache()
    return row


def measure_all(args: argparse.Namespace) -> None:
    """Ours alone, all in this process."""
    only = ["--only", *args.only] if args.only else []
    workers = [
        subprocess.Popen([sys.executable, __file__, "--warm", str(n), str(args.processes), *only])
        for n in range(args.processes)
    ]
    for worker in workers:
        worker.wait()
    if args.prepare_only:
        return
    copy = copy_rate()
    print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
    rows = [measure(kernel, case, make, args.rounds, copy) for kernel, case, make in rows_of(args.only)]
    wrong = [f"{r['kernel']}:{r['case']}" for r in rows if r.get("correct") is False or "error" in r]
    write_result("tile_gpu", {"copy_tb_per_s": copy / 1e12, "rows": rows, "wrong": wrong}, args.out)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over all compared cases, and what is behind or could not be compared."""
    ratios = [r["ratio"] for r in rows if "ratio" in r]
    return {
        "compared": len(ratios),
        "geometric_mean_ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        "slower_than_torch_compile": {f"{r['kernel']}:{r['case']}": r["ratio"] for r in rows if r.get("ratio", 1) < 1},
        "torch_compile_fails": {
            f"{r['kernel']}:{r['case']}": r["torch_compile_error"] for r in rows if "torch_compile_error" in r
        },
        "not_compared": {f"{r['kernel']}:{r['case']}": r["error"] for r in rows if "error" in r},
    }


def compare_all(args: argparse.Namespace) -> None:
    """Beside torch.compile."""
    import tile_gpu_compare

    cases, rows = tile_gpu_compare.comparisons(args.only)
    until, rounds = time.monotonic() + args.seconds, 0 if args.prepare_only else args.rounds
    for row in tile_gpu_compare.compare(cases, args.processes, args.limit, until, rounds):
        print(shown(row), flush=True)
        rows.append(row)
    if args.prepare_only:
        return
    rows.sort(key=lambda row: (row["kernel"], row["case"]))
    total = summary(rows)
    print(f"geometric mean over torch.compile: {total['geometric_mean_ratio']} of {total['compared']} cases")
    write_result("tile_gpu_compile", {**total, "rows": rows}, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="kernel names")
    parser.add_argument("--compare", action="store_true", help="time torch.compile of the same work beside each kernel")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=8, help="processes that compile at once")
    parser.add_argument("--limit", type=float, default=120, help="seconds a comparison may take to get ready")
    parser.add_argument("--seconds", type=float, default=1200, help="compare for no longer than this")
    parser.add_argument("--prepare-only", action="store_true", help="compile everything into the caches and stop")
    parser.add_argument("--warm", nargs=2, type=int, metavar=("PART", "PARTS"), help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU")
    registry.discover("tilery.ops.kernels")
    if args.warm:
        warm(args.warm[0], args.warm[1], args.only)
    elif args.compare:
        compare_all(args)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
