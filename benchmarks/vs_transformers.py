"""The bundled model here and in transformers: same weights, same machine, same threads, one run.

Both sides get dequantised weights; transformers runs with its cache, batching and each attention it offers for this
architecture, in bf16 and in fp32, and its fastest combination is the one compared with. Greedy, output length forced.

    python benchmarks/vs_transformers.py [--input 256 --output 128 --concurrency 8 --repeats 3] [--out FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import environment, write_result
from safetensors.torch import save_file

from tilery.engine.llm import LLM
from tilery.engine.messages import SamplingParams
from tilery.models.config import DEFAULT_MODEL
from tilery.models.loader import Checkpoint, resolve_model


def dequantised_copy(folder: Path) -> None:
    """The bundled checkpoint as an ordinary bf16 one, without quantisation and without the MTP layer."""
    source = resolve_model(DEFAULT_MODEL)
    checkpoint = Checkpoint(source)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    prefix = f"model.layers.{config['num_hidden_layers']}."
    names = [n for n in checkpoint.names() if not n.endswith("_scale_inv") and not n.startswith(prefix)]
    keep = ("e_score_correction_bias", "k_norm.weight", "k_norm.bias")
    tensors = {n: checkpoint.weight(n, torch.float32 if n.endswith(keep) else torch.bfloat16) for n in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Different token sequences that the model itself wrote (seeded), so that no text file is needed."""
    params = [SamplingParams(seed=i, max_tokens=length - 1, ignore_eos=True) for i in range(count)]
    answers = llm.generate([[0]] * count, params, progress=False)
    return [[0, *answer.outputs[0].token_ids] for answer in answers]


def time_transformers(folder: Path, batch: list[list[int]], output: int, repeats: int, dtype, attention) -> list[float]:
    from transformers import DeepseekV32ForCausalLM, GenerationConfig

    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    ids = torch.tensor(batch)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=output, min_new_tokens=output, pad_token_id=2, eos_token_id=1
    )
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        seconds.append(time.perf_counter() - start)
        assert out.shape == (len(batch), len(batch[0]) + output)
    return seconds


def time_tilery(llm: LLM, batch: list[list[int]], output: int, repeats: int) -> list[float]:
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    seconds = []
    for _ in range(repeats + 1):
        llm.core.reset_prefix_cache()
        start = time.perf_counter()
        answers = llm.generate(batch, params, progress=False)
        seconds.append(time.perf_counter() - start)
        assert all(len(answer.outputs[0].token_ids) == output for answer in answers)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the rival")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(dtype="bfloat16", threads=args.threads, progress=False)
    batch = prompts(llm, args.concurrency, args.input)
    cases = {"batch": batch, "single": batch[:1]}
    result: dict = {"arguments": {k: str(v) for k, v in vars(args).items()}, "cases": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dequantised_copy(folder)
        for case, ids in cases.items():
            total = len(ids) * args.output
            ours = time_tilery(llm, ids, args.output, args.repeats)
            row = {
                "tilery_tokens_per_second": total / statistics.median(ours),
                "tilery_seconds": ours,
                "transformers": {},
            }
            for dtype in (getattr(torch, name) for name in args.dtypes):
                for attention in ("sdpa", "eager"):
                    repeats = 1 if case == "batch" and args.repeats < 3 else args.repeats
                    theirs = time_transformers(folder, ids, args.output, repeats, dtype, attention)
                    key = f"{str(dtype).removeprefix('torch.')}-{attention}"
                    row["transformers"][key] = {
                        "tokens_per_second": total / statistics.median(theirs),
                        "seconds": theirs,
                    }
                    print(
                        f"{case:7s} transformers {key:15s} {total / statistics.median(theirs):8.1f} tok/s", flush=True
                    )
            best = max(v["tokens_per_second"] for v in row["transformers"].values())
            row["ratio_to_fastest"] = row["tilery_tokens_per_second"] / best
            for name in args.dtypes:
                rates = [v["tokens_per_second"] for k, v in row["transformers"].items() if k.startswith(name)]
                row[f"ratio_to_fastest_{name}"] = row["tilery_tokens_per_second"] / max(rates)
            result["cases"][case] = row
            ratios = ", ".join(f"{row[f'ratio_to_fastest_{name}']:.2f}x its fastest in {name}" for name in args.dtypes)
            print(f"{case:7s} tilery {row['tilery_tokens_per_second']:8.1f} tok/s: {ratios}", flush=True)
    write_result("vs_transformers", result | {"environment": environment()}, args.out)


if __name__ == "__main__":
    main()
