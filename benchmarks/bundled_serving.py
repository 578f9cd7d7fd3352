"""The bundled model as it is served: start, memory, prefix cache, multi-token prediction, cache formats.

    python benchmarks/bundled_serving.py [--repeats 5] [--out FILE]

start     `tilery serve` from process start to the first answered token (files in the page cache)
memory    resident memory of API and engine process together, cache of 65,536 tokens allocated and touched,
          each cache format; fp8 is the default for this model
prefix    time to first token of a request whose first 1,024 tokens are cached, over that of the request before it
mtp       greedy single-stream decoding with one draft token, over none, alternating in one process
caches    decode speed with the packed FP8 cache, over the bf16 cache
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from _common import environment, write_result

from tilery.engine.llm import LLM
from tilery.engine.messages import SamplingParams


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(port: int, body: dict) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer


@contextmanager
def server(*flags: str):
    """Starts `tilery serve`; yields (port, process, seconds from start to the first token)."""
    port = free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tilery.cli.main", "serve", "--port", str(port), *flags], stdout=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                post(port, {"prompt": "It was", "max_tokens": 1})
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.01)
        yield port, process, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def first_token_seconds(port: int, prompt: list[int]) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    assert line.startswith(b"data: {"), line
    seconds = time.perf_counter() - started
    response.read()
    return seconds


def prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Token sequences that the model itself wrote (seeded), so that no text file is needed."""
    params = [SamplingParams(seed=i, max_tokens=length - 1, ignore_eos=True) for i in range(count)]
    return [[0, *answer.outputs[0].token_ids] for answer in llm.generate([[0]] * count, params, progress=False)]


def decode_seconds(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[float, list[int]]:
    """Seconds per output token after the first, and the tokens."""
    llm.core.reset_prefix_cache()
    choice = llm.generate([prompt], params, progress=False)[0].outputs[0]
    return (choice.timing.finished - choice.timing.first_token) / (len(choice.token_ids) - 1), choice.token_ids


def alternate(first: LLM, second: LLM, texts: list[list[int]], params: SamplingParams, repeats: int) -> dict:
    """Seconds per token of both, prompt by prompt in turn; the ratio of medians is first over second."""
    rows: list[dict] = []
    same = True
    for prompt in texts:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            made = [decode_seconds(llm, prompt, params) for llm in (first, second)]
            for list_, (seconds, _) in zip(times, made):
                list_.append(seconds)
            same &= made[0][1] == made[1][1]
        a, b = (statistics.median(values) for values in times)
        rows.append({"first_ms": 1e3 * a, "second_ms": 1e3 * b, "speedup_of_second": a / b})
    return {
        "rows": rows,
        "median_speedup": statistics.median(r["speedup_of_second"] for r in rows),
        "same_tokens": same,
    }


def acceptance(llm: LLM, texts: list[list[int]], params: SamplingParams) -> float:
    before = llm.stats()
    for prompt in texts:
        llm.generate([prompt], params, progress=False)
    after = llm.stats()
    return (after.spec_accepted_tokens - before.spec_accepted_tokens) / max(1, after.spec_drafts - before.spec_drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    result: dict = {"repeats": args.repeats}

    result["start_seconds"] = []
    for _ in range(args.repeats):
        with server() as (_, _, seconds):
            result["start_seconds"].append(seconds)
    print(f"start to first token: {statistics.median(result['start_seconds']):.2f} s", flush=True)

    result["memory_mib"] = {}
    for cache in ("model", "fp8"):
        with server("--cache-dtype", cache, "--cache-tokens", "65536") as (port, process, _):
            long = [[0, *range(20 + i, 920 + i)] for i in range(8)]
            for _ in range(3):
                post(port, {"prompt": long, "max_tokens": 16, "ignore_eos": True})
            parts = [resident_mib(process.pid), *(resident_mib(pid) for pid in children(process.pid))]
            result["memory_mib"][cache] = {"api": parts[0], "engine": sum(parts[1:]), "together": sum(parts)}
            print(f"memory, cache {cache}: {sum(parts):.0f} MiB together", flush=True)

    plain = LLM(progress=False, cache_dtype="model")
    shared = prompts(plain, args.repeats, 1024)
    tails = [[20 + i] * 32 for i in range(2)]
    pairs = []
    with server("--cache-dtype", "model") as (port, _, _):
        post(port, {"prompt": [0, *range(30, 1200)], "max_tokens": 2})
        for prefix in shared:
            pairs.append([first_token_seconds(port, prefix + tail) for tail in tails])
    ratio = statistics.median(second / first for first, second in pairs)
    result["prefix"] = {"shared_tokens": 1024, "own_tokens": 32, "ttft_pairs": pairs, "median_ratio": ratio}
    print(f"prefix cache: second request's TTFT is {ratio:.3f} of the first's", flush=True)

    texts = prompts(plain, args.prompts, 256)
    greedy = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    sampled = SamplingParams(temperature=0.8, seed=1, max_tokens=128, ignore_eos=True)
    drafting = LLM(progress=False, cache_dtype="model", speculative_tokens=1, speculative_auto_off=False)
    result["mtp"] = {
        "greedy": alternate(plain, drafting, texts, greedy, args.repeats),
        "greedy_acceptance": acceptance(drafting, texts, greedy),
        "temperature_0.8": alternate(plain, drafting, texts, sampled, args.repeats),
        "temperature_0.8_acceptance": acceptance(drafting, texts, sampled),
    }
    for name in ("greedy", "temperature_0.8"):
        row, accepted = result["mtp"][name], result["mtp"][f"{name}_acceptance"]
        print(f"mtp, {name}: {row['median_speedup']:.2f}x, {accepted:.2f} of drafts accepted", flush=True)
    del drafting
    packed = LLM(progress=False, cache_dtype="fp8")
    result["caches"] = alternate(plain, packed, texts, greedy, args.repeats)
    print(f"fp8 cache: {result['caches']['median_speedup']:.2f}x the bf16 cache's decode speed", flush=True)
    write_result("bundled_serving", result | {"environment": environment()}, args.out)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
