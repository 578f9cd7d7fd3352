"""Figures of the model card, on the held-out books.

    python -m recipes.bundled_model.evaluate books --weights RUN_DIR --tokens TOKENS_DIR --tokenizer DIR --out FILE
    python -m recipes.bundled_model.evaluate samples --weights RUN_DIR --tokenizer DIR --out FILE

`books` writes perplexity with dense and sparse attention and with BF16 and FP8 weights, agreement of the MTP draft with
the model's own next token, tokens per expert, and the attention mass that the indexer's keys hold. `samples` writes
greedy and sampled texts and how many drafts they would have accepted; a CPU is enough for it. Books are cut into
windows of the model's longest length, each opened by BOS; windows do not overlap, so every token is counted once. FP8
figures use the shipped weights and BF16 activations.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from recipes.bundled_model import export
from recipes.bundled_model.data import held_out_documents
from recipes.bundled_model.model import Attend, DeepSeekV32, ModelConfig, rope_interleaved, topk_mask
from recipes.bundled_model.tokenizer import ASSISTANT, BOS_ID, END_THINK, EOS_ID, USER

BUCKET = 512  # positions per row of the loss-by-position table
PROMPTS = (
    "The old lighthouse keeper had not spoken to anyone for",
    "It was a dark night in November, and the rain",
    '"I do not believe you," said the Countess,',
    "CHAPTER I\n\nMy father was",
    "The philosopher who wishes to understand the nature of virtue must",
    "When the ship came in sight of the island, the captain",
    "She opened the letter with trembling hands, and",
    "There was once a poor woodcutter who lived",
)
QUESTIONS = (
    "Where have you been all this time?",
    "Who is that man standing by the window?",
    "Do you think it will rain to-morrow?",
    "Will you marry me?",
)


def windows(documents: list[np.ndarray], length: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels), both [n, length] int64. Labels are -100 past a document's end."""
    inputs, labels = [], []
    for document in documents:
        body = document[1:].astype(np.int64)
        for start in range(0, body.size, length):
            piece = body[start : start + length]
            row = np.full((2, length), -100, dtype=np.int64)
            row[1, : piece.size] = piece
            row[0, 0], row[0, 1 : piece.size] = BOS_ID, piece[:-1]
            row[0, piece.size :] = EOS_ID
            inputs.append(row[0])
            labels.append(row[1])
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(labels))


@dataclass
class Sums:
    """Running totals over the held-out tokens."""

    nll: float = 0.0
    tokens: int = 0
    top1: int = 0
    mtp_nll: float = 0.0
    mtp_tokens: int = 0
    mtp_agree: int = 0
    bucket_nll: dict[int, float] = field(default_factory=dict)
    bucket_tokens: dict[int, int] = field(default_factory=dict)
    load_LE: Tensor | float = 0.0

    def result(self, text_bytes: int) -> dict:
        load = self.load_LE
        return {
            "tokens": self.tokens,
            "bytes": text_bytes,
            "nll_per_token": self.nll / self.tokens,
            "perplexity_per_token": math.exp(self.nll / self.tokens),
            "bits_per_byte": self.nll / math.log(2) / text_bytes,
            "next_token_accuracy": self.top1 / self.tokens,
            "mtp_perplexity_per_token": math.exp(self.mtp_nll / self.mtp_tokens),
            "mtp_agreement": self.mtp_agree / self.mtp_tokens,
            "nll_by_position": [
                {"from": bucket * BUCKET, "nll_per_token": self.bucket_nll[bucket] / tokens, "tokens": tokens}
                for bucket, tokens in sorted(self.bucket_tokens.items())
            ],
            "expert_load_max_over_mean": (load.amax(-1) / load.mean(-1)).tolist(),
            "expert_load_min_over_mean": (load.amin(-1) / load.mean(-1)).tolist(),
        }


