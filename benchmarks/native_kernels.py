"""What the C++ decode kernels bring: milliseconds per decode step with and without them, the same tokens, in turn.

    python benchmarks/native_kernels.py [--repeats 2] [--out FILE]

Each measurement is a process of its own, because the kernels are chosen once: TILERY_NO_NATIVE=1 runs torch alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _common import environment, write_result


def measure() -> dict[str, float]:
    """Milliseconds per decode step of the bundled model at contexts of 257 to 320 tokens, by batch size."""
    from tilery import LLM, SamplingParams

    llm = LLM(progress=False, cache_dtype="model", enable_prefix_cache=False)
    found = {}
    for batch in (1, 8):
        prompts = [[0, *range(20 + i, 276 + i)] for i in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        best = []
        for _ in range(3):
            last = llm.generate(prompts, params, progress=False)[-1].outputs[0].timing
            best.append((last.finished - last.first_token) / 63 * 1e3)
        found[f"batch {batch}"] = min(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    runs: dict[str, list[dict[str, float]]] = {"native": [], "torch": []}
    for _ in range(args.repeats):
        for name, off in (("native", "0"), ("torch", "1")):
            command = [sys.executable, __file__, "--measure"]
            out = subprocess.check_output(command, text=True, env={**os.environ, "TILERY_NO_NATIVE": off})
            runs[name].append(json.loads(out))
    summary = {}
    for batch in runs["native"][0]:
        native, torch = (statistics.median(run[batch] for run in runs[name]) for name in ("native", "torch"))
        summary[batch] = {"native_ms": native, "torch_ms": torch, "speedup": torch / native}
        print(f"{batch}: torch {torch:.1f} ms a step, native {native:.1f} ms, {torch / native:.2f}x", flush=True)
    write_result("native_kernels", {"summary": summary, "runs": runs, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
