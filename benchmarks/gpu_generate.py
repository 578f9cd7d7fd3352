"""Greedy generation on a GPU against the CPU: the same tokens, and how many of them a second.

    PYTHONPATH=. python benchmarks/gpu_generate.py [--device cuda] [--batch 16 --output 64] [--out FILE]

For each dtype and cache format the same prompts are continued on both devices. Where two answers part, the result says
where, and by how little the CPU preferred its token there. The second check needs no luck: log-probabilities of one
long text, position by position. Prompts are texts that the model wrote itself; half of them are longer than the
indexer's top-k, so that sparse attention selects. The chosen operators stand beside the numbers: run it again when
there are faster ones.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _common import environment, write_result

from tilery import LLM, SamplingParams
from tilery.models.config import DEFAULT_MODEL

LONGEST = 1024
"""Tokens of the text whose log-probabilities are compared."""


def texts(llm: LLM, lengths: list[int]) -> list[list[int]]:
    params = [SamplingParams(seed=i, max_tokens=length - 1, ignore_eos=True) for i, length in enumerate(lengths)]
    answers = llm.generate([[0]] * len(lengths), params, progress=False)
    return [[0, *answer.outputs[0].token_ids] for answer in answers]


def open_model(model: str, device: str, dtype: str, cache: str) -> LLM:
    return LLM(model, device=device, dtype=dtype, cache_dtype=cache, enable_prefix_cache=False, progress=False)


def answers_of(llm: LLM, prompts: list[list[int]], output: int, text: list[int]) -> dict[str, list]:
    """Greedy tokens, by how much the best token beat the second at each, and the log-probabilities of `text`."""
    greedy = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, logprobs=2)
    choices = [answer.outputs[0] for answer in llm.generate(prompts, greedy, progress=False)]
    scored = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0), progress=False)[0]
    return {
        "tokens": [choice.token_ids for choice in choices],
        "margins": [[row.top_logprobs[0] - row.top_logprobs[1] for row in choice.logprobs] for choice in choices],
        "text": [row.logprob for row in scored.prompt_logprobs[1:]],
    }


def compare(wanted: dict[str, list], got: dict[str, list]) -> dict[str, Any]:
    parted = []
    for number, (ours, theirs) in enumerate(zip(wanted["tokens"], got["tokens"])):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        if at is not None:
            parted.append({"prompt": number, "token": at, "margin_nats": wanted["margins"][number][at]})
    apart = [abs(a - b) for a, b in zip(wanted["text"], got["text"])]
    return {
        "prompts": len(wanted["tokens"]),
        "equal": len(wanted["tokens"]) - len(parted),
        "parted": parted,
        "logprob_difference": {"mean": statistics.mean(apart), "max": max(apart)},
        "mean_logprob": {"cpu": statistics.mean(wanted["text"]), "device": statistics.mean(got["text"])},
    }


def speed(llm: LLM, prompts: list[list[int]], output: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats`, after one run that does not count."""
    greedy = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    rates, steps = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        answers = llm.generate(prompts, greedy, progress=False)
        rates.append(len(prompts) * output / (time.perf_counter() - started))
        timings = [answer.outputs[0].timing for answer in answers]
        decoding = max(t.finished for t in timings) - max(t.first_token for t in timings)
        steps.append(decoding / (output - 1) * 1e3)
    return {
        "output_tokens_per_second": statistics.median(rates[1:]),
        "decode_step_ms": statistics.median(steps[1:]),
    }


def show(name: str, run: dict[str, Any]) -> None:
    against, apart = run["against_cpu"], run["against_cpu"]["logprob_difference"]
    rates = [
        f"{run[case]['output_tokens_per_second']:.0f} tokens/s ({run[case]['decode_step_ms']:.1f} ms a decode step)"
        for case in ("batch", "single")
    ]
    print(
        f"{name}: {against['equal']} of {against['prompts']} answers equal, log-probabilities {apart['mean']:.2g} nat "
        f"apart (at most {apart['max']:.2g}); batch {rates[0]}, single {rates[1]}",
        flush=True,
    )
    for parted in against["parted"]:
        print(
            f"    prompt {parted['prompt']} parts at token {parted['token']}, "
            f"where the CPU's margin was {parted['margin_nats']:.2g} nat",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cuda", help="compared with the cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--caches", nargs="+", default=["model", "fp8"])
    parser.add_argument("--commit", default=None, help="where this folder is no git checkout")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    lengths = [40 + 440 * i // args.batch for i in range(args.batch)]
    *prompts, text = texts(open_model(args.model, "cpu", "bfloat16", "model"), [*lengths, LONGEST])
    result: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "prompt_tokens": lengths}
    facts = environment()
    facts["commit"] = facts["commit"] or args.commit
    runs: dict[str, Any] = {}
    for dtype in args.dtypes:
        for cache in args.caches:
            name = f"{dtype}, {cache} cache"
            wanted = answers_of(open_model(args.model, "cpu", dtype, cache), prompts, args.output, text)
            llm = open_model(args.model, args.device, dtype, cache)
            run = runs[name] = {
                "against_cpu": compare(wanted, answers_of(llm, prompts, args.output, text)),
                "batch": speed(llm, prompts, args.output, args.repeats),
                "single": speed(llm, prompts[-1:], args.output, args.repeats),
                "cache_tokens": llm.core.runner.num_blocks * llm.core.runner.block_size,
            }
            result["operators"] = llm.core.runner.ops.chosen
            if torch.cuda.is_available():
                run["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
            del llm
            show(name, run)
            # After each pair, so that a run cut short leaves what it has measured.
            write_result("gpu_generate", result | {"runs": runs, "environment": facts}, args.out)


if __name__ == "__main__":
    main()
