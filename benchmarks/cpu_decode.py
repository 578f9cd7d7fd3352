"""Single-stream decode of the bundled model on this CPU against another tree of this repository, in turn.

    git archive COMMIT | tar -x -C /tmp/old            # the tree to compare with
    python benchmarks/cpu_decode.py --baseline /tmp/old [--rounds 20] [--threads N] [--out FILE]

Both engines stay loaded in processes of their own and answer in turn: whatever else the machine does meets both.
Greedy, one request, 128 tokens. Figures per engine: tokens per second of a whole answer after its first token (best and
median over rounds), and of the steps' times the least and the 10th percentile, which other work on the machine disturbs
least. The load average before each round stands beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _common import ROOT, environment, write_result

TOKENS = 128
PROMPT = "The old man walked slowly along the shore, and"
WORKER = f"""
import json, sys, time
from tilery import LLM, SamplingParams
llm = LLM(progress=False, enable_prefix_cache=False, threads=int(sys.argv[1]) or None)
params = SamplingParams(temperature=0, max_tokens={TOKENS}, ignore_eos=True)
step, times = llm.core.step, []
def timed():
    started = time.perf_counter()
    done = step()
    times.append(time.perf_counter() - started)
    return done
llm.core.step = timed
for _ in sys.stdin:
    times.clear()
    one = llm.generate({PROMPT!r}, params, progress=False)[0].outputs[0]
    seconds = one.timing.finished - one.timing.first_token
    answer = {{"rate": {TOKENS - 1} / seconds, "tokens": list(one.token_ids), "steps": times}}
    print(json.dumps(answer), flush=True)
"""


class Engine:
    def __init__(self, tree: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(threads)], cwd=tree, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tree)},
        )  # fmt: skip
        self.rates: list[float] = []
        self.steps: list[float] = []
        self.tokens: list[int] = []

    def run(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.tokens = answer["tokens"]
        self.steps += answer["steps"]
        return float(answer["rate"])

    def step_ms(self, share: float) -> float:
        """The time that this share of all steps did not need; 0: the least."""
        return 1e3 * sorted(self.steps)[int(len(self.steps) * share)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, required=True, help="folder of the other tree")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the engine takes by itself")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    engines = {"baseline": Engine(args.baseline.resolve(), args.threads), "this": Engine(ROOT, args.threads)}
    for engine in engines.values():
        engine.run()  # compiles, warms
        engine.steps.clear()
    load = []
    for _ in range(args.rounds):
        load.append(round(os.getloadavg()[0], 2))
        for engine in engines.values():
            engine.rates.append(engine.run())
    both = [engine.tokens for engine in engines.values()]
    same = next((i for i, (a, b) in enumerate(zip(*both)) if a != b), TOKENS)
    summary = {
        name: {
            "best": max(e.rates),
            "median": statistics.median(e.rates),
            "step_ms_least": e.step_ms(0.0),
            "step_ms_p10": e.step_ms(0.1),
            "tokens_per_second": e.rates,
        }
        for name, e in engines.items()
    }
    ratios = [b / a for a, b in zip(engines["baseline"].rates, engines["this"].rates)]
    result = {
        "threads": args.threads, "engines": summary, "equal_tokens": same, "load_average": load,
        "speedup": {
            "best": summary["this"]["best"] / summary["baseline"]["best"],
            "median": summary["this"]["median"] / summary["baseline"]["median"],
            "median_of_rounds": statistics.median(ratios),
            "step_least": summary["baseline"]["step_ms_least"] / summary["this"]["step_ms_least"],
            "step_p10": summary["baseline"]["step_ms_p10"] / summary["this"]["step_ms_p10"],
        },
    }  # fmt: skip
    for name, row in summary.items():
        print(
            f"{name}: best {row['best']:.1f} tokens/s, median {row['median']:.1f}; "
            f"step least {row['step_ms_least']:.2f} ms, p10 {row['step_ms_p10']:.2f}"
        )
    print("speed-up: " + ", ".join(f"{k} {v:.2f}" for k, v in result["speedup"].items()) + f"; {same} equal tokens")
    write_result("cpu_decode", {**result, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
