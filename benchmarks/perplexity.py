"""Perplexity of a text file through the engine itself, with each cache format.

    python benchmarks/perplexity.py TEXT [--windows 24 --length 1024] [--out FILE]

Windows start with BOS and are spread evenly over the text. Prompt log-probabilities are computed in chunks, so every
key is read back from the cache: this is what serving with that cache format costs in quality.
"""

import argparse
import math
import time
from pathlib import Path

from _common import environment, write_result

from tilery.engine.llm import LLM
from tilery.engine.messages import SamplingParams
from tilery.models.config import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    result: dict = {"text": args.text.name, "windows": args.windows, "length": args.length, "runs": {}}
    for name, settings in {
        "float32 weights and cache": {"dtype": "float32", "cache_dtype": "model"},
        "bfloat16, bf16 cache": {"dtype": "bfloat16", "cache_dtype": "model"},
        "bfloat16, fp8 cache": {"dtype": "bfloat16", "cache_dtype": "fp8"},
    }.items():
        llm = LLM(args.model, progress=False, max_batch_tokens=256, enable_prefix_cache=False, **settings)
        ids = llm.tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
        step = (len(ids) - args.length) // args.windows
        bos = llm.tokenizer.bos_id
        prompts = [[bos, *ids[i * step : i * step + args.length - 1]] for i in range(args.windows)]
        started = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        loss, count = 0.0, 0
        for answer in llm.generate(prompts, params, progress=False):
            rows = [row for row in answer.prompt_logprobs or [] if row is not None]
            loss -= sum(row.logprob for row in rows)
            count += len(rows)
        perplexity = math.exp(loss / count)
        result["runs"][name] = {"perplexity": perplexity, "tokens": count, "seconds": time.perf_counter() - started}
        print(f"{name}: perplexity {perplexity:.3f} over {count} tokens", flush=True)
    write_result("perplexity", result | {"environment": environment()}, args.out)


if __name__ == "__main__":
    main()