@torch.no_grad()
def perplexity(model: DeepSeekV32, inputs: Tensor, labels: Tensor, attend: Attend, text_bytes: int, batch: int) -> dict:
    """Loss, next-token accuracy, MTP agreement (its argmax against the model's) and expert load over all windows.

    The MTP layer at position t sees the true token t + 1 and drafts token t + 2; it agrees when its argmax is the main
    model's argmax at position t + 1.
    """
    sums = Sums()
    device = next(model.parameters()).device
    for start in range(0, inputs.shape[0], batch):
        x, y = inputs[start : start + batch].to(device), labels[start : start + batch].to(device)
        following = torch.where(y >= 0, y, EOS_ID)
        out = model(x, following, attend)
        logits = model.logits(out.hidden_BSH)
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="none").view_as(y)
        valid = y >= 0
        guess = logits.argmax(-1)
        del logits
        draft_logits = model.logits(out.mtp_BSH[:, :-1])
        later = y[:, 1:]
        draft_nll = F.cross_entropy(draft_logits.flatten(0, 1), later.flatten(), ignore_index=-100, reduction="none")
        draft = draft_logits.argmax(-1)
        later_valid = later >= 0
        sums.nll += float(nll.double().sum())
        sums.tokens += int(valid.sum())
        sums.top1 += int(((guess == y) & valid).sum())
        sums.mtp_nll += float(draft_nll.double().sum())
        sums.mtp_tokens += int(later_valid.sum())
        sums.mtp_agree += int(((draft == guess[:, 1:]) & later_valid).sum())
        for bucket in range(math.ceil(y.shape[1] / BUCKET)):
            part = slice(bucket * BUCKET, (bucket + 1) * BUCKET)
            sums.bucket_nll[bucket] = sums.bucket_nll.get(bucket, 0.0) + float(nll[:, part].double().sum())
            sums.bucket_tokens[bucket] = sums.bucket_tokens.get(bucket, 0) + int(valid[:, part].sum())
        sums.load_LE = sums.load_LE + out.load_LE.double().cpu()
    return sums.result(text_bytes)


@torch.no_grad()
def generate(
    model: DeepSeekV32, prompts: list[list[int]], new_tokens: int, temperature: float, seed: int
) -> tuple[list[list[int]], float]:
    """(new tokens per prompt, up to EOS; share of greedy drafts that equal the token chosen).

    Recomputes the whole text for every token. Rows are padded on the right: causal attention never looks there.
    With temperature 0 the share is the acceptance rate of one-token speculative decoding.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.full((len(prompts), int(lengths.max()) + new_tokens), EOS_ID, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    chosen = []
    for _ in range(new_tokens):
        x = tokens[:, : int(lengths.max())]
        hidden = model(x, attend=Attend.SPARSE_ONLY).hidden_BSH[rows, lengths - 1]
        logits = model.logits(hidden)
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        token = torch.where(open_rows, token, EOS_ID)
        tokens[rows, lengths] = token
        chosen.append(token)
        lengths = lengths + 1
        open_rows &= token != EOS_ID
    out = model(tokens[:, :-1], tokens[:, 1:], Attend.SPARSE_ONLY)
    draft = model.logits(out.mtp_BSH).argmax(-1)  # position t drafts token t + 2
    accepted, drafted, texts = 0, 0, []
    for row, prompt in enumerate(prompts):
        new = [int(step[row]) for step in chosen]
        new = new[: new.index(EOS_ID)] if EOS_ID in new else new
        texts.append(new)
        positions = range(len(prompt) + 1, len(prompt) + len(new))
        accepted += sum(int(draft[row, p - 2] == tokens[row, p]) for p in positions)
        drafted += len(positions)
    return texts, accepted / max(drafted, 1)


@torch.no_grad()
def selected_mass(model: DeepSeekV32, inputs: Tensor) -> list[dict]:
    """Per layer: share of dense attention's mass on the indexer's keys, for queries with more than 2 top-k keys.

    `recent` is the same share for the k most recent keys, a baseline that needs no indexer.
    """
    device, k = next(model.parameters()).device, model.cfg.index_topk
    x = inputs.to(device)
    rows = []
    handles = []

    def hook(module, args, _output) -> None:
        x_BSH, cos, sin, _ = args
        qr = module.q_a_layernorm(module.q_a_proj(x_BSH))
        q_nope, q_rope = (
            module.q_b_proj(qr).unflatten(-1, (module.heads, -1)).transpose(1, 2).split([module.nope, module.rope], -1)
        )
        latent, k_rope = module.kv_a_proj_with_mqa(x_BSH).split([module.latent, module.rope], -1)
        kv = module.kv_b_proj(module.kv_a_layernorm(latent)).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        dot = q_nope @ kv[..., : module.nope].mT
        dot = dot + rope_interleaved(q_rope, cos, sin) @ rope_interleaved(k_rope, cos, sin).unsqueeze(1).mT
        causal = torch.ones(dot.shape[-2:], dtype=torch.bool, device=device).tril()
        prob = (dot.float() * module.scale).masked_fill(~causal, float("-inf")).softmax(-1).mean(1)
        mask = topk_mask(module.indexer(x_BSH, qr, cos, sin), k)
        late = slice(2 * k, None)
        recent = causal & ~causal.tril(-k)
        rows.append(
            {
                "indexer": float((prob * mask)[:, late].sum(-1).mean()),
                "recent": float((prob * recent)[:, late].sum(-1).mean()),
            }
        )

    for layer in model.model.layers[: model.cfg.num_hidden_layers]:
        handles.append(layer.self_attn.register_forward_hook(hook))
    model(x, attend=Attend.DENSE)
    for handle in handles:
        handle.remove()
    return rows


def chat_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(f"{USER}{question}{ASSISTANT}{END_THINK}").ids


def load(args: argparse.Namespace) -> tuple[DeepSeekV32, dict[str, Tensor], dict]:
    """(model without weights, BF16 tensors, facts about the machine for the JSON file)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = json.loads(args.plan.read_text(encoding="utf-8")).get("model", {}) if args.plan else {}
    cfg = ModelConfig(**sizes)
    model = DeepSeekV32(cfg, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "activations": str(model.dtype),
    }
    return model, export.read_pieces(args.weights), facts


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")


