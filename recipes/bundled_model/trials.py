"""Short runs that compare optimisers, rates and batch sizes.

    python -m recipes.bundled_model.trials --plan recipes/bundled_model/plans/trials.json --tokens TOKENS_DIR \
        --tokenizer tilery/bundled/tilery-books-26m --out FILE

The plan file holds `base` (a plan) and `trials` (name -> plan values that replace the base's, `stage` for values of its
only stage). Every trial starts from the same weights and ends after the stage's seconds, so that speed counts too.
Writes one JSON file: per trial the tokens seen, speed, peak memory, and the held-out loss.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F

from recipes.bundled_model.data import held_out_documents
from recipes.bundled_model.evaluate import windows
from recipes.bundled_model.train import Plan, Stage, Trainer


@torch.no_grad()
def held_out_loss(trainer: Trainer, tokens: Path, length: int, count: int = 128) -> float:
    """Mean loss per token on `count` windows spread over the held-out books."""
    inputs, labels = windows(held_out_documents(tokens / "heldout.u16.xz"), length)
    pick = torch.linspace(0, inputs.shape[0] - 1, count).long()
    total, tokens_seen = 0.0, 0
    for x, y in zip(inputs[pick].split(16), labels[pick].split(16), strict=True):
        x, y = x.to(trainer.device), y.to(trainer.device)
        logits = trainer.model.logits(trainer.model(x).hidden_BSH)
        total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum"))
        tokens_seen += int((y >= 0).sum())
    return total / tokens_seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="replaces the stage's seconds")
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = json.loads(args.plan.read_text(encoding="utf-8"))
    rows = []
    for name, changes in values["trials"].items():
        stage = values["base"]["stages"][0] | changes.get("stage", {})
        stage |= {"seconds": args.seconds} if args.seconds else {}
        override = values["base"] | {k: v for k, v in changes.items() if k != "stage"} | {"stages": (Stage(**stage),)}
        plan = Plan(**override)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(plan, args.tokens, args.tokenizer, device, compiled=not args.eager)
        trainer.run_stage(float("inf"), log_every=100)
        done = trainer.finished[0]
        row = {
            "trial": name,
            "device": trainer.report()["device"],
            "optimizer": plan.optimizer,
            "lr_matrix": plan.lr_matrix,
            "lr_other": plan.lr_other,
            "weight_decay": plan.weight_decay,
            "stage": {k: v for k, v in asdict(plan.stages[0]).items() if v != float("inf")},
            "tokens": done["tokens"],
            "steps": done["steps"],
            "tokens_per_second": done["tokens"] / done["seconds"],
            "peak_memory_bytes": trainer.report()["peak_memory_bytes"],
            "held_out_loss": held_out_loss(trainer, args.tokens, plan.stages[0].length),
        }
        rows.append(row)
        print(
            f"TRIAL {name}: loss {row['held_out_loss']:.4f}, "
            f"{row['tokens_per_second']:.0f} tok/s, {row['steps']} steps",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")
        del trainer


if __name__ == "__main__":
    main()
