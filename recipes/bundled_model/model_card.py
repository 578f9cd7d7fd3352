"""Write the model card from the JSON files of the run.

    python -m recipes.bundled_model.model_card --results recipes/bundled_model/results \
        --model tilery/bundled/tilery-books-26m

Reads train.json, books.json, samples.json and data.json; writes README.md beside the weights.
"""

import argparse
import json
import textwrap
from pathlib import Path

from recipes.bundled_model.model import ModelConfig


def read(results: Path, name: str) -> dict | list:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wrap(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def quote(sample: dict) -> str:
    prompt = "\n".join(f"**{line}**" if line else "" for line in sample["prompt"].split("\n"))
    text = (prompt + ("\n\n" if sample["chat"] else "") + sample["text"]).strip()
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def stages(train: dict) -> str:
    plan = {stage["name"]: stage for stage in train["plan"]["stages"]}
    what = {"DENSE": "all keys", "DISTIL": "all keys; only the indexer learns", "SPARSE": "the indexer's top 256"}
    rows = [
        [
            done["stage"],
            what[plan[done["stage"]]["attend"]],
            str(plan[done["stage"]]["length"]),
            f"{done['tokens'] / 1e6:.1f} M",
            f"{done['seconds']:.0f} s",
            f"{done['tokens'] / done['seconds'] / 1e3:.0f} k",
        ]
        for done in train["finished"]
    ]
    return table(["stage", "attention", "length", "tokens", "time", "tokens/s"], rows)


def quality(books: dict) -> str:
    rows = []
    for weights in ("bf16", "fp8"):
        for attention in ("dense", "sparse"):
            r = books[f"{weights}_{attention}"]
            rows.append(
                [
                    f"{weights.upper()} weights, {attention} attention",
                    f"{r['perplexity_per_token']:.2f}",
                    f"{r['bits_per_byte']:.4f}",
                    f"{r['next_token_accuracy']:.1%}",
                    f"{r['mtp_agreement']:.1%}",
                ]
            )
    return table(["", "perplexity per token", "bits per byte", "next token right", "MTP draft agrees"], rows)


def positions(books: dict) -> str:
    dense, sparse = (books[f"fp8_{name}"]["nll_by_position"] for name in ("dense", "sparse"))
    rows = [
        [f"{d['from']}-{d['from'] + 511}", f"{d['nll_per_token']:.3f}", f"{s['nll_per_token']:.3f}"]
        for d, s in zip(dense, sparse, strict=True)
    ]
    return table(["position", "dense", "sparse"], rows)


def layers(books: dict, cfg: ModelConfig) -> str:
    load = books["fp8_sparse"]["expert_load_max_over_mean"]
    rows = []
    for layer in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        moe = layer - cfg.first_k_dense_replace
        mass = books["selected_mass_per_layer"][layer] if layer < cfg.num_hidden_layers else None
        rows.append(
            [
                f"{layer}" if mass else f"{layer} (MTP)",
                f"{load[moe]:.2f}" if moe >= 0 else "dense",
                f"{mass['indexer']:.2f}" if mass else "",
                f"{mass['recent']:.2f}" if mass else "",
            ]
        )
    return table(
        ["layer", "busiest expert / mean", "attention mass on the indexer's 256 keys", "on the 256 latest keys"], rows
    )


def card(results: Path, cfg: ModelConfig, weight_bytes: int) -> str:
    train, books, samples, data = (read(results, name) for name in ("train", "books", "samples", "data"))
    total = sum(done["tokens"] for done in train["finished"])
    seconds = sum(done["seconds"] for done in train["finished"])
    books_rows = [row for row in data if row["stream"].startswith("books")]
    unique = sum(row["tokens"] for row in books_rows)
    (talk,) = (row for row in data if row["stream"] == "dialogue")
    (held,) = (row for row in data if row["stream"] == "heldout")
    sampled, greedy = samples["temperature_0.8"], samples["temperature_0"]
    story = [s for s in sampled["samples"] if not s["chat"]]
    chat = [s for s in sampled["samples"] if s["chat"]]
    parts = [
        "# tilery-books-26m",
        wrap(
            """A small language model with DeepSeek-V3.2's architecture, trained from scratch on public-domain English
            books. It comes with Tilery so that every path of the engine - latent attention, the lightning indexer and
            sparse attention, grouped mixture of experts, multi-token prediction, FP8 blocks - runs on a real model, on
            any machine, without a download."""
        ),
        wrap(
            """It writes grammatical English in the manner of nineteenth-century novels; the sense rarely holds for more
            than a few sentences. It knows no facts, follows no instructions and calls no tools; what it says can be
            false, or offensive in the way old books are."""
        ),
        "## Files",
        wrap(
            f"""{train["parameters"]:,} parameters, {weight_bytes / 1e6:.1f} MB of weights in DeepSeek's FP8 format:
            e4m3 with one F32 scale per 128 x 128 block (`weight_scale_inv`); embeddings, head, norms and router in
            BF16. {cfg.num_hidden_layers} layers of hidden size {cfg.hidden_size}, the first one dense;
            {cfg.n_routed_experts}
            experts in {cfg.n_group} groups, of which {cfg.num_experts_per_tok} work on a token, and one shared expert;
            {cfg.num_attention_heads} heads over a latent of {cfg.kv_lora_rank} + {cfg.qk_rope_head_dim}; an indexer of
            {cfg.index_n_heads} heads that picks {cfg.index_topk} keys; one MTP layer, which shares embedding and head
            with the main model. Context {cfg.max_position_embeddings:,} tokens. Byte-level BPE with {cfg.vocab_size:,}
            entries and DeepSeek's special-token names. Licence: Apache-2.0."""
        ),
        "## Training",
        wrap(
            f"""{len(train["finished"])} stages on one {train["device"]}, {total / 1e6:.0f} M tokens in
            {seconds / 60:.1f} minutes: {sum(row["documents"] for row in books_rows)} books ({unique / 1e6:.1f} M
            tokens, {sum(row["bytes"] for row in books_rows) / 1e6:.0f} MB), each seen about
            {total * 0.95 / unique:.0f} times, and {talk["documents"]:,} conversations cut from the books' dialogue
            ({talk["tokens"] / 1e6:.1f} M tokens)
            in the chat template's form, 5 % of every batch. In a quarter of the replies that come with narration, the
            narration stands in as the thoughts before `</think>`."""
        ),
        stages(train),
        wrap(
            f"""Muon for the matrices inside the layers, AdamW for the rest; BF16 products, FP32 master weights; experts
            balanced by the choice bias alone. All layers' indexers learn from the attention distribution they replace
            (KL divergence, detached input). PyTorch {train["torch"]}."""
        ),
        "## Quality",
        wrap(
            f"""{held["documents"]} held-out books, {books["fp8_sparse"]["tokens"] / 1e6:.2f} M tokens, in windows of
            {books["window"]:,} tokens that each start with BOS; {books["device"]}, PyTorch {books["torch"]}. FP8 means
            the shipped weights with BF16 activations. "MTP draft agrees": given the true text, the draft for the token
            after next equals the model's own argmax."""
        ),
        quality(books),
        wrap(
            f"""In greedy generation from the prompts below {greedy["drafts_equal_to_token"]:.1%} of the drafts equal
            the next token: greedy text of so small a model falls into loops, which are easy to foresee. At temperature
            0.8 {sampled["drafts_equal_to_token"]:.1%} of the greedy drafts equal the sampled token."""
        ),
        "Loss per token by position, shipped weights:",
        positions(books),
        wrap(
            f"""Per layer: load of the experts on the held-out books, and the share of dense attention's mass on the
            indexer's keys, for the queries past position {2 * cfg.index_topk} of one window:"""
        ),
        layers(books, cfg),
        "## Samples",
        f"Temperature 0.8, seed 0, all {len(story)} prompts as they came; the prompt is bold.",
        *map(quote, story),
        "Chat, temperature 0.8:",
        *map(quote, chat),
        "Greedy, the first prompt:",
        quote(greedy["samples"][0]),
        "## Reproduce",
        "`recipes/bundled_model` in Tilery's repository holds the recipe and the JSON files behind every figure here.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    cfg = ModelConfig.from_hf(args.model / "config.json")
    text = card(args.results, cfg, (args.model / "model.safetensors").stat().st_size)
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