def books(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    begun = time.monotonic()
    model, bf16, result = load(args)
    documents = held_out_documents(args.tokens / "heldout.u16.xz")
    inputs, labels = windows(documents, model.cfg.max_position_embeddings)
    if args.windows:
        pick = torch.linspace(0, inputs.shape[0] - 1, args.windows).long()
        inputs, labels = inputs[pick], labels[pick]
    text_bytes = sum(len(tokenizer.decode(row[row >= 0].tolist()).encode()) for row in labels)
    result |= {
        "held_out_books": len(documents),
        "window": model.cfg.max_position_embeddings,
        "windows": inputs.shape[0],
    }
    for weights, tensors in (("bf16", bf16), ("fp8", export.quantize(bf16))):
        export.load_tensors(model, tensors)
        for attend in (Attend.DENSE, Attend.SPARSE_ONLY):
            name = f"{weights}_{'dense' if attend is Attend.DENSE else 'sparse'}"
            result[name] = perplexity(model, inputs, labels, attend, text_bytes, args.batch)
            print(
                f"{name}: ppl {result[name]['perplexity_per_token']:.3f}, "
                f"{result[name]['bits_per_byte']:.4f} bits/byte, "
                f"mtp {result[name]['mtp_agreement']:.3f}, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            write(args.out, result)
    result["selected_mass_per_layer"] = selected_mass(model, inputs[:1])
    result["seconds"] = time.monotonic() - begun
    write(args.out, result)
    print(f"attention mass on selected keys {result['selected_mass_per_layer']}, {result['seconds']:.0f} s")


def samples(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    begun = time.monotonic()
    model, bf16, result = load(args)
    export.load_tensors(model, export.quantize(bf16))
    texts = [tokenizer.encode(prompt).ids for prompt in PROMPTS] + [chat_prompt(tokenizer, q) for q in QUESTIONS]
    for temperature in (0.0, 0.8):
        new, share = generate(model, texts, args.new_tokens, temperature, seed=0)
        result[f"temperature_{temperature:g}"] = {
            "drafts_equal_to_token": share,
            "samples": [
                {"prompt": prompt, "chat": prompt in QUESTIONS, "text": tokenizer.decode(tokens)}
                for prompt, tokens in zip(PROMPTS + QUESTIONS, new, strict=True)
            ],
        }
        for sample in result[f"temperature_{temperature:g}"]["samples"]:
            print(f"[{sample['prompt']}] {sample['text']}\n", flush=True)
        print(f"temperature {temperature}: {share:.3f} of the drafts equal the token chosen")
    result["seconds"] = time.monotonic() - begun
    write(args.out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("books", "samples"))
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights-*.safetensors")
    parser.add_argument("--tokens", type=Path, help="folder of heldout.u16.xz (books)")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", type=Path, help="plan whose model sizes differ from the defaults")
    parser.add_argument("--windows", type=int, help="use only so many windows, spread over the books")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=160)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    {"books": books, "samples": samples}[args.part](args, tokenizer)


if __name__ == "__main__":
    main()
